"""The command `qkernels`: doctor, demo, search, quantize, inspect, compare, bench."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

_USER_ERRORS = (OSError, ValueError, TypeError, RuntimeError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the command's name; by default `sys.argv[1:]`.

    Returns:
        The exit code: 0, 1 if `doctor` found something broken, 2 after an error.

    Example:
        >>> main(["inspect", "no-such-file.safetensors"])
        2
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = _parser(given).parse_args(given)
        code: int = options.run(options)
    except KeyboardInterrupt:
        return 130
    except _USER_ERRORS as error:
        if "--traceback" in given:
            raise
        print(f"qkernels: {_one_sentence(error)}", file=sys.stderr)
        return 2
    return code


def _one_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror is not None:  # its own text says "[Errno 2]"
        named = error.filename is not None
        text = f"'{error.filename}': {error.strerror}" if named else error.strerror
    # These may also be a mistake of ours, which a bug report should locate.
    located = isinstance(error, (TypeError, RuntimeError))
    return f"{text} (--traceback shows where)" if located else text


class _Version(argparse.Action):
    """Looks the version up when it is asked for, not for every command."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from qkernels import __version__

        print(f"qkernels {__version__}")
        parser.exit()


def _parser(given: list[str]) -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--traceback", action="store_true", help="show where an error comes from, for bug reports"
    )
    parser = argparse.ArgumentParser(
        prog="qkernels", description="Low-bit layers for PyTorch that compute in integers."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add_command(name: str, purpose: str) -> argparse.ArgumentParser:
        sentence = f"{purpose[0].upper()}{purpose[1:]}."
        return commands.add_parser(name, parents=[common], help=purpose, description=sentence)

    doctor = add_command("doctor", "examine this installation and run a self-test")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.set_defaults(run=_doctor)

    demo = add_command("demo", "fine-tune, quantize and measure a pretrained model")
    if "demo" in given:  # only then pay for importing it
        from qkernels import demo as demo_package

        demo_package.add_arguments(demo)
        demo.set_defaults(run=demo_package.run)

    quantize = add_command("quantize", "quantize the transformers model in a folder")
    quantize.add_argument("model", metavar="MODEL_DIR", help="folder with config.json and weights")
    how = quantize.add_mutually_exclusive_group(required=True)
    how.add_argument("--scheme", help="w8a8, w8a16, w4a16, w4a8 or nf4, in either case")
    how.add_argument("--plan", metavar="FILE", help="a scheme for each layer, as search wrote it")
    quantize.add_argument(
        "--group-size", type=int, metavar="N", help="weights per scale; -1 for a whole row"
    )
    quantize.add_argument(
        "--ignore",
        nargs="*",
        metavar="PATTERN",
        help="names of layers to leave in float, * and ? allowed (default: lm_head)",
    )
    quantize.add_argument("--out", required=True, metavar="FILE", help="a .safetensors file")
    quantize.set_defaults(run=_quantize)

    search = add_command("search", "choose a scheme for every layer, under a budget")
    search.add_argument("model", metavar="MODEL_DIR", help="folder of the float model")
    search.add_argument(
        "--budget",
        required=True,
        nargs="+",
        metavar="KEY=NUMBER",
        help="sqnr (dB at least), latency or size (shares of the float model), seconds or bytes",
    )
    search.add_argument(
        "--objective",
        default="latency",
        choices=("latency", "size", "accuracy"),
        help="what is to be as good as possible (default: latency)",
    )
    search.add_argument("--out", required=True, metavar="FILE", help="the plan, a JSON file")
    search.add_argument(
        "--seconds", type=float, default=10.0, metavar="N", help="to time schemes for (default: 10)"
    )
    search.add_argument("--plot", metavar="FILE", help="draw the Pareto fronts")
    search.add_argument("--checkpoint", metavar="FILE", help="to go on after an interruption")
    _add_text_options(search)
    search.set_defaults(run=_search)

    inspect = add_command("inspect", "show what a quantized file holds, without loading it")
    inspect.add_argument("file", metavar="FILE", help="a file that save_model or quantize wrote")
    inspect.add_argument("--json", action="store_true", help="print it as JSON")
    inspect.set_defaults(run=_inspect)

    compare = add_command("compare", "compare a quantized file with the model it came from")
    compare.add_argument("model", metavar="MODEL_DIR", help="folder of the float model")
    compare.add_argument("file", metavar="FILE", help="the quantized file")
    compare.add_argument("--html", metavar="FILE", help="write the report as one HTML page")
    compare.add_argument("--json", metavar="FILE", help="write the report as JSON")
    compare.add_argument("--plan", metavar="FILE", help="the plan that the file was made by")
    _add_text_options(compare)
    compare.set_defaults(run=_compare)

    bench = add_command("bench", "measure against other libraries and the machine's limits")
    if "bench" in given:
        from qkernels import bench as bench_package

        bench_package.add_arguments(bench)
        bench.set_defaults(run=bench_package.run)
    return parser


def _add_text_options(command: argparse.ArgumentParser) -> None:
    """What inputs a model is called on."""
    command.add_argument(
        "--text", required=True, metavar="FILE", help="a text file; every line is one input"
    )
    command.add_argument("--batch-size", type=int, default=16, metavar="N", help="default: 16")
    command.add_argument(
        "--max-length", type=int, default=128, metavar="N", help="tokens of a line (default: 128)"
    )
    command.add_argument(
        "--lines", type=int, default=512, metavar="N", help="read at most N lines (default: 512)"
    )


def _doctor(options: argparse.Namespace) -> int:
    from qkernels.doctor import doctor

    found = doctor()
    if options.json:
        import json

        print(json.dumps(found.to_dict(), indent=2))
    else:
        found.print()
    return 1 if found.broken else 0


def _quantize(options: argparse.Namespace) -> int:
    from qkernels import commands

    return commands.quantize_folder(
        options.model, options.scheme, options.group_size, options.ignore, options.out, options.plan
    )


def _search(options: argparse.Namespace) -> int:
    from qkernels import commands

    return commands.search_folder(
        options.model,
        options.text,
        options.budget,
        options.objective,
        options.out,
        batch_size=options.batch_size,
        max_length=options.max_length,
        lines=options.lines,
        seconds=options.seconds,
        plot=options.plot,
        checkpoint=options.checkpoint,
    )


def _inspect(options: argparse.Namespace) -> int:
    from qkernels import commands

    return commands.inspect_file(options.file, as_json=options.json)


def _compare(options: argparse.Namespace) -> int:
    from qkernels import commands

    return commands.compare_with_folder(
        options.model,
        options.file,
        options.text,
        batch_size=options.batch_size,
        max_length=options.max_length,
        lines=options.lines,
        html=options.html,
        json=options.json,
        plan=options.plan,
    )
