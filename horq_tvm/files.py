"""Writing a file whole or not at all. Standard library only."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from horq_tvm.errors import HorqError, UsageError


def check_writable(path: str | Path, *, sources: Iterable[str | Path | None] = ()) -> None:
    """Before long work: a file can be made at `path`, and it is none of the `sources`, whose place it would take.

    Raises:
        UsageError: it is one of the sources.
        HorqError: it is a folder or a device, or its folder is missing or not writable.
    """
    out = _real(path)
    if any(source is not None and _real(source) == out for source in sources):
        raise UsageError(f"cannot write {path}: the call names it twice; accepted: a name of its own")
    folder = out.parent
    if out.exists() and not out.is_file():
        kind = "a folder" if out.is_dir() else "a device or pipe, which a file would take the place of"
        raise HorqError(f"cannot write {path}: it is {kind}; accepted: the name of a file")
    if not folder.is_dir():
        raise HorqError(f"cannot write {path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise HorqError(f"cannot write {path}: the folder {folder} is not writable")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place when the block ends well and vanishes when it does not.

    Raises:
        HorqError: `path` cannot be written; before the block runs where that can be known.
    """
    check_writable(path)
    out = _real(path)
    partial: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.", suffix=".tmp")
        os.close(handle)
        partial = Path(name)
        # mkstemp's file is private to its owner; made anew it has the permissions of any new file.
        partial.unlink()
        yield partial
        partial.replace(out)
    except OSError as error:
        raise HorqError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def _real(path: str | Path) -> Path:
    """Where a link leads, so that the file is replaced and not the link."""
    return Path(os.path.realpath(path))
