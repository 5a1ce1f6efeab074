"""Results for people and for scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from horq_tvm.files import replacing

if TYPE_CHECKING:
    import numpy as np

SHOWN_VALUES = 8


def write_json(destination: str, value: Any) -> None:
    """`value` to a file, or to standard output for `-`."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if destination == "-":
        sys.stdout.write(text)
        return
    with replacing(destination) as partial:
        partial.write_text(text, encoding="utf-8")


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns aligned by spaces, numbers to the right."""
    cells = [[("-" if value is None else str(value)) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    right = [
        bool(rows) and all(isinstance(row[i], (int, float, type(None))) for row in rows) for i in range(len(columns))
    ]

    def line(row: Sequence[str]) -> str:
        parts = (cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True))
        return "  ".join(parts).rstrip()

    return "\n".join(line(row) for row in [list(columns), *cells])


def shape_text(shape: Sequence[int]) -> str:
    """1x3x224x224."""
    return "x".join(map(str, shape)) or "scalar"


def first_values(array: np.ndarray) -> str:
    """The first eight: floats to six digits, integers whole."""
    values = [f"{value:.6g}" if array.dtype.kind == "f" else str(value) for value in array.ravel()[:SHOWN_VALUES]]
    return " ".join(values) + (" ..." if array.size > SHOWN_VALUES else "")


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A function that says what is being done: a spinner where standard error is a terminal and rich is there."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    try:
        from rich.console import Console
    except ImportError:
        yield lambda message: print(f"{message} ...", file=sys.stderr)
        return
    with Console(stderr=True).status("starting") as status:
        yield status.update


def version() -> str:
    """The installed version; of a tree that is not installed, `0+unknown`."""
    from importlib import metadata

    try:
        return metadata.version("horq-tvm")
    except metadata.PackageNotFoundError:
        return "0+unknown"
