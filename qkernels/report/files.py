"""Writing result files so that nobody ever reads half of one."""

from __future__ import annotations

import os
import tempfile
from os import PathLike
from pathlib import Path


def write_atomically(path: str | PathLike[str], text: str) -> None:
    """Write text as UTF-8 to a file that is replaced as a whole, or left as it was.

    Args:
        path: the file to write; its folder must exist.
        text: the whole content.

    Raises:
        OSError: the folder does not exist, or the file cannot be written.

    Example:
        >>> write_atomically(folder / "hello.txt", "hello")
    """
    target = Path(path)
    check_folder(target)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        temporary.chmod(0o666 & ~_umask())  # mkstemp's 0600 is for secrets; a report is not one
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_folder(path: str | PathLike[str]) -> None:
    """Refuse a file that cannot be written later, before the work for it starts.

    Args:
        path: a file to write.

    Raises:
        FileNotFoundError: its folder does not exist.
        IsADirectoryError: it is a folder itself.
        PermissionError: its folder may not be written to.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"cannot write '{target}': folder '{target.parent}' does not exist; create it first"
        )
    if target.is_dir():
        raise IsADirectoryError(f"cannot write '{target}': it is a folder; give a file's name")
    if not os.access(target.parent, os.W_OK):
        raise PermissionError(
            f"cannot write '{target}': there is no permission to write to folder "
            f"'{target.parent}'; choose another"
        )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
