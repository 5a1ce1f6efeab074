"""From a packed op to its algorithm on a card, where that is not the CPU's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tvm import relax, topi
from tvm.ir import Op
from tvm.relax import BlockBuilder

from horq_tvm.schedules.legalize import LEGALIZE as CPU
from horq_tvm.schedules.legalize import ActivationKernels, Legalize, emit_rows
from horq_tvm.schedules.patch import Patch
from horq_tvm.targets import Target

from . import bitserial, patch
from . import float as floats
from .pack import binarize
from .scales import Sample, sample_scales
from .tile import Card


def _rows(builder: BlockBuilder, spec: Patch, x: relax.Expr, line: Sequence[relax.Expr]) -> relax.Expr:
    kernel = builder.add_func(patch.rows(spec, bool(line)), "binarize_rows")
    return emit_rows(builder, spec, kernel, [x, *line])


def _rows_of_given(
    builder: BlockBuilder,
    spec: Patch,
    x: relax.Expr,
    line: Sequence[relax.Expr],
    beta: relax.Expr,
    out: relax.TensorType,
) -> relax.Expr:
    kernel = builder.add_func(patch.rows_of_given(spec, bool(line)), "binarize_rows")
    return relax.call_tir(kernel, [x, *line, beta], out_ty=out)


ACTIVATIONS = ActivationKernels(binarize, Sample, sample_scales, _rows, _rows_of_given)


def _pad_planes(builder: BlockBuilder, call: relax.Call) -> relax.Expr:
    top, left, bottom, right = (int(v) for v in call.attrs["padding"])
    before, after = [0, top, left, 0, 0, 0], [0, bottom, right, 0, 0, 0]
    return builder.call_te(lambda x: topi.nn.pad(x, before, after), *call.args, primfunc_name_hint="pad")


def _pad(builder: BlockBuilder, call: relax.Call) -> relax.Expr:
    """As TVM legalises it."""
    return Op.get("relax.nn.pad").get_attr("FLegalize")(builder, call)


LEGALIZE: Mapping[str, Legalize] = {
    **CPU,
    **ACTIVATIONS.legalize(),
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
