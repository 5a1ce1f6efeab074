"""From a packed op to its algorithm on a card, where that is not the CPU's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tvm import relax, topi
from tvm.ir import Op
from tvm.relax import BlockBuilder

from horq_tvm.ops import Geometry, shape_of
from horq_tvm.schedules.binarize import Binarization
from horq_tvm.schedules.legalize import LEGALIZE as CPU
from horq_tvm.schedules.legalize import Legalize
from horq_tvm.schedules.patch import Patch
from horq_tvm.targets import Target

from . import bitserial, patch
from . import float as floats
from .pack import binarize
from .scales import Sample, sample_scales
from .tile import Card


def _binarize(builder: BlockBuilder, call: relax.Call) -> relax.Expr:
    x, beta, *line = call.args
    order, first, geometry = int(call.attrs["order"]), int(call.attrs["first"]), Geometry.of(call.attrs)
    n, h, w, c = shape_of(x)
    if call.attrs["scale"] == "patch":
        spec = Patch((n, h, w, c), order, first, geometry)
        rows = builder.add_func(patch.rows_of_given(spec, bool(line)), "binarize_rows")
        return relax.call_tir(rows, [x, *line, beta], out_ty=call.ty)
    pixels = Binarization(
        (n, h, w, c), shape_of(beta), order, first, str(call.attrs["scale"]), geometry.groups, bool(line)
    )
    return relax.call_tir(builder.add_func(binarize(pixels), "binarize"), [x, beta, *line], out_ty=call.ty)


def _scales(builder: BlockBuilder, call: relax.Call) -> relax.Expr:
    x, *line = call.args
    n, h, w, c = shape_of(x)
    order = int(call.attrs["order"])
    if call.attrs["scale"] == "patch":
        found = _rows(builder, x, line, Patch((n, h, w, c), order, 0, Geometry.of(call.attrs)))
        return relax.TupleGetItem(found, 0)
    spec = Sample(n, h * w * c, order, c if line else 0)
    flat = builder.emit(relax.op.reshape(x, (n, h * w * c)))
    outputs = [call.ty, relax.TensorType(spec.partial_shape, "float64")]
    kernel = builder.add_func(sample_scales(spec), "scales_sample")
    return relax.TupleGetItem(builder.emit(relax.call_tir(kernel, [flat, *line], out_ty=outputs)), 0)


def _patch(builder: BlockBuilder, call: relax.Call) -> relax.Expr:
    x, *line = call.args
    order, first = int(call.attrs["order"]), int(call.attrs["first"])
    n, h, w, c = shape_of(x)
    return _rows(builder, x, line, Patch((n, h, w, c), order, first, Geometry.of(call.attrs)))


def _rows(builder: BlockBuilder, x: relax.Expr, line: Sequence[relax.Expr], spec: Patch) -> relax.Expr:
    """β and planes, a tuple."""
    kernel = builder.add_func(patch.rows(spec, bool(line)), "binarize_rows")
    outputs = [relax.TensorType(spec.beta_shape, "float32"), relax.TensorType(spec.planes_shape, "uint32")]
    return builder.emit(relax.call_tir(kernel, [x, *line], out_ty=outputs))


def _pad_planes(builder: BlockBuilder, call: relax.Call) -> relax.Expr:
    top, left, bottom, right = (int(v) for v in call.attrs["padding"])
    before, after = [0, top, left, 0, 0, 0], [0, bottom, right, 0, 0, 0]
    return builder.call_te(lambda x: topi.nn.pad(x, before, after), *call.args, primfunc_name_hint="pad")


def _pad(builder: BlockBuilder, call: relax.Call) -> relax.Expr:
    """As TVM legalises it."""
    return Op.get("relax.nn.pad").get_attr("FLegalize")(builder, call)


LEGALIZE: Mapping[str, Legalize] = {
    **CPU,
    "horq.binarize": _binarize,
    "horq.scales": _scales,
    "horq.patch": _patch,
    "horq.pad_planes": _pad_planes,
    "relax.nn.pad": _pad,
}


def algorithms(target: Target) -> Mapping[str, Legalize]:
    """`LEGALIZE`, and what depends on the card."""
    card = Card.of(target)

    def packed_bitserial(builder: BlockBuilder, call: relax.Call) -> relax.Expr:
        if call.attrs["style"] != "mma":
            return CPU["horq.packed_bitserial"](builder, call)
        return bitserial.legalize(builder, call, card)

    def packed_conv2d(builder: BlockBuilder, call: relax.Call) -> relax.Expr:
        return floats.legalize(builder, call, card)

    return {**LEGALIZE, "horq.packed_bitserial": packed_bitserial, "horq.packed_conv2d": packed_conv2d}
