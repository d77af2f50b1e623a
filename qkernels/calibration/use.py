"""Whether a calibration has what a static layer needs, and what there is to say about it."""

from __future__ import annotations

from collections.abc import Iterable

from qkernels.calibration.result import Calibration, LayerRanges
from qkernels.schemes import Scheme


def ranges_of(calibration: Calibration, names: Iterable[str]) -> LayerRanges | None:
    """The ranges of a module, under whichever of its names it was calibrated, or None.

    Args:
        calibration: ranges by name.
        names: all qualified names of the module.
    """
    return next((calibration[name] for name in names if name in calibration), None)


def why_no_range(
    calibration: Calibration | None, names: Iterable[str], scheme: Scheme
) -> str | None:
    """Why a layer cannot have a static scheme, or None if its input range is known.

    Args:
        calibration: ranges by name, or None if none was given.
        names: all qualified names of the layer.
        scheme: a static one.
    """
    if calibration is None:
        return (
            f"{scheme} needs the measured range of its input; pass "
            "calibration=qk.calibrate(model, batches), or use a scheme that is not static"
        )
    ranges = ranges_of(calibration, names)
    if ranges is None:
        return (
            f"{scheme} needs the range of its input, but the calibration has no layer of this "
            "name; calibrate this very model, and if you pass modules, let them name it"
        )
    if ranges.input.symmetric is None:
        what = "it never ran" if ranges.calls == 0 else f"its input {ranges.input.note}"
        return (
            f"{scheme} needs the range of its input, but in calibration {what}; calibrate with "
            "batches that bring it finite numbers"
        )
    return None


def what_to_note(calibration: Calibration, names: Iterable[str]) -> str:
    """What a summary should say of a layer's calibration, or nothing.

    Args:
        calibration: ranges by name.
        names: all qualified names of the layer.
    """
    ranges = ranges_of(calibration, names)
    note = "" if ranges is None else ranges.input.note
    return f"in calibration its input {note}" if note else ""
