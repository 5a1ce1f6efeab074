"""Input shapes: what a model leaves open and what the caller gives for it, the same words for ONNX and PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import UsageError

OpenShape = Sequence[int | str]
"""Extents, an open one by the name that the model has for it or "?"."""


def fix_shapes(
    found: Mapping[str, OpenShape | None], given: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """A static shape for each input of `found`, whose value is None for an input of unknown rank.

    Raises UsageError where a shape is missing, belongs to no input, or does not fit what the model says.
    """
    for name in given:
        if name not in found:
            raise UsageError(f"--input {name}: found no such input; accepted are {', '.join(found)}")
    return {name: _fix(name, extents, given.get(name)) for name, extents in found.items()}


def _fix(name: str, found: OpenShape | None, given: tuple[int, ...] | None) -> tuple[int, ...]:
    if given is None:
        fixed = tuple(extent for extent in found or () if isinstance(extent, int))
        if found is None or len(fixed) != len(found):
            raise UsageError(_missing(name, found))
        return fixed
    fits = found is None or (
        len(given) == len(found)
        and all(isinstance(old, str) or old == new for old, new in zip(found, given, strict=True))
    )
    if not fits or any(extent < 1 for extent in given):
        shown = "positive extents" if found is None else f"a shape that fits {_extents(found)}"
        raise UsageError(f"--input {name}: found {_extents(given)}; accepted is {shown}")
    return given


def _missing(name: str, found: OpenShape | None) -> str:
    shown = "no shape at all" if found is None else f"the shape {_extents(found)}"
    example = "1,3,224,224" if found is None else ",".join(str(e) if isinstance(e, int) else "1" for e in found)
    return f"input {name!r}: found {shown}; accepted are static shapes, so give it, e.g. --input {name}={example}"


def _extents(extents: OpenShape) -> str:
    return ",".join(str(extent) for extent in extents) or "()"
