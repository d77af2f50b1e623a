"""Printing for people: one console with the same manners everywhere."""

from __future__ import annotations

import io
import sys

from rich.console import Console, RenderableType

# A pipe or a log file has no width of its own to fold tables into.
WIDTH_WITHOUT_TERMINAL = 120


def console() -> Console:
    """A console on stdout: the terminal's width and colours, or plain text into a pipe."""
    width = None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL
    return Console(width=width, highlight=False)


def plain_text(renderable: RenderableType) -> str:
    """What a console would print, as text without colours.

    Args:
        renderable: anything that rich prints.
    """
    output = io.StringIO()
    Console(file=output, width=WIDTH_WITHOUT_TERMINAL, color_system=None).print(renderable)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines())
