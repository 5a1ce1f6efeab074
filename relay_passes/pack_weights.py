"""`PackWeights`: constants in the kernels' layout, padding made explicit, integers prepared (dialect → packed ops)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import tvm
from tvm import relax

from horq_tvm import ops
from horq_tvm.errors import HorqError
from horq_tvm.schedules import nibble
from horq_tvm.schedules.layout import WeightLayout
from horq_tvm.straightline import Array, Writer, array_of, constant, op_name, read_main

NO_PADDING = (0, 0, 0, 0)
Padding = tuple[int, int, int, int]
Lanes = Callable[[int, int], int]
Layout = Callable[[int, int, int], WeightLayout]


@tvm.transform.module_pass(opt_level=0, name="PackWeights")
class PackWeights:
    """horq.bitserial_* → (horq.pad_planes, horq.split_nibbles →) horq.packed_bitserial; float layers → packed ones.

    `lanes(filters of a group, groups)` says how many output channels a kernel works on side by side, and
    `layout(filters, groups, elements of a row)` how the bits of a layer lie; by default as words in those lanes. Equal
    paddings of one value are shared. Raises HorqError on a float layer whose weights are not constant.
    """

    def __init__(self, lanes: Lanes, layout: Layout | None = None) -> None:
        self.lanes = lanes
        self.layout = layout or (lambda filters, groups, _row: WeightLayout("words", lanes(filters, groups)))

    def transform_module(self, mod: tvm.IRModule, _context: Any) -> tvm.IRModule:
        program = read_main(mod)
        with Writer(mod, program) as writer:
            packer = _Packer(writer, self.lanes, self.layout)
            for var, value in program.bindings:
                emit = packer.emitters.get(op_name(value))
                if emit is None:
                    writer.bind(var, value)
                else:
                    writer.map(var, emit(writer.resolve(value)))
            return writer.finish(program.result)


def by_lanes(values: Array, groups: int, lanes: int) -> Array:
    """values [F, ...] → [G, B, v, ...], v = lanes, zeros beyond F/G."""
    grouped = values.reshape(groups, -1, *values.shape[1:])
    padded = np.pad(grouped, [(0, 0), (0, -grouped.shape[1] % lanes)] + [(0, 0)] * (values.ndim - 1))
    return padded.reshape(groups, -1, lanes, *values.shape[1:])


def pack_filters(weight: Array, groups: int, lanes: int) -> Array:
    """weight [F,kh,kw,c] → [G,B,kh,kw,c,v]."""
    return np.moveaxis(by_lanes(weight, groups, lanes), 2, 5)


def pack_words(words: Array, groups: int, layout: WeightLayout) -> Array:
    """uint32 [F,kh,kw,words] → the weight operand of `horq.packed_bitserial` in the layout's style."""
    if layout.style == "mma":
        rows = words.reshape(len(words), -1)
        depth = -rows.shape[1] % ops.STEP_WORDS
        filters = by_lanes(np.pad(rows, [(0, 0), (0, depth)]), groups, layout.lanes)
        return filters.reshape(groups, -1, filters.shape[-1])
    if layout.style != "nibbles":
        return pack_filters(words, groups, layout.lanes)
    in_bytes = np.ascontiguousarray(words).view("uint8").reshape(len(words), -1)
    return np.moveaxis(by_lanes(in_bytes, groups, layout.lanes), 2, 3)[..., nibble.lane_order(layout.lanes)]


def pack_bits(signs: Array) -> Array:
    """±1 [..., c] → uint32 [..., words], bit i of word j for element 32·j+i, 1 for +1, bits beyond c zero."""
    missing = -signs.shape[-1] % ops.WORD_BITS
    bits = np.pad(signs > 0, [(0, 0)] * (signs.ndim - 1) + [(0, missing)])
    return np.packbits(bits, axis=-1, bitorder="little").view("<u4")


class _Packer:
    """Emits the packed form of one layer after the other."""

    def __init__(self, writer: Writer, lanes: Lanes, layout: Layout) -> None:
        self.writer = writer
        self.lanes = lanes
        self.layout = layout
        self.emitters: dict[str, Callable[[relax.Call], relax.Expr]] = {
            "horq.bitserial_conv2d": self.bitserial,
            "horq.bitserial_dense": self.bitserial,
            "horq.conv2d": self.conv2d,
            "horq.dense": self.dense,
        }
        self._padded: dict[tuple[relax.Expr, Padding], relax.Expr] = {}

    def bitserial(self, value: relax.Call) -> relax.Expr:
        """horq.packed_bitserial over padded planes, or over the im2col rows of `patch`."""
        sums = WindowSums(value)
        groups, patch = sums.geometry.groups, sums.scale == "patch"
        planes, beta = value.args[0], value.args[4]
        words = pack_bits(sums.weight)
        layout = self.layout(len(words) // groups, groups, sums.weight[0].size)
        start = np.moveaxis(by_lanes(np.moveaxis(sums.start, 2, 0), groups, layout.lanes), (0, 1, 2), (2, 3, 4))
        # A kernel that gathers windows into shared memory puts the zeros there itself.
        gathers = layout.style == "mma"
        padded = planes if patch or gathers else self._pad(planes, sums.geometry.padding, ops.pad_planes)
        geometry = sums.geometry if gathers else replace(sums.geometry, padding=NO_PADDING)
        packed = ops.packed_bitserial(
            padded,
            # A row of `patch` lists its window tap by tap, as a filter's words do.
            self._filters(words.reshape(len(words), 1, 1, -1) if patch else words, groups, layout, sums.pixels),
            constant(start.reshape(*start.shape[:3], -1)),
            _factors(sums, beta),
            name=str(value.attrs["name"]),
            order=sums.order,
            first=sums.first,
            scale=sums.scale,
            geometry=ops.Geometry((1, 1), groups=groups) if patch else geometry,
            channels=len(words),
            halved=sums.halved,
            rows=sums.rows,
            columns=sums.columns,
            style=layout.style,
            table=constant(nibble.table()) if layout.style == "nibbles" else None,
        )
        return self.writer.emit(packed)

    def _filters(self, words: Array, groups: int, layout: WeightLayout, pixels: int) -> relax.Expr:
        """The weight operand: a constant, or what is made of one in each run where many pixels share it."""
        packed = constant(pack_words(words, groups, layout))
        splits = layout.style == "nibbles" and nibble.splits(layout.lanes, pixels)
        return self.writer.emit(ops.split_nibbles(packed)) if splits else packed

    def conv2d(self, value: relax.Call) -> relax.Expr:
        """horq.packed_conv2d or horq.packed_depthwise over a padded image."""
        geometry = ops.Geometry.of(value.attrs)
        x = self._pad(value.args[0], geometry.padding, _pad_image)
        return self._convolve(x, _weight(value), replace(geometry, padding=NO_PADDING), value)

    def dense(self, value: relax.Call) -> relax.Expr:
        """x [..., L] as a 1×1 convolution over an image [1,1,M,L]."""
        weight, shape = _weight(value), ops.shape_of(value.args[0])
        rows = int(np.prod(shape[:-1], dtype=int))
        image = self.writer.emit(relax.op.reshape(value.args[0], (1, 1, rows, shape[-1])))
        output = self._convolve(image, weight[:, None, None, :], ops.Geometry((1, 1)), value)
        return self.writer.emit(relax.op.reshape(output, (*shape[:-1], len(weight))))

    def _convolve(self, x: relax.Expr, weight: Array, geometry: ops.Geometry, value: relax.Call) -> relax.Expr:
        filters, _, _, depth = weight.shape
        depthwise = depth == 1 and filters == geometry.groups
        lanes = self.lanes(filters // geometry.groups, geometry.groups)
        packed = np.moveaxis(weight[..., 0], 0, 2) if depthwise else pack_filters(weight, geometry.groups, lanes)
        how: dict[str, Any] = {"geometry": geometry, "channels": filters, "depthwise": depthwise}
        return self.writer.emit(ops.packed_conv2d(x, constant(packed), name=str(value.attrs["name"]), **how))

    def _pad(self, x: relax.Expr, padding: Padding, pad: Callable[..., relax.Expr]) -> relax.Expr:
        if padding == NO_PADDING:
            return x
        if (x, padding) not in self._padded:
            self._padded[x, padding] = self.writer.emit(pad(x, padding=padding))
        return self._padded[x, padding]


def _pad_image(x: relax.Expr, *, padding: Padding) -> relax.Expr:
    top, left, bottom, right = padding
    return relax.op.nn.pad(x, [0, 0, top, bottom, left, right, 0, 0], "constant", 0.0)


def _weight(value: relax.Call) -> Array:
    weight = array_of(value.args[1])
    if weight is None:
        raise HorqError(f"layer {value.attrs['name']}: weights have to be constant to be packed, found {value.args[1]}")
    return weight


class WindowSums:
    """The integers of a bitserial layer: what S is made of, by border class.

    A padded tap holds zero words, so its XOR with the filter's words has popcount(w_tap) bits. With pc the popcount
    over the window and `valid` its count of real elements, S = valid − 2·(pc − Σ_padded popcount(w_tap)) = c − 2·pc,
    where c = valid + 2·Σ_padded popcount(w_tap). If every c is even, S = −2·(pc − c/2): the sum starts at −c/2, and the
    factor −2 moves into a float that is multiplied anyway.
    """

    def __init__(self, value: relax.Call) -> None:
        attrs = value.attrs
        weight, alpha, bias = (array_of(arg) for arg in value.args[1:4])
        if weight is None or alpha is None or bias is None:
            raise HorqError(f"layer {attrs['name']}: weight, alpha and bias have to be constants")
        self.weight, self.alpha, self.bias = weight, alpha, bias
        self.geometry = ops.Geometry.of(attrs)
        self.order, self.first, self.scale = int(attrs["order"]), int(attrs["first"]), str(attrs["scale"])
        batch, height, width = ops.shape_of(value.args[0])[:3]
        # The rows of `patch` are those of the output already.
        patch = self.scale == "patch"
        out_height, out_width = (height, width) if patch else self.geometry.output_size(height, width)
        self.pixels = batch * out_height * out_width  # outputs of a filter
        self.rows, rows = self._classes(height, out_height, axis=0)
        self.columns, columns = self._classes(width, out_width, axis=1)
        # bool [R,C,kh,kw]: which taps are real
        self.real = rows[:, None, :, None] & columns[None, :, None, :]

    def _classes(self, size: int, out: int, axis: int) -> tuple[ops.BorderClasses, Array]:
        """Border classes along an axis, and for each which taps of the kernel are real, bool [classes, k]."""
        kernel, dilation = self.geometry.kernel[axis], self.geometry.dilation[axis]
        if self.scale == "patch":  # a padded position is an element like any other
            return ops.BorderClasses(0, out - 1, 1), np.ones((1, kernel), bool)
        stride, before = self.geometry.strides[axis], self.geometry.padding[axis]
        classes = ops.BorderClasses.along(size, out, kernel, stride, before, dilation)
        begin = np.array([classes.representative(i) * stride - before for i in range(classes.count)])
        position = begin[:, None] + np.arange(kernel) * dilation
        return classes, (position >= 0) & (position < size)

    @cached_property
    def valid(self) -> Array:
        """int64 [R,C]: the count of real elements in a window."""
        return self.real.sum((2, 3)) * self.weight.shape[3]

    @property
    def halved(self) -> bool:
        """Whether every S is even; c has the parity of `valid`."""
        return not np.any(self.valid % 2)

    @property
    def start(self) -> Array:
        """int32 [R,C,F]: −c/2 where `halved`, else c."""
        ones = (self.weight > 0).sum(3)
        c = self.valid[..., None] + 2 * np.einsum("rcij,fij->rcf", ~self.real, ones)
        return (-c // 2 if self.halved else c).astype("int32")

    @property
    def first_sum(self) -> Array:
        """int64 [R,C,F]: S of a plane that is all +1, Σ B_f over the real taps."""
        return np.einsum("rcij,fij->rcf", self.real, self.weight.sum(3, dtype="int64"))


def _factors(sums: WindowSums, beta: relax.Expr) -> list[relax.Expr]:
    """The float operands of horq.packed_bitserial, computed in float64 and rounded once."""
    gain = -2.0 if sums.halved else 1.0
    betas = array_of(beta)
    if sums.scale == "static" and betas is not None:
        scale = sums.alpha * betas[0].astype("float64")[:, None] * gain
        addend = sums.bias[None, None]
        if sums.first:
            addend = addend + sums.alpha * float(betas[0, 0]) * sums.first_sum
        return [constant(scale[sums.first :].astype("float32")), constant(addend.astype("float32"))]
    alpha, bias = (sums.alpha * gain).astype("float32"), sums.bias.astype("float32")
    computed = [constant(alpha), constant(bias), beta]
    return [*computed, constant((sums.first_sum / gain).astype("float32"))] if sums.first else computed
