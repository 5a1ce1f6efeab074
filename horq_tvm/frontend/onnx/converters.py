"""Our converters of ONNX operators: named layers, and the cures for what TVM's converters refuse or get wrong.

Each takes a `Node` and returns its result. An operator that is not here goes to TVM's converter of its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import onnx
from tvm import relax

from ... import ops
from ...errors import HorqError
from ...specs import LayerConfig
from ...straightline import Array, constant
from .. import layers
from ..layers import Window
from . import linear


@dataclass(frozen=True)
class Node:
    """One ONNX node while it is converted. `inputs` holds None for what is left out, however far one indexes."""

    name: str
    op: str
    inputs: Sequence[relax.Expr | None]
    attrs: dict[str, Any]
    opset: int
    emit: Callable[[relax.Expr], relax.Expr]
    trained: dict[str, LayerConfig]

    def operand(self, index: int) -> relax.Expr:
        """An input that must be there."""
        value = self.inputs[index]
        if value is None:
            raise HorqError(f"found no input {index}; accepted is a tensor")
        return value

    def constant(self, index: int, what: str) -> Array | None:
        """The value of an optional input that must be constant, None if it is absent or empty."""
        if self.inputs[index] is None:
            return None
        value = layers.array(self.inputs[index])
        if value is None:
            raise HorqError(f"found {what} computed from the model's inputs; accepted are constants")
        return value if value.size else None


INTERNAL, FAKE_QUANTIZE = "horq.internal", "FakeQuantize"
"""A QuantizeLinear and its DequantizeLinear in one, which `model.pair_quantisations` makes of them."""

Converter = Callable[[Node], relax.Expr]
CONVERTERS: dict[tuple[str, str], Converter] = {}
"""By (domain, operator); the domain of the standard is empty."""


def converts(*ops: str, domain: str = "") -> Callable[[Converter], Converter]:
    """Enters a function into CONVERTERS."""

    def enter(convert: Converter) -> Converter:
        CONVERTERS.update({(domain, op): convert for op in ops})
        return convert

    return enter


def _window(node: Node, kernel: Sequence[int], *, group: int = 1) -> Window:
    """The window that `strides`, `dilations`, `pads` or `auto_pad` describe over an input [N,C,*spatial]."""
    axes = len(kernel)
    strides = tuple(node.attrs.get("strides", [1] * axes))
    dilations = tuple(node.attrs.get("dilations", [1] * axes))
    auto_pad = node.attrs.get("auto_pad", "NOTSET")
    if auto_pad == "NOTSET":
        return Window(strides, tuple(node.attrs.get("pads", [0] * 2 * axes)), dilations, group)
    if auto_pad == "VALID":
        return Window(strides, (0,) * 2 * axes, dilations, group)
    if auto_pad not in ("SAME_UPPER", "SAME_LOWER"):
        raise HorqError(f"found auto_pad {auto_pad!r}; accepted are NOTSET, VALID, SAME_UPPER, SAME_LOWER")
    begin, end = [], []
    for extent, size, stride, dilation in zip(
        layers.shape(node.operand(0))[2:], kernel, strides, dilations, strict=True
    ):
        steps = -(-extent // stride) - 1
        total = max(steps * stride + dilation * (size - 1) + 1 - extent, 0)
        less, more = total // 2, total - total // 2
        begin.append(less if auto_pad == "SAME_UPPER" else more)
        end.append(more if auto_pad == "SAME_UPPER" else less)
    return Window(strides, (*begin, *end), dilations, group)


@converts("Conv")
def conv(node: Node) -> relax.Expr:
    """Conv of one or two spatial axes → named conv2d and an add."""
    weight = node.operand(1)
    window = _window(node, layers.shape(weight)[2:], group=node.attrs.get("group", 1))
    return layers.convolution(node.emit, node.operand(0), weight, node.inputs[2], window, name=node.name)


@converts("Gemm")
def gemm(node: Node) -> relax.Expr:
    """Gemm → named matmul; its factors go behind it (α) and into the addend (β)."""
    x, weight, addend = node.operand(0), node.operand(1), node.inputs[2]
    alpha, beta = node.attrs.get("alpha", 1.0), node.attrs.get("beta", 1.0)
    if node.attrs.get("transA", 0):
        x = layers.transpose(node.emit, x, (1, 0))
    if node.attrs.get("transB", 0):
        weight = layers.transpose(node.emit, weight, (1, 0))
    factor = None if alpha == 1.0 else relax.const(alpha, "float32")
    if addend is None or beta == 0.0:
        addend = None
    elif beta != 1.0:
        value = layers.array(addend)
        addend = (
            node.emit(relax.op.multiply(addend, relax.const(beta, "float32")))
            if value is None
            else constant((value * np.float32(beta)).astype("float32"))
        )
    return layers.dense(node.emit, x, weight, addend, name=node.name, alpha=factor)


@converts("MatMul")
def matmul(node: Node) -> relax.Expr:
    """MatMul → named matmul, whatever its operands: which of them are layers is decided later."""
    return layers.dense(node.emit, node.operand(0), node.operand(1), None, name=node.name)


@converts("QuantizeLinear")
def quantize_linear(node: Node) -> relax.Expr:
    """QuantizeLinear of float32 → integers: clip(rint(x / scale) + zero point) of the zero point's type."""
    scale, zero = _linear(node)
    x = node.emit(relax.op.round(node.emit(relax.op.divide(node.operand(0), constant(scale)))))
    shifted = node.emit(relax.op.add(x, constant(zero.astype("float32"))))
    ends = np.iinfo(zero.dtype)
    clipped = layers.clip(node.emit, shifted, float(ends.min), float(ends.max))
    return node.emit(relax.op.astype(clipped, str(zero.dtype)))


@converts("DequantizeLinear")
def dequantize_linear(node: Node) -> relax.Expr:
    """DequantizeLinear of integers → float32: (q − zero point) · scale."""
    scale, zero = _linear(node)
    x = node.operand(0)
    if zero.any():  # among integers: (q − z)·s of floats would be compiled as q·s − z·s
        x = node.emit(relax.op.subtract(node.emit(relax.op.astype(x, "int32")), constant(zero.astype("int32"))))
    return node.emit(relax.op.multiply(node.emit(relax.op.astype(x, "float32")), constant(scale)))


@converts(FAKE_QUANTIZE, domain=INTERNAL)
def fake_quantize(node: Node) -> relax.Expr:
    """The two together, by one scale and zero point: the levels stay floats."""
    scale, zero = _linear(node)
    ends = np.iinfo(zero.dtype)
    step, level = float(scale.reshape(())), int(zero.reshape(()))
    return node.emit(
        ops.fake_quantize(node.operand(0), scale=step, zero_point=level, low=int(ends.min), high=int(ends.max))
    )


def _linear(node: Node) -> tuple[Array, Array]:
    """Scale float32 and zero point, constants, of one element or one along `axis`, in a shape that broadcasts."""
    scale, zero = node.constant(1, "a scale"), node.constant(2, "a zero point")
    x = node.operand(0)
    wanted = linear.kind_without_zero_point(node.attrs)
    kind = np.dtype(str(x.ty.dtype.dtype)) if node.op == "DequantizeLinear" else wanted
    zero = np.zeros((), kind) if zero is None else zero
    if scale is None or scale.dtype != np.float32 or zero.dtype.kind not in "iu" or zero.dtype.itemsize > 4:
        found = "none" if scale is None else f"{scale.dtype} and {zero.dtype}"
        raise HorqError(f"found scale and zero point {found}; accepted are float32 and integers of 8 to 32 bits")
    if "block_size" in node.attrs or scale.ndim > 1:
        raise HorqError(f"found scales {list(scale.shape)}; accepted are one, or one along an axis")
    rank, axis = layers.rank(x), node.attrs.get("axis", 1)
    return linear.along(scale, rank, axis), linear.along(np.broadcast_to(zero.ravel(), scale.size), rank, axis)


@converts("HorqConv2d", domain="horq")
def horq_conv2d(node: Node) -> relax.Expr:
    """X[N,C,H,W], W[F,C/g,kh,kw] of ±1, alpha[F], beta[K], bias[F] → conv2d · alpha + bias (interface.md)."""
    weight = node.operand(1)
    window = _window(node, layers.shape(weight)[2:], group=node.attrs.get("group", 1))
    node.trained[node.name] = _trained(node)
    alpha, bias = node.operand(2), node.inputs[4]
    return layers.convolution(node.emit, node.operand(0), weight, bias, window, name=node.name, alpha=alpha)


@converts("HorqLinear", domain="horq")
def horq_linear(node: Node) -> relax.Expr:
    """X[...,L], W[F,L] of ±1, alpha[F], beta[K], bias[F] → matmul · alpha + bias (interface.md)."""
    weight = layers.transpose(node.emit, node.operand(1), (1, 0))
    node.trained[node.name] = _trained(node)
    return layers.dense(node.emit, node.operand(0), weight, node.inputs[4], name=node.name, alpha=node.operand(2))


def _trained(node: Node) -> LayerConfig:
    missing = [key for key in ("order", "scale") if key not in node.attrs]
    if missing:
        raise HorqError(f"found no attribute {missing[0]!r}; accepted are order (int) and scale (string)")
    return layers.trained_config(node.name, node.attrs["order"], node.attrs["scale"], node.operand(1), node.inputs[3])


@converts("BatchNormalization")
def batch_normalization(node: Node) -> relax.Expr:
    """BatchNormalization in inference → multiply and add."""
    if node.attrs.get("training_mode", 0) or not node.attrs.get("spatial", 1):
        raise HorqError("found training_mode=1 or spatial=0; accepted is inference with one factor a channel")
    x, gamma, beta, mean, variance = (node.operand(i) for i in range(5))
    return layers.batch_norm(node.emit, x, gamma, beta, mean, variance, node.attrs.get("epsilon", 1e-5))


@converts("MaxPool")
def max_pool(node: Node) -> relax.Expr:
    """MaxPool → max_pool2d, rounding up turned into padding."""
    kernel = tuple(node.attrs["kernel_shape"])
    ceil_mode = bool(node.attrs.get("ceil_mode", 0))
    return layers.max_pool(node.emit, node.operand(0), kernel, _window(node, kernel), ceil_mode=ceil_mode)


@converts("AveragePool")
def average_pool(node: Node) -> relax.Expr:
    """AveragePool → avg_pool2d, rounding up turned into padding that does not count."""
    kernel = tuple(node.attrs["kernel_shape"])
    return layers.average_pool(
        node.emit,
        node.operand(0),
        kernel,
        _window(node, kernel),
        ceil_mode=bool(node.attrs.get("ceil_mode", 0)),
        count_include_pad=bool(node.attrs.get("count_include_pad", 0)),
    )


@converts("Clip")
def clip(node: Node) -> relax.Expr:
    """Clip by attributes (opset < 11) or inputs → maximum and minimum, which fuse and have a layout."""
    if node.opset < 11:
        low, high = node.attrs.get("min"), node.attrs.get("max")
    else:
        bounds = [node.constant(1, "a lower bound"), node.constant(2, "an upper bound")]
        low, high = (None if bound is None else float(bound.reshape(())) for bound in bounds)
    return layers.clip(node.emit, node.operand(0), low, high)


@converts("Sum", "Mean", "Max", "Min")
def variadic(node: Node) -> relax.Expr:
    """Sum, Mean, Max and Min of any number of tensors → a chain of two-operand operators."""
    binary = {"Sum": relax.op.add, "Mean": relax.op.add, "Max": relax.op.maximum, "Min": relax.op.minimum}[node.op]
    operands = [node.operand(i) for i in range(len(node.inputs))]
    y = reduce(lambda a, b: node.emit(binary(a, b)), operands)
    if node.op != "Mean" or len(operands) == 1:
        return y
    return node.emit(relax.op.divide(y, relax.const(len(operands), str(y.ty.dtype.dtype))))


@converts("Dropout")
def dropout(node: Node) -> relax.Expr:
    """Dropout in inference is the identity."""
    return node.operand(0)


@converts("Pad")
def pad(node: Node) -> relax.Expr:
    """Pad by attributes (opset < 11) or constant inputs → nn.pad."""
    x = node.operand(0)
    axes = list(range(layers.rank(x)))
    if node.opset < 11:
        pads, value = node.attrs.get("pads"), node.attrs.get("value", 0.0)
    else:
        amounts = node.constant(1, "pads")
        pads = None if amounts is None else amounts.tolist()
        fill = node.constant(2, "a fill value")
        value = 0.0 if fill is None else float(fill.reshape(()))
        chosen = node.constant(3, "axes")
        axes = axes if chosen is None else [int(axis) % len(axes) for axis in chosen]
    if pads is None or len(pads) != 2 * len(axes):
        raise HorqError(f"found pads {pads}; accepted are {2 * len(axes)} numbers")
    modes = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    mode = node.attrs.get("mode", "constant")
    if min(pads) < 0 or mode not in modes:
        raise HorqError(f"found mode {mode!r}, pads {pads}; accepted are {', '.join(modes)} by no less than 0")
    widths = [0] * 2 * layers.rank(x)
    for position, axis in enumerate(axes):
        widths[2 * axis : 2 * axis + 2] = int(pads[position]), int(pads[position + len(axes)])
    return x if not any(widths) else node.emit(relax.op.nn.pad(x, widths, modes[mode], value))


@converts("Flatten")
def flatten(node: Node) -> relax.Expr:
    """Flatten → reshape to two axes."""
    extents = layers.shape(node.operand(0))
    axis = node.attrs.get("axis", 1)
    if not -len(extents) <= axis <= len(extents):
        raise HorqError(f"found axis {axis}; accepted are {-len(extents)} to {len(extents)}")
    axis += len(extents) if axis < 0 else 0
    rows, columns = (int(np.prod(part, dtype=np.int64)) for part in (extents[:axis], extents[axis:]))
    return layers.reshape(node.emit, node.operand(0), (rows, columns))


@converts("Reshape")
def reshape(node: Node) -> relax.Expr:
    """Reshape to a constant shape; 0 keeps the extent of its position unless `allowzero`."""
    wanted = node.constant(1, "a shape")
    extents = layers.shape(node.operand(0))
    target = [] if wanted is None else [int(extent) for extent in wanted]
    if not node.attrs.get("allowzero", 0):
        target = [extents[axis] if extent == 0 else extent for axis, extent in enumerate(target)]
    return layers.reshape(node.emit, node.operand(0), target)


@converts("Softmax", "LogSoftmax")
def softmax(node: Node) -> relax.Expr:
    """(Log)Softmax along one axis, or (opset < 13) over all axes from `axis` on as one."""
    x = node.operand(0)
    op = relax.op.nn.softmax if node.op == "Softmax" else relax.op.nn.log_softmax
    extents = layers.shape(x)
    axis = node.attrs.get("axis", -1 if node.opset >= 13 else 1) % len(extents)
    if node.opset >= 13 or int(np.prod(extents[axis:])) == extents[axis]:
        return node.emit(op(x, axis))
    rows = int(np.prod(extents[:axis], dtype=np.int64))
    flat = node.emit(op(layers.reshape(node.emit, x, (rows, -1)), -1))
    return layers.reshape(node.emit, flat, extents)


@converts("GlobalAveragePool", "GlobalMaxPool")
def global_pool(node: Node) -> relax.Expr:
    """The mean or maximum over all spatial axes, which stay with extent 1."""
    op = relax.op.mean if node.op == "GlobalAveragePool" else relax.op.max
    return node.emit(op(node.operand(0), list(range(2, layers.rank(node.operand(0)))), keepdims=True))


@converts("HardSigmoid")
def hard_sigmoid(node: Node) -> relax.Expr:
    """max(0, min(1, alpha·x + beta))."""
    return _hard_sigmoid(node, node.attrs.get("alpha", 0.2), node.attrs.get("beta", 0.5))


@converts("HardSwish")
def hard_swish(node: Node) -> relax.Expr:
    """x · HardSigmoid(x; 1/6, 1/2)."""
    return node.emit(relax.op.multiply(node.operand(0), _hard_sigmoid(node, 1.0 / 6.0, 0.5)))


def _hard_sigmoid(node: Node, alpha: float, beta: float) -> relax.Expr:
    x = node.operand(0)
    dtype = str(x.ty.dtype.dtype)
    scaled = node.emit(relax.op.multiply(x, relax.const(alpha, dtype)))
    return layers.clip(node.emit, node.emit(relax.op.add(scaled, relax.const(beta, dtype))), 0.0, 1.0)


@converts("PRelu")
def prelu(node: Node) -> relax.Expr:
    """PRelu → nn.prelu where one axis has slopes, else x where x ≥ 0 and slope·x elsewhere."""
    x, slope = node.operand(0), node.operand(1)
    extents = layers.shape(slope)
    offset = layers.rank(x) - len(extents)
    own = [axis for axis, extent in enumerate(extents) if extent != 1]
    if not own:
        value = layers.array(slope)
        if value is not None:
            return node.emit(relax.op.nn.leakyrelu(x, float(value.reshape(()))))
    if len(own) == 1:
        vector = layers.reshape(node.emit, slope, (extents[own[0]],))
        return node.emit(relax.op.nn.prelu(x, vector, offset + own[0]))
    negative = node.emit(relax.op.less(x, relax.const(0, str(x.ty.dtype.dtype))))
    return node.emit(relax.op.where(negative, node.emit(relax.op.multiply(x, slope)), x))


@converts("Resize", "Upsample")
def resize(node: Node) -> relax.Expr:
    """Resize of the spatial axes of [N,C,H,W] by a constant factor or to a constant size → image.resize2d."""
    x = node.operand(0)
    extents = layers.shape(x)
    if len(extents) != 4:
        raise HorqError(f"found a {list(extents)} tensor; accepted is [N,C,H,W]")
    old = node.op == "Upsample" or node.opset < 11
    if old:
        scales = node.attrs["scales"] if "scales" in node.attrs else node.constant(1, "scales")
        sizes = None
    else:
        scales, sizes = node.constant(2, "scales"), node.constant(3, "sizes")
    target = list(extents)
    axes = [int(axis) % 4 for axis in node.attrs.get("axes", range(4))]
    for position, axis in enumerate(axes):
        if sizes is not None:
            target[axis] = int(sizes[position])
        elif scales is not None:
            exact = float(scales[position]) * extents[axis]
            target[axis] = int(np.floor(exact + 1e-4))
            if abs(exact - target[axis]) > 1e-4:
                raise HorqError(f"found scales {list(scales)} that give {exact}; accepted are whole sizes")
    policy = node.attrs.get("keep_aspect_ratio_policy", "stretch")
    if target[:2] != list(extents[:2]) or policy != "stretch":
        raise HorqError(f"found a resize to {target} with policy {policy!r}; accepted is a stretch of H and W")
    return node.emit(_resize2d(node, x, target[2:], old))


def _resize2d(node: Node, x: relax.Expr, size: list[int], old: bool) -> relax.Expr:
    mode = node.attrs.get("mode", "nearest")
    methods = {"nearest": "nearest_neighbor", "linear": "linear", "bilinear": "linear", "cubic": "cubic"}
    coordinates = "asymmetric" if old else node.attrs.get("coordinate_transformation_mode", "half_pixel")
    accepted = ("half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel")
    if mode not in methods or coordinates not in accepted or node.attrs.get("antialias", 0):
        raise HorqError(
            f"found mode {mode!r}, coordinates {coordinates!r}; accepted are {', '.join(methods)} without antialias "
            f"and {', '.join(accepted)}"
        )
    rounding = "floor" if old else node.attrs.get("nearest_mode", "round_prefer_floor")
    return relax.op.image.resize2d(
        x,
        tuple(size),
        layout="NCHW",
        method=methods[mode],
        coordinate_transformation_mode=coordinates,
        rounding_method=rounding if mode == "nearest" else "",
        cubic_alpha=node.attrs.get("cubic_coeff_a", -0.75),
        cubic_exclude=node.attrs.get("exclude_outside", 0),
        out_dtype=str(x.ty.dtype.dtype),
    )


@converts("Identity", "Cast")
def unchanged_or_cast(node: Node) -> relax.Expr:
    """Identity, and a Cast to a numeric type."""
    x = node.operand(0)
    if node.op == "Identity":
        return x
    dtype = str(onnx.helper.tensor_dtype_to_np_dtype(node.attrs["to"]))
    return x if dtype == str(x.ty.dtype.dtype) else node.emit(relax.op.astype(x, dtype))


@converts("Squeeze", "Unsqueeze")
def squeeze(node: Node) -> relax.Expr:
    """Squeeze and Unsqueeze by attribute (opset < 13) or constant input → reshape."""
    x = node.operand(0)
    extents = list(layers.shape(x))
    axes = node.attrs.get("axes")
    if axes is None:
        given = node.constant(1, "axes")
        axes = None if given is None else given.reshape(-1).tolist()
    if node.op == "Squeeze":
        gone = {a for a, e in enumerate(extents) if e == 1} if axes is None else {int(a) % len(extents) for a in axes}
        return layers.reshape(node.emit, x, [e for a, e in enumerate(extents) if a not in gone])
    total = len(extents) + len(axes or [])
    for axis in sorted(int(a) % total for a in axes or []):
        extents.insert(axis, 1)
    return layers.reshape(node.emit, x, extents)


@converts("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin")
def reduction(node: Node) -> relax.Expr:
    """A reduction over axes given by attribute or constant input; none means all, unless the node says so."""
    x = node.operand(0)
    axes = node.attrs.get("axes")
    if axes is None:
        given = node.constant(1, "axes")
        axes = None if given is None else given.tolist()
    if axes is None and node.attrs.get("noop_with_empty_axes", 0):
        return x
    op = {"Mean": relax.op.mean, "Sum": relax.op.sum, "Max": relax.op.max, "Min": relax.op.min}[node.op[6:]]
    chosen = None if axes is None else [int(axis) for axis in axes]
    return node.emit(op(x, chosen, bool(node.attrs.get("keepdims", 1))))
