"""`PackInt8`: int8 layers as a quantisation into rows of elements and a dot product over packed weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tvm
from tvm import relax

from horq_tvm import ops
from horq_tvm.errors import HorqError
from horq_tvm.ops.int8 import (
    ELEMENTS,
    WEIGHT_DTYPE,
    Activation,
    Int8Style,
    Rows,
    activation_of,
    below_level,
    element_of_zero,
    zero_points_of,
)
from horq_tvm.pixels import TO_NHWC
from horq_tvm.straightline import Array, Program, Writer, array_of, constant, op_name, read_main

from .pack_weights import by_lanes

PLANAR_CHANNELS = 4  # an image of so few channels is quantised as it arrives: channel by channel


@dataclass(frozen=True)
class Int8Target:
    """What a target decides: the instruction's `style`, `lanes(filters of a group, groups)`, floats in a vector.

    `style` is None where there are no int8 kernels for the target.
    """

    style: Int8Style | None
    lanes: Callable[[int, int], int]
    vector_lanes: int


@tvm.transform.module_pass(opt_level=0, name="PackInt8")
class PackInt8:
    """horq.int8_conv2d, horq.int8_image and horq.int8_dense → horq.quantize → horq.packed_int8.

    Padding, strides of 1×1 windows (pixels that no window reads are not quantised) and the transposition of an image
    that arrives in NCHW go into the quantisation. Layers that quantise a value in the same way share the result. An
    image of bytes whose rows are what the kernel wants is read where it is. Raises HorqError on an int8 layer where the
    target has no int8 kernels.
    """

    def __init__(self, target: Int8Target) -> None:
        self.target = target

    def transform_module(self, mod: tvm.IRModule, _context: Any) -> tvm.IRModule:
        program = read_main(mod)
        with Writer(mod, program) as writer:
            packer = _Packer(writer, program, self.target)
            for var, value in program.bindings:
                if op_name(value) in ("horq.int8_conv2d", "horq.int8_image"):
                    writer.map(var, packer.conv2d(value))
                elif op_name(value) == "horq.int8_dense":
                    writer.map(var, packer.dense(value))
                else:
                    writer.bind(var, value)
            return writer.finish(program.result)


@dataclass(frozen=True)
class _Layer:
    """A convolution about to be packed: weight int8 [F,kh,kw,c], factor float32 [F]; `size` of its input.

    `pixels` are the zero points of the channels of an image of bytes, none where the input is float.
    """

    name: str
    weight: Array
    factor: Array
    geometry: ops.Geometry
    activation: Activation
    size: tuple[int, int]
    channels: int
    pixels: tuple[int, ...] = ()


class _Packer:
    def __init__(self, writer: Writer, program: Program, target: Int8Target) -> None:
        self.writer = writer
        self.program = program
        self.target = target
        self._shared: dict[Any, relax.Expr] = {}

    def conv2d(self, value: relax.Call) -> relax.Expr:
        _, height, width, channels = ops.shape_of(value.args[0])
        layer = _layer(value, _array(value, 1), ops.Geometry.of(value.attrs), (height, width), channels)
        return self._convolve(layer, value.args[0])

    def dense(self, value: relax.Call) -> relax.Expr:
        """x [..., L] as a 1×1 convolution over an image [1,1,M,L]."""
        weight, shape = _array(value, 1), ops.shape_of(value.args[0])
        rows = int(np.prod(shape[:-1], dtype=int))
        image = self.writer.emit(relax.op.reshape(self.writer.resolve(value.args[0]), (1, 1, rows, shape[-1])))
        layer = _layer(value, weight[:, None, None, :], ops.Geometry((1, 1)), (1, rows), shape[-1])
        output = self._convolve(layer, image)
        return self.writer.emit(relax.op.reshape(output, (*shape[:-1], len(weight))))

    def _convolve(self, layer: _Layer, x: relax.Expr) -> relax.Expr:
        style, geometry = self.target.style, layer.geometry
        if style is None:
            raise HorqError(f"layer {layer.name}: there are no int8 kernels for this target; accepted: rest float32")
        planes = self._planes(layer, x)
        stride = _stride_of_pixels(layer)
        size = tuple(-(-extent // step) for extent, step in zip(layer.size, stride, strict=True))
        window = replace(geometry, strides=(1, 1)) if stride != (1, 1) else geometry
        rows = Rows.of((size[0], size[1]), layer.channels, window, style, planar=planes is not None)
        source = ops.Geometry((1, 1), stride, geometry.padding, groups=geometry.groups)
        operand = self.writer.resolve(x if planes is None else planes)
        if layer.pixels and style == "quads" and planes is None and rows.is_image(size, layer.channels, source):
            elements = self.writer.emit(relax.op.reshape(operand, (ops.shape_of(operand)[0], rows.height, rows.length)))
        else:
            how: dict[str, Any] = {"activation": layer.activation, "rows": rows, "geometry": source, "style": style}
            elements = self._quantize(operand, **how, zero_points=layer.pixels, planar=planes is not None)
        filters, groups = len(layer.weight), geometry.groups
        lanes = self.target.lanes(filters // groups, groups)
        packed = ops.packed_int8(
            elements,
            constant(pack_filters(layer.weight, groups, lanes, rows, style, planar=planes is not None)),
            constant(starts(layer.weight, groups, lanes, _zeros(layer, style))),
            constant(layer.factor),
            name=layer.name,
            rows=rows,
            geometry=replace(window, padding=(0, 0, 0, 0)),
            output=geometry.output_size(*layer.size),
            channels=filters,
            style=style,
        )
        return self.writer.emit(packed)

    def _planes(self, layer: _Layer, x: relax.Expr) -> relax.Expr | None:
        """The NCHW image that `x` is a transposition of, where the window can be read from its planes."""
        value = self.program.values.get(x) if isinstance(x, relax.Var) else None
        if value is None or op_name(value) != "relax.permute_dims" or layer.channels > PLANAR_CHANNELS:
            return None
        one_row = layer.geometry.dilation[1] == 1 and layer.geometry.groups == 1 and layer.geometry.kernel[1] > 1
        axes = tuple(int(axis) for axis in value.attrs.axes or ())
        return value.args[0] if axes == TO_NHWC and one_row else None

    def _quantize(self, x: relax.Expr, **how: Any) -> relax.Expr:
        key = (x, *how.values())
        if key not in self._shared:
            self._shared[key] = self.writer.emit(ops.quantize(x, lanes=self.target.vector_lanes, **how))
        return self._shared[key]


def _layer(value: relax.Call, weight: Array, geometry: ops.Geometry, size: tuple[int, int], channels: int) -> _Layer:
    pixels = zero_points_of(value.attrs) if op_name(value) == "horq.int8_image" else ()
    activation = Activation(1.0, 0) if pixels else activation_of(value.attrs)
    return _Layer(str(value.attrs["name"]), weight, _array(value, 2), geometry, activation, size, channels, pixels)


def _zeros(layer: _Layer, style: Int8Style) -> tuple[int, ...]:
    """The element of the value 0 in each channel of a group."""
    if layer.pixels:
        return tuple(level - below_level(style) for level in layer.pixels)
    return (element_of_zero(style, layer.activation.zero_point),) * layer.weight.shape[3]


def _array(value: relax.Call, index: int) -> Array:
    array = array_of(value.args[index])
    assert array is not None  # QuantizeRest makes constants
    return array


def _stride_of_pixels(layer: _Layer) -> tuple[int, int]:
    """Strides of a 1×1 window without padding: the quantisation takes the pixels that it reads."""
    pointwise = layer.geometry.kernel == (1, 1) and not any(layer.geometry.padding)
    return layer.geometry.strides if pointwise else (1, 1)


def pack_filters(
    weight: Array, groups: int, lanes: int, rows: Rows, style: Int8Style, *, planar: bool = False
) -> Array:
    """weight int8 [F,kh,kw,c] → [G,B,kh,taps,words,v·e], runs as `rows` has them, zeros beyond the kernel row."""
    per_word, (filters, kh, _, _) = ELEMENTS[style], weight.shape
    runs = weight.transpose(0, 1, 3, 2) if planar else weight.reshape(filters, kh, rows.taps, -1)
    missing = rows.words * per_word - runs.shape[3]
    dwords = np.pad(runs, [(0, 0)] * 3 + [(0, missing)]).reshape(filters, kh, rows.taps, rows.words, per_word)
    by_vector = np.moveaxis(by_lanes(dwords, groups, lanes), 2, 5)  # [G,B,kh,taps,words,v,e]
    return np.ascontiguousarray(by_vector.reshape(*by_vector.shape[:5], -1).astype(WEIGHT_DTYPE[style]))


def starts(weight: Array, groups: int, lanes: int, zeros: Sequence[int]) -> Array:
    """int32 [G,B·v]: −Σ z_c·w, which turns Σ q·w into Σ (q − z_c)·w; weight [F,kh,kw,c], `zeros` by channel c."""
    sums = -(weight.astype("int64") * np.array(zeros, "int64")).reshape(len(weight), -1).sum(axis=1)
    return by_lanes(sums.astype("int32"), groups, lanes).reshape(groups, -1)
