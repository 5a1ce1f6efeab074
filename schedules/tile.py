"""The analytic model behind the default tile of a direct convolution.

A tile is px output pixels of one row times q vectors of v output channels, its accumulators in registers. One step of
the reduction loads q weight vectors and px activations (broadcast) for px·q multiply-accumulates. The model scores a
tile by the work it wastes at the borders, by its loads per multiply-accumulate, and by whether its accumulators hide
the latency of the instruction that feeds them; the smallest score wins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

from .decisions import Decide, by_default

STACK_BYTES = 1024  # TVM keeps a buffer on the stack, and LLVM in registers, only below this
CHUNKS = 8  # chunks of rows a thread pool can share out evenly


@dataclass(frozen=True)
class Tile:
    """px pixels × q vectors; `rows` output rows to a unit of parallel work.

    `row`: the tiles of a row are written out one by one, so that the last one is as wide as what is left.
    """

    px: int
    q: int
    rows: int
    row: bool = False


@dataclass(frozen=True)
class Loop:
    """What the model needs to know of a direct convolution: its extents and its register budget."""

    height: int
    width: int
    blocks: int  # vectors of output channels in a group
    lanes: int
    registers: int  # vector registers that may hold accumulators, weights and one broadcast
    latency: int  # independent accumulators that hide the latency of the multiply-accumulate
    q_multiple: int = 1  # a fused binarisation packs whole words
    per_step: float = 1.0  # cycles of the core's vector pipes for one multiply-accumulate
    split: bool = False  # weights come a nibble a byte (nibble.py)


def candidates(loop: Loop) -> list[Tile]:
    """Every tile that fits the registers; a tile of channels divides its group, so that none is computed twice."""
    found = []
    for q in range(1, loop.blocks + 1):
        if loop.blocks % q or q % loop.q_multiple:
            continue
        for px in range(1, loop.width + 1):
            accumulators = px * q
            if accumulators * loop.lanes * 4 >= STACK_BYTES or accumulators + q + 1 > loop.registers:
                break
            found.append(Tile(px, q, rows(loop.height)))
    return found


def rows(height: int) -> int:
    return max(1, ceil(height / CHUNKS))


def score(loop: Loop, tile: Tile) -> float:
    """Relative cost of an output; 1 is the bound of the vector pipes alone."""
    waste = ceil(loop.width / tile.px) * tile.px / loop.width
    ragged = 1.02 if loop.width % tile.px else 1.0  # a second copy of the loop nest for the rest of the row
    accumulators = tile.px * tile.q
    latency = max(1.0, loop.latency / accumulators)
    loads = (tile.px + tile.q) / accumulators / 2 / loop.per_step  # two loads a cycle
    return waste * ragged * max(latency, loads) + 0.5 * loads + 0.01 / accumulators


def choose(loop: Loop, decide: Decide = by_default) -> Tile:
    """The tile that `decide` takes; by default that of the smallest score."""
    return decided(loop, candidates(loop), lambda tile: score(loop, tile), decide)


def decided(loop: Loop, fitting: Sequence[Tile], cost: Callable[[Tile], float], decide: Decide) -> Tile:
    """One of the tiles, the cheapest by default. There always is one: a single pixel times the smallest allowed q."""
    fitting = fitting or [Tile(1, loop.q_multiple, rows(loop.height))]
    best = min(fitting, key=cost)
    q = decide("q", sorted({tile.q for tile in fitting}), best.q)
    as_wide = [tile for tile in fitting if tile.q == q]
    px = decide("px", [tile.px for tile in as_wide], min(as_wide, key=cost).px)
    return Tile(px, q, decide("rows", _units(loop.height, best.rows), best.rows))


def _units(height: int, default: int) -> list[int]:
    """Rows to a unit of parallel work: what a thread takes at a time, and how long a tile's weights stay."""
    return sorted({default, *(r for r in (1, 2, 4, 8, 16, height) if r <= height)})


def lanes(filters: int, groups: int, vector_bits: int) -> int:
    """v: output channels side by side in a vector. With groups, a vector never crosses one."""
    widest = vector_bits // 32
    if groups == 1:
        return widest
    while filters % widest:
        widest //= 2
    return widest
