"""`NameLayers`: a convolution or matrix product whose weight carries a name becomes a layer of the HORQ dialect."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

from horq_tvm import ops
from horq_tvm.layers import NOT_CONSTANT, OPAQUE_LAYERS
from horq_tvm.straightline import Array, Program, Writer, array_of, constant, op_name, read_main

Padding = tuple[int, int, int, int]


@tvm.transform.module_pass(opt_level=0, name="NameLayers")
class NameLayers:
    """Channels-last form → canonical form (docs/architecture.md, section 2).

    relax.nn.conv2d (NHWC, OHWI) → horq.conv2d, relax.matmul → horq.dense, where the weight is a constant under
    `horq.name`, permutes and reshapes, which are computed. A zero `nn.pad` of H and W before a conv becomes padding
    of the conv, so that `sample` and `static` do not take its zeros for elements.
    Layers with another weight stay what they are and are listed in the module attribute "horq.opaque_layers" as
    [name, "conv2d" or "dense", why it is none].
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
    """The layer that a binding is, None where it is none, or one whose weight is opaque (entered in `opaque`)."""
    kinds = {"relax.nn.conv2d": "conv2d", "relax.matmul": "dense"}
    kind = kinds.get(op_name(value))
    named = _name_of(program, value.args[1]) if kind else None
    if kind is None or named is None:
        return None
    weight = _constant_of(program, value.args[1])
    reason = _why_opaque(kind, value, weight)
    if reason is not None:
        opaque.append([str(named.attrs["name"]), kind, reason])
        return None
    assert weight is not None  # or there is a reason
    how: dict[str, Any] = {"name": str(named.attrs["name"]), "affines": int(named.attrs["affines"])}
    if kind == "dense":
        return ops.dense(value.args[0], constant(weight.T), **how)
    return _conv2d(program, value, weight, how)


def _why_opaque(kind: str, call: relax.Call, weight: Array | None) -> str | None:
    """Why a product is no layer of the dialect, None where it is one."""
    if weight is None:
        return NOT_CONSTANT
    if weight.dtype != np.float32:
        return f"its weights are {weight.dtype}, not float32"
    if kind == "dense":
        axes = weight.ndim
        return None if axes == 2 else f"its weights have {axes} {'axis' if axes == 1 else 'axes'}, not 2"
    layouts = call.attrs.data_layout, call.attrs.kernel_layout
    return None if layouts == ("NHWC", "OHWI") else f"its layouts are {' and '.join(layouts)}, not NHWC and OHWI"


def _conv2d(program: Program, call: relax.Call, weight: Array, how: dict[str, Any]) -> relax.Call:
    attrs = call.attrs
    top, left, bottom, right = (int(extent) for extent in attrs.padding)
    x, (more_top, more_left, more_bottom, more_right) = _unpadded(program, call.args[0])
    stride_y, stride_x = (int(stride) for stride in attrs.strides)
    dilation_y, dilation_x = (int(step) for step in attrs.dilation)
    return ops.conv2d(
        x,
        constant(weight),
        **how,
        strides=(stride_y, stride_x),
        padding=(top + more_top, left + more_left, bottom + more_bottom, right + more_right),
        dilation=(dilation_y, dilation_x),
        groups=int(attrs.groups),
    )


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


def _name_of(program: Program, weight: relax.Expr) -> relax.Call | None:
    """The `horq.name` above a weight, through permutes and reshapes."""
    value = program.values.get(weight) if isinstance(weight, relax.Var) else None
    if value is None:
        return None
    if op_name(value) == "horq.name":
        return value
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
