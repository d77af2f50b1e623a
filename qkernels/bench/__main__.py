"""`python -m qkernels.bench` is `qkernels bench`; the suite starts parts of itself that way."""

import argparse

from qkernels.bench.command import add_arguments, run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="qkernels bench", description=__doc__)
    add_arguments(parser)
    raise SystemExit(run(parser.parse_args()))
