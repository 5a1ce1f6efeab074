"""Sums of magnitudes as exact as design.md asks (1e-6 of their mean), at the speed of float32 vectors.

A float32 lane is rounded at most `ROUNDINGS` times, then it is added to a float64 lane. No term is negative, so the sum
is off by at most 15·2⁻²⁴ = 8.9e-7 of itself, and by a tenth of that as a rule; the mean is rounded once more, by 2⁻²⁴.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from .lanes import span, splat, vector

ROUNDINGS = 15
WIDE = 16  # float64 lanes of a total
NARROW = 8  # and of a sum that is kept


class MeanOfMagnitudes:
    """Emits the code of one mean; its buffers belong to the sblock in which it is made.

    `clear`, then `add` for every term, with a `flush` at the end of each stretch of straight-line code, then `total` or
    `store`. Terms go to `ways` accumulators in turn, so that none waits for the addition before it.
    """

    def __init__(self, widths: Iterable[int], ways: int = 1) -> None:
        def buffers(dtype: str, lanes: Iterable[int]) -> dict[int, tirx.Buffer]:
            return {n: T.sblock_alloc_buffer((n,), dtype) for n in lanes}

        widths = sorted(widths)
        self._parts = [buffers("float32", widths) for _ in range(ways)]
        self._totals = buffers("float64", sorted({min(lanes, WIDE) for lanes in widths}))
        self._sum: list[tirx.Buffer] = []
        self._added = dict.fromkeys(widths, 0)
        # What a way takes before the ways are added up; a wide vector is folded besides.
        self._limit = ROUNDINGS if ways == 1 else ROUNDINGS // 2 - (ways - 1).bit_length() + 1

    def clear(self) -> None:
        for lanes, total in self._totals.items():
            T.buffer_store(total, splat(tirx.const(0.0, "float64"), lanes), [span(0, lanes)])

    def add(self, value: tirx.Expr, lanes: int, where: tirx.Expr | None = None) -> None:
        """`value` float32 of `lanes`, not negative; only `where` that is true, lane by lane."""
        ways = len(self._parts)
        part, at = self._parts[self._added[lanes] % ways][lanes], span(0, lanes)
        if self._added[lanes] < ways:
            before, after = splat(tirx.const(0.0, "float32"), lanes), value
        else:
            before, after = part[at], part[at] + value
        T.buffer_store(part, after if where is None else tirx.Select(where, after, before), [at])
        self._added[lanes] += 1
        if self._added[lanes] == ways * self._limit:
            self.flush()

    def flush(self) -> None:
        """What the float32 lanes hold goes to the float64 lanes."""
        for lanes, added in self._added.items():
            self._added[lanes] = 0
            if not added:
                continue
            wide = min(lanes, WIDE)
            terms = [part[lanes][span(0, lanes)] for part in self._parts[:added]]
            if len(terms) > 1:
                T.buffer_store(self._parts[0][lanes], pairwise(terms), [span(0, lanes)])
            value = self._parts[0][lanes][span(0, wide)]
            if lanes > wide:
                value = value + self._parts[0][lanes][span(wide, wide)]
            total, at = self._totals[wide], span(0, wide)
            T.buffer_store(total, total[at] + tirx.Cast(vector("float64", wide), value), [at])

    def store(self, into: tirx.Buffer, row: tirx.Expr | int) -> None:
        """The sum, in the lanes of a row of `into`, for `across` to add up."""
        lanes = int(into.shape[1])
        terms = [total[span(0, n)] for n, total in self._totals.items() if n == lanes]
        if WIDE in self._totals:
            terms += [self._totals[WIDE][span(at, NARROW)] for at in (0, NARROW)]
        T.buffer_store(into, pairwise(terms), [row, span(0, lanes)])
        if lanes > 1 and 1 in self._totals:
            T.buffer_store(into, into[row, 0] + self._totals[1][0], [row, 0])

    def total(self) -> tirx.Expr:
        """The sum, float64."""
        lanes = min(NARROW, max(self._totals))
        if not self._sum:
            self._sum.append(T.sblock_alloc_buffer((1, lanes), "float64"))
        self.store(self._sum[0], 0)
        return across(self._sum[0], 0, lanes)


def across(partial: tirx.Buffer, row: tirx.Expr | int, lanes: int) -> tirx.Expr:
    """The sum over the lanes of a row, by halves."""
    while lanes > 1:
        half = lanes // 2
        value = partial[row, span(0, half)] + partial[row, span(half, half)]
        if half == 1:
            return value
        folded = T.sblock_alloc_buffer((1, half), "float64")
        T.buffer_store(folded, value, [0, span(0, half)])
        partial, row, lanes = folded, 0, half
    return partial[row, 0]


def pairwise(terms: Sequence[tirx.Expr]) -> tirx.Expr:
    """The sum, by pairs: the shortest dependences, and the fewest roundings on the way of a term."""
    while len(terms) > 1:
        pairs = zip(terms[::2], terms[1::2], strict=False)
        terms = [*(a + b for a, b in pairs), *terms[len(terms) & ~1 :]]
    return terms[0]
