"""Small modules in canonical form, and an interpreter in NumPy that says what they mean before and after a pass.

The interpreter is float64 wherever the contract has no bits to keep (design.md, Arithmetic), so that two forms of a
program part by the rounding of their constants alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax

from horq_tvm import ops
from horq_tvm.straightline import op_name, read_main

Array = np.ndarray[Any, Any]
Body = Callable[..., "relax.Expr | Sequence[relax.Expr]"]


def module(shapes: Sequence[tuple[int, ...]], body: Body, dtype: str = "float32") -> tvm.IRModule:
    """main(x0, x1, ...) of `shapes`, returning what `body(emit, x0, x1, ...)` returns."""
    builder = relax.BlockBuilder()
    params = [relax.Var(f"x{i}", relax.TensorType(shape, dtype)) for i, shape in enumerate(shapes)]
    with builder.function("main", params):
        with builder.dataflow():
            output = builder.emit_output(body(builder.emit, *params))
        builder.emit_func_output(output)
    return builder.get()


def names(mod: tvm.IRModule) -> list[str]:
    """The operators that main calls, in order; calls of functions by the functions' names."""
    values = [value for _, value in read_main(mod).bindings if isinstance(value, relax.Call)]
    return [op_name(value) or value.op.name_hint for value in values]


def run(mod: tvm.IRModule, *inputs: Array) -> list[Array]:
    """The outputs of main."""
    return _run_function(mod, mod["main"], inputs)


def _run_function(mod: tvm.IRModule, function: relax.Function, inputs: Sequence[Any]) -> list[Array]:
    env: dict[relax.Var, Any] = dict(zip(function.params, inputs, strict=True))
    for block in function.body.blocks:
        for binding in block.bindings:
            env[binding.var] = _value(mod, binding.value, env)
    result = _value(mod, function.body.body, env)
    return list(result) if isinstance(result, tuple) else [result]


def _value(mod: tvm.IRModule, expr: Any, env: Mapping[relax.Var, Any]) -> Any:
    if isinstance(expr, relax.Var):
        return env[expr]
    if isinstance(expr, tvm.ir.GenericConst):
        return expr.value.numpy()
    if isinstance(expr, relax.Tuple):
        return tuple(_value(mod, field, env) for field in expr.fields)
    if isinstance(expr, relax.TupleGetItem):
        return _value(mod, expr.tuple_value, env)[expr.index]
    if isinstance(expr, relax.ShapeExpr):
        return tuple(int(extent) for extent in expr.values)
    if isinstance(expr, tvm.tirx.IntImm | tvm.tirx.FloatImm):
        return expr.value
    args = [_value(mod, arg, env) for arg in expr.args]
    if isinstance(expr.op, tvm.ir.GlobalVar):
        outputs = _run_function(mod, mod[expr.op], args)
        return tuple(outputs) if len(outputs) > 1 else outputs[0]
    return OPS[expr.op.name](expr.attrs, *args)


def _windows(x: Array, geometry: ops.Geometry, fill: float = 0) -> Array:
    """x [N,H,W,...] → [N,HO,WO,kh,kw,...]."""
    top, left, bottom, right = geometry.padding
    padded = np.pad(x, [(0, 0), (top, bottom), (left, right)] + [(0, 0)] * (x.ndim - 3), constant_values=fill)
    height, width = geometry.output_size(*x.shape[1:3])
    rows = np.arange(height)[:, None] * geometry.strides[0] + np.arange(geometry.kernel[0]) * geometry.dilation[0]
    columns = np.arange(width)[:, None] * geometry.strides[1] + np.arange(geometry.kernel[1]) * geometry.dilation[1]
    return padded[:, rows[:, None, :, None], columns[None, :, None, :]]


def _grouped_conv(x: Array, weight: Array, geometry: ops.Geometry) -> Array:
    """x [N,H,W,C], weight [F,kh,kw,C/G] → float64 [N,HO,WO,F]."""
    groups = geometry.groups
    windows = _windows(x.astype("float64"), geometry)
    windows = windows.reshape(*windows.shape[:5], groups, -1)
    grouped = weight.astype("float64").reshape(groups, -1, *weight.shape[1:])
    out = np.einsum("nyxijgc,gfijc->nyxgf", windows, grouped)
    return out.reshape(*out.shape[:3], -1)


def _residuals(x: Array, beta: Array, order: int) -> list[Array]:
    """x float32, β [..., K] broadcastable to x without its last axis of β → bool planes, True for +1."""
    residual, planes = x.astype("float32"), []
    for i in range(order):
        planes.append(residual >= 0)
        b = beta[..., i]
        residual = (residual - np.where(planes[-1], b, -b)).astype("float32")
    return planes


def _pack(bits: Array) -> Array:
    """bool [..., c] → uint32 [..., words], bit i of word j is element 32·j+i."""
    words = -(-bits.shape[-1] // 32)
    padded = np.zeros((*bits.shape[:-1], words * 32), "uint64")
    padded[..., : bits.shape[-1]] = bits
    return (padded.reshape(*bits.shape[:-1], words, 32) << np.arange(32, dtype="uint64")).sum(-1).astype("uint32")


def _unpack(words: Array, channels: int) -> Array:
    """uint32 [..., words] → bool [..., channels]."""
    bits = (words[..., None] >> np.arange(32, dtype="uint32")) & 1
    return bits.reshape(*words.shape[:-1], -1)[..., :channels].astype(bool)


def _rows(x: Array, geometry: ops.Geometry) -> Array:
    """x [N,H,W,C] → [N,HO,WO,G,kh·kw,C/G]."""
    windows = _windows(x, geometry)
    windows = windows.reshape(*windows.shape[:5], geometry.groups, -1)
    return np.moveaxis(windows, 5, 3).reshape(*windows.shape[:3], geometry.groups, -1, windows.shape[-1])


def _on_line(x: Array, line: Sequence[Array]) -> Array:
    """x·factor + addend where they are given."""
    return (x * line[0] + line[1]).astype("float32") if line else x


def _scales(attrs: Any, x: Array, *line: Array, scale: str | None = None) -> Array:
    order, patch, x = int(attrs["order"]), (scale or attrs["scale"]) == "patch", _on_line(x, line)
    values = _rows(x, ops.Geometry.of(attrs)) if patch else x
    axes = (-2, -1) if patch else (1, 2, 3)
    residual, betas = values.astype("float32"), []
    for _ in range(order):
        betas.append(np.abs(residual.astype("float64")).mean(axes).astype("float32"))
        b = np.expand_dims(betas[-1], axes)
        residual = (residual - np.where(residual >= 0, b, -b)).astype("float32")
    return np.stack(betas, -1)


def _patch(attrs: Any, x: Array, *line: Array) -> tuple[Array, Array]:
    beta = _scales(attrs, x, *line, scale="patch")
    return beta, _binarize(attrs, x, beta, *line, scale="patch")


def _binarize(attrs: Any, x: Array, beta: Array, *line: Array, scale: str | None = None) -> Array:
    order, first, geometry = int(attrs["order"]), int(attrs["first"]), ops.Geometry.of(attrs)
    x = _on_line(x, line)
    if (scale or attrs["scale"]) == "patch":
        rows = _rows(x, geometry)
        packed = [_pack(bits) for bits in _residuals(rows, beta[..., None, None, :], order)[first:]]
        return np.stack([words.reshape(*words.shape[:4], -1) for words in packed], 4)
    grouped = x.reshape(*x.shape[:3], geometry.groups, -1)
    planes = _residuals(grouped, beta[:, None, None, None, None, :], order)[first:]
    return np.stack([_pack(bits) for bits in planes], 4)


def _bitserial(attrs: Any, planes: Array, weight: Array, alpha: Array, bias: Array, beta: Array) -> Array:
    """The contract, literally: α·Σ β_i·S_i + bias, S_i by a float64 convolution of ±1, padding contributing 0."""
    geometry, first, patch = ops.Geometry.of(attrs), int(attrs["first"]), attrs["scale"] == "patch"
    channels, filters = weight.shape[3], weight.shape[0]
    beta = beta if patch else beta[:, None, None, None, :]
    total: Any = 0.0
    for i in range(int(attrs["order"])):
        if patch:
            taps = geometry.kernel[0] * geometry.kernel[1]
            shape = (*planes.shape[:4], taps, -1)
            bits = _unpack(planes[..., i - first, :].reshape(shape), channels) if i >= first else None
            signs = np.ones((*planes.shape[:4], taps, channels)) if bits is None else np.where(bits, 1, -1)
            grouped = weight.reshape(geometry.groups, -1, taps, channels)
            sums = np.einsum("nyxgtc,gftc->nyxgf", signs, grouped)
        else:
            bits = _unpack(planes[..., i - first, :], channels) if i >= first else None
            signs = np.ones((*planes.shape[:4], channels)) if bits is None else np.where(bits, 1, -1)
            sums = _grouped_conv(signs.reshape(*signs.shape[:3], -1), weight, geometry)
            sums = sums.reshape(*sums.shape[:3], geometry.groups, -1)
        total = total + sums * beta[..., i].astype("float64")[..., None]
    total = total.reshape(*total.shape[:3], filters)
    return alpha * total + bias


def _class(position: int, bounds: Sequence[int]) -> int:
    low, high = (int(bound) for bound in bounds)
    return min(position, low) + max(position - high, 0)


def _packed_bitserial(attrs: Any, planes: Array, weight: Array, start: Array, *factors: Array) -> Array:
    """What a kernel does: integer sums of popcounts from a start by border class, then the factors."""
    geometry, first, order = ops.Geometry.of(attrs), int(attrs["first"]), int(attrs["order"])
    groups, blocks, _, _, _, lanes = weight.shape
    filters = int(attrs["channels"])
    windows = _windows(planes, geometry)  # [N,HO,WO,kh,kw,G,P,words]
    words = np.moveaxis(weight, 5, 2).reshape(groups, blocks * lanes, *weight.shape[2:5])  # [G,B·v,kh,kw,words]
    xored = windows[:, :, :, :, :, :, :, None] ^ np.moveaxis(words, (2, 3), (0, 1))[:, :, :, None]
    counts = np.bitwise_count(xored).sum((3, 4, -1), dtype="int64")  # [N,HO,WO,G,P,B·v]
    rows = [_class(y, attrs["rows"]) for y in range(counts.shape[1])]
    columns = [_class(x, attrs["columns"]) for x in range(counts.shape[2])]
    begin = start[np.ix_(rows, columns)][None, :, :, :, None, :]
    sums = begin + counts if int(attrs["halved"]) else begin - 2 * counts
    sums = np.moveaxis(sums[..., : filters // groups], 4, 3).reshape(*sums.shape[:3], sums.shape[4], filters)
    if attrs["scale"] == "static":
        scale, addend = (factor.astype("float64") for factor in factors)
        addend = addend if addend.shape[:2] == (1, 1) else addend[np.ix_(rows, columns)]
        return (sums * scale).sum(3) + addend
    alpha, bias, beta, *first_sum = (factor.astype("float64") for factor in factors)
    patch = attrs["scale"] == "patch"
    total = np.zeros((*sums.shape[:3], filters))
    for i in range(order):
        value = sums[:, :, :, i - first] if i >= first else first_sum[0][np.ix_(rows, columns)][None]
        b = np.repeat(beta[..., i], filters // groups, axis=-1) if patch else beta[:, None, None, i, None]
        total += value * b
    return alpha * total + bias


def _packed_conv2d(attrs: Any, x: Array, weight: Array) -> Array:
    filters, groups = int(attrs["channels"]), int(attrs["groups"])
    flat = np.moveaxis(weight, 5, 2).reshape(groups, -1, *weight.shape[2:5])[:, : filters // groups]
    return _grouped_conv(x, flat.reshape(filters, *weight.shape[2:5]), ops.Geometry.of(attrs))


def _packed_depthwise(attrs: Any, x: Array, weight: Array) -> Array:
    return _grouped_conv(x, np.moveaxis(weight, 2, 0)[..., None], ops.Geometry.of(attrs))


def _pad(attrs: Any, x: Array, value: float = 0.0) -> Array:
    width = [int(extent) for extent in attrs.pad_width]
    return np.pad(x, list(zip(width[::2], width[1::2], strict=True)), constant_values=value)


def _pad_planes(attrs: Any, planes: Array) -> Array:
    top, left, bottom, right = (int(extent) for extent in attrs["padding"])
    return np.pad(planes, [(0, 0), (top, bottom), (left, right)] + [(0, 0)] * 3)


OPS: dict[str, Callable[..., Any]] = {
    "horq.conv2d": lambda attrs, x, w: _grouped_conv(x, w, ops.Geometry.of(attrs)),
    "horq.dense": lambda attrs, x, w: x.astype("float64") @ w.astype("float64").T,
    "horq.scales": _scales,
    "horq.binarize": _binarize,
    "horq.patch": _patch,
    "horq.bitserial_conv2d": _bitserial,
    "horq.bitserial_dense": _bitserial,
    "horq.pad_planes": _pad_planes,
    "horq.packed_bitserial": _packed_bitserial,
    "horq.packed_conv2d": _packed_conv2d,
    "horq.packed_depthwise": _packed_depthwise,
    "relax.add": lambda _, a, b: a + b,
    "relax.subtract": lambda _, a, b: a - b,
    "relax.multiply": lambda _, a, b: a * b,
    "relax.divide": lambda _, a, b: a / b,
    "relax.maximum": lambda _, a, b: np.maximum(a, b),
    "relax.negative": lambda _, a: -a,
    "relax.nn.relu": lambda _, a: np.maximum(a, 0),
    "relax.sigmoid": lambda _, a: 1 / (1 + np.exp(-a)),
    "relax.clip": lambda _, a, low, high: np.clip(a, low, high),
    "relax.reshape": lambda _, a, shape: a.reshape(shape),
    "relax.concat": lambda attrs, fields: np.concatenate(fields, int(attrs.axis)),
    "relax.nn.pad": _pad,
}
