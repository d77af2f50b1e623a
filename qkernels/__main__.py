"""`python -m qkernels` is the command `qkernels`."""

from qkernels.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
