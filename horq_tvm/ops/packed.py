"""The ops that a kernel implements: constants packed for the target's vectors, padding done, integers prepared.

`horq.packed_bitserial`, `horq.packed_conv2d` (float) and `horq.packed_depthwise` (float). The layout of weights is
`[G, ⌈F/G/v⌉, kh, kw, c, v]`, v lanes of output channels side by side, filters beyond F/G zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tvm import relax

from .geometry import Geometry
from .registry import call, register, shape_of, tensor

Style = Literal["words", "nibbles", "uadalp", "vpadal", "mma"]
"""How bits lie in memory for the instruction that counts them."""
STEP_WORDS = 8
"""Words of a row that one instruction of style `mma` counts: 256 bits."""


@dataclass(frozen=True)
class BorderClasses:
    """Output rows (or columns) by which taps of their window are real.

    Row y has class min(y, low) + max(y − high, 0): each row before `low` and after `high` is a class of its own, those
    in between see every tap.
    """

    low: int
    high: int
    count: int

    @classmethod
    def along(cls, size: int, out: int, kernel: int, stride: int, before: int, dilation: int) -> BorderClasses:
        """Classes of `out` outputs over an input of `size` elements with `before` padded ones in front."""
        span = dilation * (kernel - 1)
        inner = [y for y in range(out) if y * stride - before >= 0 and y * stride - before + span < size]
        low, high = (inner[0], inner[-1]) if inner else (out - 1, out - 1)
        return cls(low, high, low + 1 + (out - 1 - high))

    def representative(self, index: int) -> int:
        """An output position of class `index`."""
        return index if index <= self.low else self.high + index - self.low


def _infer_bitserial(expr: relax.Call) -> relax.TensorType:
    batch, height, width, *_ = shape_of(expr.args[0])
    out = Geometry.of(expr.attrs).output_size(height, width)
    return tensor((batch, *out, int(expr.attrs["channels"])), "float32")


PACKED_BITSERIAL = register("horq.packed_bitserial", -1, _infer_bitserial)


def packed_bitserial(
    planes: relax.Expr,
    weight: relax.Expr,
    start: relax.Expr,
    factors: Sequence[relax.Expr],
    *,
    name: str,
    order: int,
    first: int,
    scale: str,
    geometry: Geometry,
    channels: int,
    halved: bool,
    rows: BorderClasses,
    columns: BorderClasses,
    style: Style = "words",
    table: relax.Expr | None = None,
) -> relax.Call:
    """planes uint32 [N,H+t+b,W+l+r,G,P,words] (for `patch` the rows, geometry then 1×1), geometry without padding.

    Style `mma` takes planes uint32 [N,H,W,G,P,words] and the geometry with its padding, which reads as zeros.

    weight   B = ⌈F/G/v⌉, by style: `words` uint32 [G,B,kh,kw,words,v], a word a lane; so `uadalp` and
             `vpadal`, v = 4, for NEON's own instructions, see `neon.py`; `nibbles` uint8 [G,B,4·kh·kw·words,v], the
             bytes of these words, eight channels each, lanes as `nibble.lane_order` has them
             (or [G,B,4·kh·kw·words,2,v], what `horq.split_nibbles` makes of these); `mma` uint32 [G,B·v,depth], the
             kh·kw·words words of a filter side by side, zeros up to a depth of whole 256-bit steps
    start    int32 [R,C,G,B·v]: what the sum of popcounts starts from, by border class
    factors  `static`: scale float32 [P,F] and addend float32 [R',C',F] (R' = C' = 1 unless the first plane is constant)
             else: alpha float32 [F], bias float32 [F], beta, and for first = 1 first_sum float32 [R,C,F]
    table    for `nibbles`: uint8 [256,2,16], `nibble.table`; the last operand

    halved: acc = start + Σ popcount is −S/2, and the factor −2 sits in scale, alpha (and −1/2 in first_sum); exact.
    Otherwise (some S is odd) S = start − 2·Σ popcount is formed as an integer.
    """
    return call(
        PACKED_BITSERIAL,
        [planes, weight, start, *factors, *([] if table is None else [table])],
        name=name,
        order=order,
        first=first,
        scale=scale,
        channels=channels,
        halved=int(halved),
        style=style,
        rows=[rows.low, rows.high],
        columns=[columns.low, columns.high],
        **geometry.attributes(),
    )


def _infer_conv2d(expr: relax.Call) -> relax.TensorType:
    batch, height, width, _ = shape_of(expr.args[0])
    return tensor((batch, *Geometry.of(expr.attrs).output_size(height, width), int(expr.attrs["channels"])), "float32")


PACKED_CONV2D = register("horq.packed_conv2d", 2, _infer_conv2d)
PACKED_DEPTHWISE = register("horq.packed_depthwise", 2, _infer_conv2d)


def packed_conv2d(
    x: relax.Expr, weight: relax.Expr, *, name: str, geometry: Geometry, channels: int, depthwise: bool = False
) -> relax.Call:
    """x float32 [N,H+t+b,W+l+r,C], geometry without padding → float32 [N,HO,WO,F].

    weight float32 [G,B,kh,kw,C/G,v]; depthwise (C/G = 1, F = C): [kh,kw,C].
    """
    op = PACKED_DEPTHWISE if depthwise else PACKED_CONV2D
    attrs: dict[str, Any] = geometry.attributes()
    return call(op, [x, weight], name=name, channels=channels, **attrs)
