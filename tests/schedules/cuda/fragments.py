"""The fragments of `mma` of single bits in NumPy: which bit of which matrix each register of each lane holds.

From the tables of the PTX ISA, "Matrix Fragments for mma.m16n8k256" and "... for mma.m8n8k128" of type .b1, with
groupID = lane / 4 and threadID_in_group = lane % 4. A fragment is bool [32, bits] (A, B) or int32 [32, values] (C).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Place = Callable[[Array, Array, Array], tuple[Array, Array]]
"""(groupID, threadID_in_group, i) → row and column of element i."""

LANES = 32


@dataclass(frozen=True)
class Fragments:
    """One shape of `mma`: m, n, k, and where a lane's elements lie in A [m,k], B [k,n] and C [m,n]."""

    shape: tuple[int, int, int]
    a: Place
    b: Place
    c: Place

    def table(self, matrix: str) -> tuple[Array, Array]:
        """Rows and columns of a matrix's elements, int [32, elements of a lane] each."""
        m, n, k = self.shape
        elements = {"a": m * k, "b": k * n, "c": m * n}[matrix] // LANES
        lane, i = np.arange(LANES)[:, None], np.arange(elements)[None]
        return np.broadcast_arrays(*getattr(self, matrix)(lane // 4, lane % 4, i))  # type: ignore[return-value]

    def split(self, matrix: str, values: Array) -> Array:
        """A matrix [...,rows,columns] as fragments [...,32,elements]."""
        rows, columns = self.table(matrix)
        return values[..., rows, columns]

    def join(self, matrix: str, fragments: Array) -> Array:
        """Fragments as the matrix."""
        rows, columns = self.table(matrix)
        values = np.zeros((*fragments.shape[:-2], rows.max() + 1, columns.max() + 1), fragments.dtype)
        values[..., rows, columns] = fragments
        return values

    def mma(self, operation: Callable[[Array, Array], Array], a: Array, b: Array, c: Array) -> Array:
        """C + popcount(operation(row of A, column of B)), all of them fragments."""
        rows, columns = self.join("a", a), self.join("b", b)
        return c + self.split("c", counts(operation, rows, columns))


M16N8K256 = Fragments(
    (16, 8, 256),
    a=lambda group, member, i: (
        group + 8 * (((i >= 32) & (i < 64)) | (i >= 96)),
        member * 32 + (i & 31) + 128 * (i >= 64),
    ),
    b=lambda group, member, i: (member * 32 + (i & 31) + 128 * (i >= 32), group),
    c=lambda group, member, i: (group + 8 * (i >= 2), member * 2 + (i & 1)),
)
M8N8K128 = Fragments(
    (8, 8, 128),
    a=lambda group, member, i: (group, member * 32 + i),
    b=lambda group, member, i: (member * 32 + i, group),
    c=lambda group, member, i: (group, member * 2 + i),
)


def counts(operation: Callable[[Array, Array], Array], a: Array, b: Array) -> Array:
    """The plain product: bool A [...,m,k] and B [...,k,n] → int32 [...,m,n], popcount(operation(A_m, B_n))."""
    pairs = operation(a[..., :, None, :], np.swapaxes(b, -1, -2)[..., None, :, :])
    return pairs.sum(-1, dtype="int32")


def registers(fragment: Array) -> Array:
    """bool [...,bits] → uint32 [...,bits / 32], bit i % 32 of register i / 32."""
    return np.packbits(fragment, axis=-1, bitorder="little").view("<u4")
