"""From a packed op to its algorithm on a card, where that is not the CPU's."""

from __future__ import annotations

from collections.abc import Mapping

from tvm import relax, te, topi
from tvm.ir import Op
from tvm.relax import BlockBuilder

from horq_tvm.ops import Geometry
from horq_tvm.schedules.legalize import LEGALIZE as CPU
from horq_tvm.schedules.legalize import Legalize

from . import plain


def _binarize(builder: BlockBuilder, call: relax.Call) -> relax.Expr:
    order, first, geometry = int(call.attrs["order"]), int(call.attrs["first"]), Geometry.of(call.attrs)

    def rows(x: te.Tensor, beta: te.Tensor, *line: te.Tensor) -> te.Tensor:
        return plain.Rows(x, line, order, geometry).planes(beta, first)

    def pixels(x: te.Tensor, beta: te.Tensor, *line: te.Tensor) -> te.Tensor:
        return plain.binarize(x, beta, line, order, first, geometry.groups)

    return builder.call_te(
        rows if call.attrs["scale"] == "patch" else pixels, *call.args, primfunc_name_hint="binarize"
    )


def _scales(builder: BlockBuilder, call: relax.Call) -> relax.Expr:
    order, geometry = int(call.attrs["order"]), Geometry.of(call.attrs)

    def rows(x: te.Tensor, *line: te.Tensor) -> te.Tensor:
        return plain.Rows(x, line, order, geometry).scales()

    def images(x: te.Tensor, *line: te.Tensor) -> te.Tensor:
        return plain.sample_scales(x, line, order)

    return builder.call_te(rows if call.attrs["scale"] == "patch" else images, *call.args, primfunc_name_hint="scales")


def _patch(builder: BlockBuilder, call: relax.Call) -> relax.Expr:
    order, first, geometry = int(call.attrs["order"]), int(call.attrs["first"]), Geometry.of(call.attrs)

    def both(x: te.Tensor, *line: te.Tensor) -> list[te.Tensor]:
        rows = plain.Rows(x, line, order, geometry)
        beta = rows.scales()
        return [beta, rows.planes(beta, first)]

    return builder.call_te(both, *call.args, primfunc_name_hint="patch")


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
