"""What both kernels of scale `patch` know: the shapes, and how the channels of a window are gone through."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from horq_tvm.ops import WORD_BITS, Geometry, words_of

from ..lanes import mask, tail_lanes

UNROLLED = 96  # residuals of a word in one stretch of straight-line code
TILE = 14  # windows or pixels at most: their sums are on the stack, 64 bytes each
RUN = 8  # words that are unrolled where a pixel has more than fit
ZERO = tirx.const(0.0, "float32")

Index: TypeAlias = "tirx.Expr | int"


@dataclass(frozen=True)
class Patch:
    """The im2col rows of one layer as plain numbers. `image` is [N,H,W,C]."""

    image: tuple[int, int, int, int]
    order: int
    first: int
    geometry: Geometry

    @property
    def depth(self) -> int:
        """Channels of a group."""
        return self.image[3] // self.geometry.groups

    @property
    def words(self) -> int:
        """Words of a pixel's group."""
        return words_of(self.depth)

    @property
    def magnitudes(self) -> bool:
        """Whether there is one plane that depends on the window: it takes but the magnitudes of the values."""
        return self.order == 2

    @property
    def length(self) -> int:
        """L, the elements of a row."""
        return self.geometry.kernel[0] * self.geometry.kernel[1] * self.depth

    @property
    def out(self) -> tuple[int, int, int, int]:
        """[N,HO,WO,G]."""
        batch, height, width, _ = self.image
        return (batch, *self.geometry.output_size(height, width), self.geometry.groups)

    @property
    def padded(self) -> tuple[int, int, int]:
        """[N,H+t+b,W+l+r]."""
        batch, height, width, _ = self.image
        top, left, bottom, right = self.geometry.padding
        return (batch, height + top + bottom, width + left + right)

    @property
    def found(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type of what the first kernel hands to the second.

        sums     [N,H+t+b,W+l+r,G]: Σ|x| of each pixel's group
        signs    [N,H+t+b,(W+l+r)·G·words], the words of neighbouring pixels neighbours
        values   [N,H+t+b,W+l+r,C], where a plane depends on more than signs
        """
        batch, height, width = self.padded
        shapes: dict[str, tuple[tuple[int, ...], str]] = {
            "sums": ((*self.padded, self.geometry.groups), "float64"),
            "signs": ((batch, height, width * self.geometry.groups * self.words), "uint32"),
        }
        return shapes | ({"values": ((*self.padded, self.image[3]), "float32")} if self.order > 1 else {})

    @property
    def beta_shape(self) -> tuple[int, ...]:
        return (*self.out, self.order)

    @property
    def planes_shape(self) -> tuple[int, ...]:
        return (*self.out, self.order - self.first, self.geometry.kernel[0] * self.geometry.kernel[1] * self.words)


@dataclass(frozen=True)
class Piece:
    """Neighbouring channels of a group that are one word of a plane, or a part of its last word."""

    word: Index
    shift: int
    lanes: int

    @property
    def channel(self) -> Index:
        return self.word * WORD_BITS + self.shift


def rest_of(depth: int) -> list[Piece]:
    """What covers the channels behind the last whole word."""
    word, left = divmod(depth, WORD_BITS)
    return [Piece(word, shift, lanes) for shift, lanes in tail_lanes(left)]


def widths(depth: int) -> set[int]:
    return {piece.lanes for piece in rest_of(depth)} | ({WORD_BITS} if depth >= WORD_BITS else set())


Visit: TypeAlias = "Callable[[Index, Index, Piece], None]"


def walk(visit: Visit, kernel: tuple[int, int], depth: int, limit: int, after: Callable[[], None]) -> None:
    """`visit` for every piece of a window, about `limit` of them in a stretch of unrolled code, `after` behind each."""
    (kh, kw), full, tail = kernel, depth // WORD_BITS, rest_of(depth)
    whole = [Piece(word, 0, WORD_BITS) for word in range(full)]
    words = full + len(tail)

    def stretch(rows: Sequence[Index], columns: Sequence[Index], pieces: Sequence[Piece]) -> None:
        for ry in rows:
            for rx in columns:
                for piece in pieces:
                    visit(ry, rx, piece)
        after()

    if kh * kw * words <= limit:
        stretch(range(kh), range(kw), whole + tail)
    elif kw * words <= limit:
        with T.serial(kh) as ry:
            stretch([ry], range(kw), whole + tail)
    else:
        with T.grid(kh, kw) as (ry, rx):
            if words <= limit:
                stretch([ry], [rx], whole + tail)
                return
            if full >= RUN:
                with T.serial(full // RUN) as run:
                    stretch([ry], [rx], [Piece(run * RUN + i, 0, WORD_BITS) for i in range(RUN)])
            rest = whole[full - full % RUN :] + tail
            if rest:
                stretch([ry], [rx], rest)


def whole(buffer: tirx.Buffer, *prefix: Index) -> tuple[Index | slice, ...]:
    """The index of all that stands under `prefix`."""
    return (*prefix, *(slice(0, extent) for extent in buffer.shape[len(prefix) :]))


def split(index: tirx.Expr, groups: int) -> tuple[Index, Index]:
    """A position and its group."""
    return (index, 0) if groups == 1 else (tirx.floordiv(index, groups), tirx.floormod(index, groups))


@contextmanager
def tiles(count: int) -> Iterator[tuple[tirx.Expr, int]]:
    """A loop over tiles of `count` things, and an sblock for their buffers: (the first of a tile, how many).

    As many as there may be, without a rest where that is possible.
    """
    size = max((s for s in range(4, TILE + 1) if count % s == 0), default=min(count, TILE))
    with T.serial(-(-count // size)) as number, T.sblock("tile"):
        yield number * size, size


@contextmanager
def each_of(begin: tirx.Expr, size: int, count: int) -> Iterator[tuple[tirx.Expr, tirx.Expr]]:
    """A loop over a tile: (the number in the tile, the index). Beyond `count` nothing is done."""
    with T.serial(size) as i:
        if count % size == 0:
            yield i, begin + i
        else:
            with T.If(begin + i < count), T.Then():
                yield i, begin + i


def slots(depth: int) -> dict[int, tirx.Buffer]:
    """For what a statement needs of the one before it: a name would be walked 2^K times by TVM's code generator."""
    return {lanes: T.sblock_alloc_buffer((lanes,), "float32") for lanes in sorted(widths(depth))}


class Words:
    """Puts comparisons together to words of a plane."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._pending: list[tirx.Expr] = []

    def put(self, bits: tirx.Expr, piece: Piece) -> tirx.Expr | None:
        """The word, once all its bits are there."""
        word = mask(bits, piece.lanes)
        self._pending.append(T.bind(word << tirx.const(piece.shift, "uint32") if piece.shift else word))
        if piece.lanes < WORD_BITS and piece.word * WORD_BITS + piece.shift + piece.lanes < self._depth:
            return None
        word = self._pending[0]
        for more in self._pending[1:]:
            word = word | more
        self._pending = []
        return T.bind(word)
