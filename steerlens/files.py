"""Files that are written whole or not at all, and those that ship beside the recipes."""

from __future__ import annotations

import os
import tempfile
from importlib import resources
from pathlib import Path


def here_or_shipped(file: str) -> Path:
    """The file of that path; a bare name that is not here may be one that ships beside the recipes."""
    path = Path(file)
    if not path.exists() and path.name == file:
        shipped = resources.files("steerlens.recipes") / file
        if isinstance(shipped, Path) and shipped.is_file():
            return shipped
    return path


def check(path: Path) -> None:
    """Raise `FileNotFoundError` or `IsADirectoryError`, naming the file, if it has no folder or is one."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file")


def write(path: Path, content: str | bytes) -> None:
    """Put `content` into the file; a reader sees the old file or the new one, never a part.

    Raises:
        FileNotFoundError, IsADirectoryError: as `check`.
    """
    check(path)
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes it private to the user; this gets the permissions of any new file
        mask = os.umask(0)
        os.umask(mask)
        Path(temporary).chmod(0o666 & ~mask)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
