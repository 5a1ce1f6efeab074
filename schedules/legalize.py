"""From a packed op to its algorithm: what `LegalizeOps` calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.ir import Op
from tvm.relax import BlockBuilder

from horq_tvm.ops import Geometry, shape_of
from horq_tvm.ops.int8 import activation_of, rows_of, style_of, zero_points_of

from . import conv2d as float_conv
from . import int8, neon
from .binarize import Binarization, binarize
from .bitserial import Bitserial, bitserial, from_counts
from .nibble import Shapes, count, split
from .pad import pad_rows
from .patch import Patch, pixels, rows, rows_of_given
from .scales import Sample, sample_scales

Legalize = Callable[[BlockBuilder, relax.Call], relax.Expr]


@dataclass(frozen=True)
class ActivationKernels:
    """The kernels of a family of targets that make scales and planes of an activation.

    binarize and sample_scales write a kernel for a spec, which `sample` makes of (batch, size, order, channels);
    rows and rows_of_given emit calls: x and line of an im2col layer → (β, planes), and with β given → planes.
    """

    binarize: Callable[[Binarization], tirx.PrimFunc]
    sample: Callable[[int, int, int, int], Any]
    sample_scales: Callable[[Any], tirx.PrimFunc]
    rows: Callable[[BlockBuilder, Patch, relax.Expr, Sequence[relax.Expr]], relax.Expr]
    rows_of_given: Callable[[BlockBuilder, Patch, relax.Expr, Sequence[relax.Expr], relax.Expr, Any], relax.Expr]

    def legalize(self) -> dict[str, Legalize]:
        """The operators that these kernels are of."""
        return {"horq.binarize": self._binarize, "horq.scales": self._scales, "horq.patch": self._patch}

    def _binarize(self, builder: BlockBuilder, call: relax.Call) -> relax.Expr:
        x, beta, *line = call.args
        order, first, geometry = int(call.attrs["order"]), int(call.attrs["first"]), Geometry.of(call.attrs)
        n, h, w, c = shape_of(x)
        if call.attrs["scale"] == "patch":
            return self.rows_of_given(builder, Patch((n, h, w, c), order, first, geometry), x, line, beta, call.ty)
        scale, groups = str(call.attrs["scale"]), geometry.groups
        spec = Binarization((n, h, w, c), shape_of(beta), order, first, scale, groups, bool(line))
        return relax.call_tir(builder.add_func(self.binarize(spec), "binarize"), [x, beta, *line], out_ty=call.ty)

    def _scales(self, builder: BlockBuilder, call: relax.Call) -> relax.Expr:
        x, *line = call.args
        n, h, w, c = shape_of(x)
        order = int(call.attrs["order"])
        if call.attrs["scale"] == "patch":
            spec = Patch((n, h, w, c), order, 0, Geometry.of(call.attrs))
            return relax.TupleGetItem(self.rows(builder, spec, x, line), 0)
        sample = self.sample(n, h * w * c, order, c if line else 0)
        flat = builder.emit(relax.op.reshape(x, (n, h * w * c)))
        kernel = builder.add_func(self.sample_scales(sample), "scales_sample")
        outputs = [call.ty, relax.TensorType(sample.partial_shape, "float64")]
        return relax.TupleGetItem(builder.emit(relax.call_tir(kernel, [flat, *line], out_ty=outputs)), 0)

    def _patch(self, builder: BlockBuilder, call: relax.Call) -> relax.Expr:
        x, *line = call.args
        n, h, w, c = shape_of(x)
        order, first = int(call.attrs["order"]), int(call.attrs["first"])
        return self.rows(builder, Patch((n, h, w, c), order, first, Geometry.of(call.attrs)), x, line)


def emit_rows(
    builder: BlockBuilder, spec: Patch, kernel: tvm.ir.GlobalVar, operands: Sequence[relax.Expr]
) -> relax.Expr:
    """The call of a kernel that makes β and the planes of im2col rows, a tuple."""
    outputs = [relax.TensorType(spec.beta_shape, "float32"), relax.TensorType(spec.planes_shape, "uint32")]
    return builder.emit(relax.call_tir(kernel, operands, out_ty=outputs))


def _pixels(builder: BlockBuilder, spec: Patch, x: relax.Expr, line: Sequence[relax.Expr]) -> list[relax.Expr]:
    """What `spec.found` lists."""
    outputs = [relax.TensorType(shape, dtype) for shape, dtype in spec.found.values()]
    kernel = builder.add_func(pixels(spec, bool(line)), "binarize_pixels")
    found = builder.emit(relax.call_tir(kernel, [x, *line], out_ty=outputs))
    return [builder.emit(relax.TupleGetItem(found, i)) for i in range(len(outputs))]


def _rows(builder: BlockBuilder, spec: Patch, x: relax.Expr, line: Sequence[relax.Expr]) -> relax.Expr:
    kernel = builder.add_func(rows(spec), "binarize_rows")
    return emit_rows(builder, spec, kernel, _pixels(builder, spec, x, line))


def _rows_of_given(
    builder: BlockBuilder,
    spec: Patch,
    x: relax.Expr,
    line: Sequence[relax.Expr],
    beta: relax.Expr,
    out: relax.TensorType,
) -> relax.Expr:
    kernel = builder.add_func(rows_of_given(spec), "binarize_rows")
    return relax.call_tir(kernel, [*_pixels(builder, spec, x, line), beta], out_ty=out)


ACTIVATIONS = ActivationKernels(binarize, Sample, sample_scales, _rows, _rows_of_given)


def _pad_planes(builder: BlockBuilder, call: relax.Call) -> relax.Expr:
    top, left, bottom, right = (int(v) for v in call.attrs["padding"])
    return _pad_rows(builder, call, (top, left), (bottom, right))


def _pad(builder: BlockBuilder, call: relax.Call) -> relax.Expr:
    """relax.nn.pad of NHWC images with zeros; any other padding as TVM legalises it."""
    widths = [int(v) for v in call.attrs.pad_width]
    inner = len(widths) == 8 and not any(widths[:2] + widths[6:]) and min(widths) >= 0
    if not inner or call.attrs.pad_mode != "constant" or float(call.attrs.pad_value) != 0.0:
        return Op.get("relax.nn.pad").get_attr("FLegalize")(builder, call)
    return _pad_rows(builder, call, (widths[2], widths[4]), (widths[3], widths[5]))


def _pad_rows(builder: BlockBuilder, call: relax.Call, before: tuple[int, int], after: tuple[int, int]) -> relax.Expr:
    """Height and width of [N,H,W,...] padded by `before` = (top, left) and `after` = (bottom, right) elements."""
    x = call.args[0]
    n, h, w, *rest = shape_of(x)
    pixel = prod(rest)
    (top, left), (bottom, right) = before, after
    func = pad_rows((n, h, w * pixel), (top, left * pixel), (bottom, right * pixel), str(call.ty.dtype.dtype))
    flat = builder.emit(relax.op.reshape(x, (n, h, w * pixel)))
    out = relax.TensorType([n, top + h + bottom, (left + w + right) * pixel], call.ty.dtype)
    padded = builder.emit(relax.call_tir(builder.add_func(func, "pad"), [flat], out_ty=out))
    return relax.op.reshape(padded, shape_of(call))


def _split_nibbles(builder: BlockBuilder, call: relax.Call) -> relax.Expr:
    (weight,) = call.args
    # Whoever looks for the kernels of bitserial layers finds this one too: it is part of what they cost.
    return relax.call_tir(builder.add_func(split(shape_of(weight)), "split_bitserial"), [weight], out_ty=call.ty)


def _packed_bitserial(builder: BlockBuilder, call: relax.Call) -> relax.Expr:
    spec = Bitserial.of(call.attrs)
    if str(call.attrs["style"]) == "nibbles":
        return _nibbles(builder, call, spec)
    if str(call.attrs["style"]) in neon.STYLES:
        return _halves(builder, call, spec)
    return builder.call_te(lambda *operands: bitserial(spec, *operands), *call.args, primfunc_name_hint="bitserial")


def _nibbles(builder: BlockBuilder, call: relax.Call, spec: Bitserial) -> relax.Expr:
    """The counts of each plane from a kernel in TensorIR, the rest from the same te as every other bitserial layer."""
    planes, weight, start, *factors, table = call.args
    shapes = Shapes(shape_of(planes), shape_of(weight), spec.geometry)
    counts = []
    for plane in range(spec.order - spec.first):
        kernel = builder.add_func(count(shapes, plane), "count")
        of_plane = relax.call_tir(kernel, [planes, weight, table], relax.TensorType(shapes.output, "uint16"))
        counts.append(builder.emit(of_plane))
    return builder.call_te(
        lambda *operands: from_counts(spec, operands[: len(counts)], *operands[len(counts) :]),
        *counts,
        start,
        *factors,
        primfunc_name_hint="bitserial",
    )


def _halves(builder: BlockBuilder, call: relax.Call, spec: Bitserial) -> relax.Expr:
    """The counts of each plane by NEON's additions of pairs, the rest from te."""
    planes, weight, start, *factors = call.args
    shapes = neon.Shapes(shape_of(planes), shape_of(weight), spec.geometry)
    counts = []
    for plane in range(spec.order - spec.first):
        kernel = builder.add_func(neon.count(shapes, plane, neon.STYLES[str(call.attrs["style"])]), "count")
        of_plane = relax.call_tir(kernel, [planes, weight], relax.TensorType(shapes.output, "int32"))
        counts.append(builder.emit(of_plane))
    return builder.call_te(
        lambda *operands: from_counts(spec, operands[: len(counts)], *operands[len(counts) :]),
        *counts,
        start,
        *factors,
        primfunc_name_hint="bitserial",
    )


def _packed_conv2d(builder: BlockBuilder, call: relax.Call) -> relax.Expr:
    geometry, channels = Geometry.of(call.attrs), int(call.attrs["channels"])
    return builder.call_te(
        lambda x, w: float_conv.conv2d(x, w, geometry, channels), *call.args, primfunc_name_hint="conv2d"
    )


def _packed_depthwise(builder: BlockBuilder, call: relax.Call) -> relax.Expr:
    geometry = Geometry.of(call.attrs)
    return builder.call_te(
        lambda x, w: float_conv.depthwise(x, w, geometry), *call.args, primfunc_name_hint="depthwise"
    )


def _quantize(builder: BlockBuilder, call: relax.Call) -> relax.Expr:
    (x,) = call.args
    spec = int8.Quantisation(
        shape_of(x),
        bool(call.attrs["planar"]),
        activation_of(call.attrs),
        rows_of(call.attrs),
        Geometry.of(call.attrs),
        style_of(call.attrs),
        int(call.attrs["lanes"]),
        zero_points_of(call.attrs),
    )
    image = builder.emit(relax.op.reshape(x, spec.image))
    return relax.call_tir(builder.add_func(int8.quantise(spec), "quantize"), [image], out_ty=call.ty)


def _packed_int8(builder: BlockBuilder, call: relax.Call) -> relax.Expr:
    """The exact sums from a kernel in TensorIR, the factor from te, so that the epilogue follows."""
    elements, weight, start, factor = call.args
    height, width = (int(e) for e in call.attrs["output"])
    spec = int8.Dot(
        shape_of(elements),
        shape_of(weight),
        rows_of(call.attrs),
        Geometry.of(call.attrs),
        (height, width),
        style_of(call.attrs),
    )
    kernel = builder.add_func(int8.dot(spec), "dot")
    sums = relax.call_tir(kernel, [elements, weight, start], relax.TensorType(spec.sums, "int32"))
    return builder.call_te(
        lambda s, f: int8.from_sums(s, f, int(call.attrs["channels"])),
        builder.emit(sums),
        factor,
        primfunc_name_hint="int8",
    )


LEGALIZE: Mapping[str, Legalize] = {
    **ACTIVATIONS.legalize(),
    "horq.pad_planes": _pad_planes,
    "relax.nn.pad": _pad,
    "horq.split_nibbles": _split_nibbles,
    "horq.packed_bitserial": _packed_bitserial,
    "horq.packed_conv2d": _packed_conv2d,
    "horq.packed_depthwise": _packed_depthwise,
    "horq.quantize": _quantize,
    "horq.packed_int8": _packed_int8,
}
