"""The layers that stay unbinarised, in int8: what they compute, and the form that a kernel implements.

q = clip(rint(x / s) + z, 0, 255), w int8 in [−127, 127], output = s·s_f · Σ (q − z)·w, the sum an exact int32.

A kernel does not see pixels. It sees rows of small elements, and a window as rows of *runs*: a run is `words` words of
consecutive elements, so that one word is broadcast and multiplied with a word of each filter. What a run is depends
on the layer (`Rows`): a whole kernel row where its pixels are neighbours in memory (3 channels of 7 pixels are 21
elements, 6 words of 4, where padding pixels to 4 channels would take 7), the kernel row of one channel where the image
arrives channel by channel, otherwise one tap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any, Literal, cast

from tvm import relax

from .geometry import Geometry
from .registry import call, register, shape_of, tensor

Int8Style = Literal["quads", "pairs", "sdot", "smull", "vmull"]
"""What a word holds: 4 uint8 q (VNNI), or 2 int16 q − z (PMADDWD). On ARM, which multiplies bytes of one kind: 4 int8
q − 128 (SDOT), or 2 (SMULL, on 32-bit ARM VMULL)."""

ELEMENTS: dict[str, int] = {"quads": 4, "pairs": 2, "sdot": 4, "smull": 2, "vmull": 2}
ACTIVATION_DTYPE: dict[str, str] = {
    "quads": "uint8",
    "pairs": "int16",
    **dict.fromkeys(("sdot", "smull", "vmull"), "int8"),
}
WEIGHT_DTYPE: dict[str, str] = {**ACTIVATION_DTYPE, "quads": "int8"}

# Σ |q − z|·|w| ≤ L·255·128 stays below 2^31, so that no order of the additions overflows an int32. (Weights that we
# quantise end at ±127, those that a model brings at −128.) Nor does one of Σ (q − 128)·w, whose start is Σ (128 − z)·w:
# an element that is yet to come stands for (128 − z)·w there.
MAX_ROW = (2**31 - 1) // (255 * 128)


@dataclass(frozen=True)
class Activation:
    """How a layer's input becomes integers: float32 `scale` s > 0 and `zero_point` z, 0 to 255."""

    scale: float
    zero_point: int


def _infer_conv2d(expr: relax.Call) -> relax.TensorType:
    batch, height, width, _ = shape_of(expr.args[0])
    return tensor((batch, *Geometry.of(expr.attrs).output_size(height, width), shape_of(expr.args[1])[0]), "float32")


def _infer_dense(expr: relax.Call) -> relax.TensorType:
    return tensor((*shape_of(expr.args[0])[:-1], shape_of(expr.args[1])[0]), "float32")


INT8_CONV2D = register("horq.int8_conv2d", 3, _infer_conv2d)
INT8_IMAGE = register("horq.int8_image", 3, _infer_conv2d)
INT8_DENSE = register("horq.int8_dense", 3, _infer_dense)


def int8_conv2d(
    x: relax.Expr, weight: relax.Expr, factor: relax.Expr, *, name: str, geometry: Geometry, activation: Activation
) -> relax.Call:
    """x float32 [N,H,W,C], weight int8 [F,kh,kw,C/g], factor float32 [F] = s·s_f → float32 [N,HO,WO,F].

    A padded position has the value 0, that is q = z.
    """
    return call(INT8_CONV2D, [x, weight, factor], name=name, **asdict(activation), **geometry.attributes())


def int8_image(
    pixels: relax.Expr,
    weight: relax.Expr,
    factor: relax.Expr,
    *,
    name: str,
    geometry: Geometry,
    zero_points: Sequence[int],
) -> relax.Call:
    """pixels uint8 [N,H,W,C], weight int8 [F,kh,kw,C/g], factor float32 [F] → float32 [N,HO,WO,F].

    factor_f · Σ (p − z_c)·w with the channels' `zero_points` z_c, 0 to 255. A padded position is p = z_c.
    """
    zeros = [int(zero) for zero in zero_points]
    return call(INT8_IMAGE, [pixels, weight, factor], name=name, zero_points=zeros, **geometry.attributes())


def int8_dense(
    x: relax.Expr, weight: relax.Expr, factor: relax.Expr, *, name: str, activation: Activation
) -> relax.Call:
    """x float32 [...,L], weight int8 [F,L], factor float32 [F] = s·s_f → float32 [...,F]."""
    return call(INT8_DENSE, [x, weight, factor], name=name, **asdict(activation))


def below_level(style: Int8Style) -> int:
    """What an element that stands for a level, or a byte of an image, is less than it: elements of int8 are q − 128."""
    return 128 if ACTIVATION_DTYPE[style] == "int8" else 0


def element_of_zero(style: Int8Style, zero_point: int) -> int:
    """The element of the value 0 in a layer that quantises floats."""
    return 0 if style == "pairs" else zero_point - below_level(style)


@dataclass(frozen=True)
class Rows:
    """A padded image as rows of elements, and where a window finds its runs in them. All counts are of elements.

    Element (plane p, pixel x, channel of it) stands at p·plane + (left + x)·pixel + channel. The run t of output x and
    group g starts at x·step + g·group + t·tap and has `words` dwords; a filter is zero where a run goes beyond its
    kernel row, so what stands there does not matter.
    """

    height: int
    length: int
    step: int
    group: int
    taps: int
    tap: int
    words: int
    plane: int
    pixel: int

    @classmethod
    def of(
        cls, size: tuple[int, int], channels: int, geometry: Geometry, style: Int8Style, *, planar: bool = False
    ) -> Rows:
        """The layout for images of `size` (height, width) with `geometry`'s padding; `planar` keeps channels apart."""
        per_word, (_, kw), dx = ELEMENTS[style], geometry.kernel, geometry.dilation[1]
        top, left, bottom, right = geometry.padding
        height, width = top + size[0] + bottom, left + size[1] + right
        outputs, sx = geometry.output_size(*size)[1], geometry.strides[1]
        plane = 0
        if planar:
            pixel, group, taps, words = 1, 0, channels, ceil(kw / per_word)
            plane = tap = _whole_words(max(width, (outputs - 1) * sx + words * per_word), per_word)
            length = taps * plane
        else:
            inner = channels // geometry.groups
            joined = geometry.groups == 1 and (dx == 1 or kw == 1)
            group = 0 if joined else _whole_words(inner, per_word)
            pixel = channels if joined else geometry.groups * group
            taps, words = (1, ceil(kw * inner / per_word)) if joined else (kw, group // per_word)
            tap = dx * pixel
            last = (outputs - 1) * sx * pixel + (geometry.groups - 1) * group + (taps - 1) * tap
            length = _whole_words(max(width * pixel, last + words * per_word), per_word)
        return cls(height, length, sx * pixel, group, taps, tap, words, plane, pixel)

    def is_image(self, size: Sequence[int], channels: int, source: Geometry) -> bool:
        """Whether an NHWC image of `size`, taken as `source` says, has these very rows: nothing is put around them."""
        plain = not any(source.padding) and source.strides == (1, 1) and self.pixel == channels
        return plain and [self.height, self.length] == [size[0], size[1] * channels]


def _whole_words(elements: int, per_word: int) -> int:
    return ceil(elements / per_word) * per_word


def _infer_quantize(expr: relax.Call) -> relax.TensorType:
    shape = shape_of(expr.args[0])
    return tensor((shape[0], int(expr.attrs["height"]), int(expr.attrs["length"])), str(expr.attrs["dtype"]))


QUANTIZE = register("horq.quantize", 1, _infer_quantize)


def quantize(
    x: relax.Expr,
    *,
    activation: Activation,
    rows: Rows,
    geometry: Geometry,
    style: Int8Style,
    lanes: int,
    planar: bool = False,
    zero_points: Sequence[int] = (),
) -> relax.Call:
    """x float32 [N,H,W,C] (`planar`: [N,C,H,W]) → the elements of `rows` in the `style`, [N,Hp,Row].

    With `zero_points`, one a channel, x is an image of bytes that are levels already: elements but for `below_level`.

    geometry  `padding` is filled with the value 0, which of bytes is the channel's zero point; `strides` take every
              such pixel only (for a 1×1 window), else (1,1); `groups` begin at whole dwords where `rows` says so
    lanes     floats of the target's vector
    """
    return call(
        QUANTIZE,
        [x],
        style=style,
        dtype=ACTIVATION_DTYPE[style],
        lanes=lanes,
        planar=int(planar),
        zero_points=[int(zero) for zero in zero_points],
        **asdict(activation),
        **asdict(rows),
        **geometry.attributes(),
    )


def _infer_packed(expr: relax.Call) -> relax.TensorType:
    batch, *_ = shape_of(expr.args[0])
    height, width = (int(e) for e in expr.attrs["output"])
    return tensor((batch, height, width, int(expr.attrs["channels"])), "float32")


PACKED_INT8 = register("horq.packed_int8", 4, _infer_packed)


def packed_int8(
    elements: relax.Expr,
    weight: relax.Expr,
    start: relax.Expr,
    factor: relax.Expr,
    *,
    name: str,
    rows: Rows,
    geometry: Geometry,
    output: tuple[int, int],
    channels: int,
    style: Int8Style,
) -> relax.Call:
    """elements as `quantize` gives them → float32 [N,HO,WO,F] = factor · (start + Σ element·weight).

    weight  [G,B,kh,taps,words,v·e], B = ⌈F/G/v⌉, e elements a word, those of a filter side by side
    start   int32 [G,B·v]: −Σ (the element of 0)·w
    factor  float32 [F]
    """
    how: dict[str, Any] = asdict(rows) | geometry.attributes()
    operands = [elements, weight, start, factor]
    return call(PACKED_INT8, operands, name=name, style=style, channels=channels, output=list(output), **how)


def rows_of(attrs: Any) -> Rows:
    """The rows that `quantize` or `packed_int8` wrote on its call."""
    return Rows(**{key: int(attrs[key]) for key in Rows.__dataclass_fields__})


def activation_of(attrs: Any) -> Activation:
    """The activation that `int8_conv2d`, `int8_dense` or `quantize` wrote on its call."""
    return Activation(float(attrs["scale"]), int(attrs["zero_point"]))


def zero_points_of(attrs: Any) -> tuple[int, ...]:
    """The zero points of an image of bytes that `int8_image` or `quantize` wrote on its call, none for floats."""
    return tuple(int(zero) for zero in attrs["zero_points"])


def style_of(attrs: Any) -> Int8Style:
    """The style that `quantize` or `packed_int8` wrote on its call."""
    return cast(Int8Style, str(attrs["style"]))
