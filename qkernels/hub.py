"""Model folders in the layout of Hugging Face transformers, read from the disk alone."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

from torch import nn


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a folder's config.json.

    Args:
        folder: a folder that `save_pretrained` wrote, or a copy of one from the hub.

    Raises:
        ValueError: it is no such folder.
    """
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"there is no '{path}'; expected the folder of a transformers model, with config.json, "
            f"the weights and the tokenizer's files in it"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"'{path}' is not a readable JSON file: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds a {type(content).__name__}; expected a JSON object")
    return content


def load_folder(folder: Path) -> nn.Module:
    """The float model of a folder, in eval mode on the CPU.

    Its class is the one that config.json names under `architectures`; code in the folder is never
    run, and nothing is downloaded.

    Args:
        folder: a folder with config.json and weights.

    Raises:
        ImportError: transformers is not installed.
        ValueError: it is no such folder, or transformers does not know the model.
    """
    names = read_config(folder).get("architectures")
    transformers = _transformers()
    for name in names if isinstance(names, list) else ():
        kind = getattr(transformers, str(name), None)
        if inspect.isclass(kind) and issubclass(kind, transformers.PreTrainedModel):
            known: Any = kind
            model: nn.Module = known.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
            )
            return model.eval()
    raise ValueError(
        f"config.json of '{folder}' names the architectures {names}, of which transformers "
        f"{transformers.__version__} has none; models with code of their own are not loaded"
    )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, able to pad.

    Args:
        folder: a folder with the tokenizer's files.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the folder has no tokenizer.
    """
    transformers = _transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"'{folder}' has no tokenizer that transformers reads: {error}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _transformers() -> Any:
    try:
        transformers: Any = importlib.import_module("transformers")
    except ModuleNotFoundError:
        raise ImportError(
            "model folders need transformers, which is not installed: pip install 'qkernels[hf]'"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers
