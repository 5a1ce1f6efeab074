"""How the weights of a bitserial layer lie in memory, so that the target's instructions can read them in vectors."""

from __future__ import annotations

from dataclasses import dataclass

from horq_tvm.ops.packed import Style
from horq_tvm.targets import Target

from . import neon, nibble, tile

MMA_FILTERS = 8  # columns of a product on tensor cores: a group is filled up to a multiple
NIBBLE_POPCOUNTS = frozenset({"avx512bw", "avx2", "ssse3"})


@dataclass(frozen=True)
class WeightLayout:
    """`lanes` output channels side by side, in the style of `horq.packed_bitserial`."""

    style: Style
    lanes: int


def bitserial(target: Target, filters: int, groups: int, row: int) -> WeightLayout:
    """The layout of a layer of `filters` per group, whose outputs each sum over `row` elements.

    Nibbles where the target counts bits with a byte shuffle: a vector holds a byte a filter then. Where no such vector
    divides a group, or a row is too long for the 16-bit sums, the layer keeps whole words, which any target can count.
    NEON counts words. Tensor cores take rows of words, unless a group has fewer filters than one of their products.
    """
    if target.family == "cuda" and filters >= MMA_FILTERS:
        return WeightLayout("mma", MMA_FILTERS)
    if target.popcount in NIBBLE_POPCOUNTS and row <= nibble.MAX_ROW:
        lanes = _byte_lanes(filters, groups, target.vector_bits // 8)
        if lanes:
            return WeightLayout("nibbles", lanes)
    lanes = tile.lanes(filters, groups, target.vector_bits)
    if target.popcount == "cnt" and lanes == neon.LANES and row <= neon.MAX_ROW:
        return WeightLayout("uadalp" if target.architecture == "aarch64" else "vpadal", lanes)
    return WeightLayout("words", lanes)


def _byte_lanes(filters: int, groups: int, widest: int) -> int:
    """Filters in a vector of bytes, 0 where any would cross a group; few filters take the narrowest that holds them."""
    widths = [v for v in nibble.SHUFFLES if v <= widest]
    if groups > 1:
        return max((v for v in widths if filters % v == 0), default=0)
    return next((v for v in widths if v >= filters), widest)
