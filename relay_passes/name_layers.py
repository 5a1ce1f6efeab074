"""`NameLayers`: a convolution or matrix product whose weight carries a name becomes a layer of the HORQ dialect."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

from horq_tvm import ops
from horq_tvm.layers import OPAQUE_LAYERS
from horq_tvm.straightline import Array, Program, Writer, array_of, constant, op_name, read_main

Padding = tuple[int, int, int, int]


@tvm.transform.module_pass(opt_level=0, name="NameLayers")
class NameLayers:
    """Channels-last form → canonical form (docs/architecture.md, section 2).

    relax.nn.conv2d (NHWC, OHWI) → horq.conv2d, relax.matmul → horq.dense, where the weight is a constant under
    `horq.name`, permutes and reshapes, which are computed. A zero `nn.pad` of H and W before a conv becomes padding
    of the conv, so that `sample` and `static` do not take its zeros for elements.
    Layers with another weight stay what they are and are listed in the module attribute "horq.opaque_layers" as
    [name, "conv2d" or "dense"].
    No `horq.name` is left.
    """

    def transform_module(self, mod: tvm.IRModule, _context: Any) -> tvm.IRModule:
        program = read_main(mod)
        opaque: list[list[str]] = []
        with Writer(mod, program) as writer:
            for var, value in program.bindings:
                if op_name(value) == "horq.name":
                    writer.map(var, writer.resolve(value.args[0]))
                    continue
                layer = _layer(program, value, opaque)
                writer.bind(var, value if layer is None else layer)
            mod = writer.finish(program.result)
        mod = relax.transform.DeadCodeElimination(["main"])(mod)
        return mod.with_attr(OPAQUE_LAYERS, opaque)


def _layer(program: Program, value: relax.Expr, opaque: list[list[str]]) -> relax.Call | None:
    """The layer that a binding is, None where it is none or its weight is not constant (entered in `opaque`)."""
    kinds = {"relax.nn.conv2d": "conv2d", "relax.matmul": "dense"}
    kind = kinds.get(op_name(value))
    name = _name_of(program, value.args[1]) if kind else None
    if kind is None or name is None:
        return None
    weight = _constant_of(program, value.args[1])
    layer = None
    if weight is not None and weight.dtype == np.float32:
        layer = _conv2d(program, value, weight, name) if kind == "conv2d" else _dense(value, weight, name)
    if layer is None:
        opaque.append([name, kind])
    return layer


def _conv2d(program: Program, call: relax.Call, weight: Array, name: str) -> relax.Call | None:
    attrs = call.attrs
    if (attrs.data_layout, attrs.kernel_layout) != ("NHWC", "OHWI"):
        return None
    top, left, bottom, right = (int(extent) for extent in attrs.padding)
    x, (more_top, more_left, more_bottom, more_right) = _unpadded(program, call.args[0])
    stride_y, stride_x = (int(stride) for stride in attrs.strides)
    dilation_y, dilation_x = (int(step) for step in attrs.dilation)
    return ops.conv2d(
        x,
        constant(weight),
        name=name,
        strides=(stride_y, stride_x),
        padding=(top + more_top, left + more_left, bottom + more_bottom, right + more_right),
        dilation=(dilation_y, dilation_x),
        groups=int(attrs.groups),
    )


def _dense(call: relax.Call, weight: Array, name: str) -> relax.Call | None:
    if weight.ndim != 2 or len(call.args[0].ty.shape) < 2:
        return None
    return ops.dense(call.args[0], constant(weight.T), name=name)


def _unpadded(program: Program, x: relax.Expr) -> tuple[relax.Expr, Padding]:
    """What a zero padding of H and W pads, and by how much (t,l,b,r); `x` itself and nothing for any other value."""
    pad = program.values.get(x) if isinstance(x, relax.Var) else None
    if pad is None or op_name(pad) != "relax.nn.pad" or pad.attrs.pad_mode != "constant":
        return x, (0, 0, 0, 0)
    fill = array_of(pad.args[1]) if len(pad.args) > 1 else np.array(float(pad.attrs.pad_value))
    widths = [int(width) for width in pad.attrs.pad_width]
    if fill is None or fill != 0 or any(widths[:2]) or any(widths[6:]):
        return x, (0, 0, 0, 0)
    _, _, top, bottom, left, right, _, _ = widths
    return pad.args[0], (top, left, bottom, right)


def _name_of(program: Program, weight: relax.Expr) -> str | None:
    """The name above a weight, through permutes and reshapes."""
    value = program.values.get(weight) if isinstance(weight, relax.Var) else None
    if value is None:
        return None
    if op_name(value) == "horq.name":
        return str(value.attrs["name"])
    return _name_of(program, value.args[0]) if op_name(value) in ("relax.permute_dims", "relax.reshape") else None


def _constant_of(program: Program, weight: relax.Expr) -> Array | None:
    """The value of a constant under names, permutes and reshapes, None for any other expression."""
    value = program.values.get(weight, weight) if isinstance(weight, relax.Var) else weight
    if not isinstance(value, relax.Call):
        return array_of(value)
    inner = _constant_of(program, value.args[0]) if value.args else None
    if inner is None:
        return None
    if op_name(value) == "horq.name":
        return inner
    if op_name(value) == "relax.reshape":
        return inner.reshape(ops.shape_of(value))
    if op_name(value) == "relax.permute_dims":
        axes = value.attrs.axes
        return inner.transpose([int(axis) for axis in axes] if axes else None)
    return None
