"""Vectors in hand-written TensorIR: their types, their indices, and the word that the mask of a compare is."""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from horq_tvm.ops import WORD_BITS

PARALLEL_WORK = 1 << 16  # inner operations under which sharing a loop out costs more than it brings


def shared(extent: int, work: int) -> T.frame.ForFrame:
    """A loop of `work` inner operations in all: in parallel where that pays."""
    return T.parallel(extent) if extent > 1 and work >= PARALLEL_WORK else T.serial(extent)


def vector(dtype: str, lanes: int) -> str:
    """The name of the type."""
    return f"{dtype}x{lanes}" if lanes > 1 else dtype


def span(offset: tirx.Expr | int, lanes: int) -> tirx.Expr | int:
    """The index of `lanes` elements from `offset` on, with an index type of its own where that is an expression."""
    return T.Ramp(offset, _one(offset), lanes) if lanes > 1 else offset


def _one(offset: tirx.Expr | int) -> tirx.Expr | int:
    return 1 if isinstance(offset, int) else tirx.const(1, str(offset.ty.dtype))


def splat(value: tirx.Expr, lanes: int) -> tirx.Expr:
    """`value` in every lane."""
    return T.Broadcast(value, lanes) if lanes > 1 else value


def mask(positive: tirx.Expr, lanes: int) -> tirx.Expr:
    """One bit a lane, in the low bits of a uint32."""
    if lanes == 1:
        return tirx.Cast("uint32", positive)
    word = T.reinterpret(f"uint{lanes}", tirx.Cast(f"uint1x{lanes}", positive))
    return word if lanes == WORD_BITS else tirx.Cast("uint32", word)


def tail_lanes(bits: int) -> list[tuple[int, int]]:
    """Offsets and lanes that cover `bits` elements: whole masks while they fit, then single bits."""
    found, offset = [], 0
    for lanes in (WORD_BITS, 16, 8):
        while bits - offset >= lanes:
            found.append((offset, lanes))
            offset += lanes
    return found + [(rest, 1) for rest in range(offset, bits)]
