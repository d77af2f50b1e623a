"""Memory of training adapters on 4-bit weights: qkernels beside bitsandbytes with PEFT.

    python benchmarks/lora_memory.py                       # prints; two minutes on two cores
    python benchmarks/lora_memory.py --output FOLDER       # also writes lora_memory.json and .md

Every way loads the same bfloat16 folder in a process of its own, quantizes to NF4 in blocks of 64,
puts adapters of rank 16 on all linear layers but the head, and takes two AdamW steps. Adapters
are float32 everywhere. The other way is the QLoRA recipe (Dettmers et al., 2023) as transformers
and PEFT have it: double quantization, and `prepare_model_for_kbit_training`, which turns all that
is not quantized into float32. "without float32" leaves that step out.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qkernels as qk
from qkernels.report.files import write_atomically
from qkernels.report.machine import machine_facts

RANK, ALPHA, STEPS, BLOCK = 16, 32, 2, 64
MIB = 2**20
LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
# Rows and tokens of a batch.
BATCHES = {"llama": (1, 256), "minilm": (8, 128)}
# Model, and whether its blocks are computed anew on the way back.
CASES = (("llama", True), ("llama", False), ("minilm", False))


# ---- Models --------------------------------------------------------------------------------------


def save_folder(name: str, folder: Path) -> None:
    """Write a model as bfloat16: a Llama of 136 million random weights, or MiniLM as it is."""
    if name == "minilm":
        from qkernels.demo.model import model_folder

        model = auto_class(name).from_pretrained(model_folder(), local_files_only=True)
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    model.to(torch.bfloat16).save_pretrained(folder)


def auto_class(name: str) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM

    return AutoModel if name == "minilm" else AutoModelForCausalLM


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Next-token loss; of an encoder, the mean square of what it gives."""
    if "CausalLM" in model.config.architectures[0]:  # type: ignore[union-attr,index]
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss
    hidden: Tensor = model(input_ids=ids).last_hidden_state
    return hidden.float().square().mean()


# ---- Ways ----------------------------------------------------------------------------------------


def ours(name: str, folder: Path, checkpointing: bool) -> nn.Module:
    model = auto_class(name).from_pretrained(folder, local_files_only=True, dtype=torch.bfloat16)
    qk.quantize_(model, {"*": qk.NF4(group_size=BLOCK)}, ignore=_left_float(model), progress=False)
    qk.transfer.add_lora_(model, rank=RANK, alpha=ALPHA)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return _prepared(model, checkpointing)


def _left_float(model: nn.Module) -> list[str]:
    """What bitsandbytes leaves: embeddings, and the head of a language model."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding)]
    return [*names, *(n for n, _ in model.named_modules() if n.endswith("lm_head"))]


def recipe(name: str, folder: Path, checkpointing: bool) -> nn.Module:
    import peft

    model = peft.prepare_model_for_kbit_training(
        _bitsandbytes(name, folder), use_gradient_checkpointing=checkpointing
    )
    return _with_peft(model)


def recipe_without_float32(name: str, folder: Path, checkpointing: bool) -> nn.Module:
    return _with_peft(_prepared(_bitsandbytes(name, folder), checkpointing))


def _bitsandbytes(name: str, folder: Path) -> Any:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return auto_class(name).from_pretrained(
        folder,
        local_files_only=True,
        dtype=torch.bfloat16,
        device_map="cpu",
        quantization_config=config,
    )


def _with_peft(model: Any) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    made: nn.Module = peft.get_peft_model(model, config)
    return made


def _prepared(model: Any, checkpointing: bool) -> nn.Module:
    """Gradients reach the first block, and blocks are computed anew where that is asked for."""
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    prepared: nn.Module = model
    return prepared


WAYS: dict[str, Callable[[str, Path, bool], nn.Module]] = {
    "qkernels": ours,
    "bitsandbytes + PEFT": recipe,
    "bitsandbytes + PEFT, without float32": recipe_without_float32,
}


# ---- Measuring -----------------------------------------------------------------------------------


def status(field: str) -> int:
    """Bytes from /proc/self/status: VmRSS now, VmHWM at its highest since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"the system does not report {field}")


def settle() -> int:
    """Give freed memory back; what is resident then."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status("VmRSS")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(way: str, name: str, folder: Path, checkpointing: bool) -> dict[str, float]:
    """Fine-tune in this process and watch its memory.

    Returns:
        Bytes above what the process had with everything imported: "loading", the peak until the
        model could train; "model", what it then took; "training", the peak of the steps.
        "process" is the peak of the whole process while training. "step" is the seconds of the last
        step, "trained" counts parameters.
    """
    import peft  # noqa: F401  every way starts from the same imports
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    auto_class(name)
    torch.manual_seed(0)
    before = settle()
    forget_peak()
    model = WAYS[way](name, folder, checkpointing).train()
    loading = status("VmHWM") - before
    ids = torch.randint(1000, 30000, BATCHES[name])
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in trained)
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    resident = settle() - before
    forget_peak()
    for _ in range(STEPS):
        start = time.perf_counter()
        loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    step, peak = time.perf_counter() - start, status("VmHWM")
    return {
        "loading": loading,
        "model": resident,
        "training": peak - before,
        "process": peak,
        "step": step,
        "trained": sum(p.numel() for p in trained),
    }


def in_new_process(way: str, name: str, folder: Path, checkpointing: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", way, name, str(folder)]
    command += ["--checkpointing"] if checkpointing else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{way} on {name} failed: {done.stderr.strip()[-800:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def markdown(rows: list[dict[str, Any]], facts: dict[str, str]) -> str:
    lines = ["# Memory of training adapters on 4-bit weights", ""]
    lines += ["MiB above the process with all libraries imported, except under *process*.", ""]
    lines += ["| model | checkpointing | way | loading, peak | model | training, peak | process |"]
    lines += ["| --- | --- | --- | ---: | ---: | ---: | ---: |"]
    for row in rows:
        sizes = (f"{row[k] / MIB:.0f}" for k in ("loading", "model", "training", "process"))
        checkpointing = "yes" if row["checkpointing"] else "no"
        cells = [row["model_name"], checkpointing, row["way"], *sizes]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"Rank {RANK}; {STEPS} steps of AdamW on batches × tokens {BATCHES}.", ""]
    return "\n".join([*lines, *(f"- {key}: {value}" for key, value in facts.items()), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="folder for lora_memory.json and .md")
    parser.add_argument("--one", nargs=3, metavar=("WAY", "MODEL", "FOLDER"), help="measure here")
    parser.add_argument("--checkpointing", action="store_true", help="with --one")
    arguments = parser.parse_args()
    if arguments.one:
        way, name, folder = arguments.one
        print(json.dumps(measure(way, name, Path(folder), arguments.checkpointing)))
        return
    rows: list[dict[str, Any]] = []
    for name, checkpointing in CASES:
        with tempfile.TemporaryDirectory() as folder:
            save_folder(name, Path(folder))
            for way in WAYS:
                found = in_new_process(way, name, Path(folder), checkpointing)
                row = {"model_name": name, "checkpointing": checkpointing, "way": way, **found}
                print(row, file=sys.stderr, flush=True)
                rows.append(row)
    libraries = ("bitsandbytes", "peft", "transformers")
    facts = machine_facts() | {name: importlib.metadata.version(name) for name in libraries}
    page = markdown(rows, facts)
    print(page)
    if arguments.output is not None:
        path = arguments.output / "lora_memory.json"
        write_atomically(path, json.dumps({"rows": rows, "machine": facts}, indent=2) + "\n")
        write_atomically(path.with_suffix(".md"), page)


if __name__ == "__main__":
    main()
