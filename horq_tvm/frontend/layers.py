"""The Relax form that both front ends give a layer (docs/architecture.md, section 1).

Everything known at import time is computed here in NumPy, so that a weight is one constant and nothing is left to fold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tvm import relax

from .. import ops
from ..errors import HorqError
from ..specs import MAX_ORDER, SCALES, LayerConfig
from ..straightline import Array, array_of, constant
from .imported import static_shape

Emit = Callable[[relax.Expr], relax.Var]


@dataclass(frozen=True)
class Window:
    """Strides, padding (begin of each axis, then end of each axis), dilation and groups; one or two spatial axes."""

    strides: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def planar(self) -> Window:
        """The same window over two axes: a single axis becomes the second one, of height 1."""
        if len(self.strides) == 2:
            return self
        begin, end = self.padding
        return Window((1, *self.strides), (0, begin, 0, end), (1, *self.dilation), self.groups)


def array(expr: relax.Expr | None) -> Array | None:
    """The value of a constant expression, None for any other and for an operand that is left out."""
    return None if expr is None else array_of(expr)


def rank(expr: relax.Expr) -> int:
    """The number of axes of a tensor expression of static shape."""
    return len(shape(expr))


def shape(expr: relax.Expr) -> tuple[int, ...]:
    """The static shape of a tensor expression. Raises HorqError where there is none."""
    found = static_shape(expr)
    if found is None:
        raise HorqError(f"found a value of type {expr.ty}; accepted are tensors of static shape")
    return found


def reshape(emit: Emit, expr: relax.Expr, new_shape: Sequence[int]) -> relax.Expr:
    """`expr` in another shape; a constant at once."""
    value = array(expr)
    if value is not None:
        return constant(value.reshape(tuple(new_shape)))
    return emit(relax.op.reshape(expr, tuple(new_shape)))


def transpose(emit: Emit, expr: relax.Expr, axes: Sequence[int]) -> relax.Expr:
    """`expr` with its axes permuted; a constant at once."""
    value = array(expr)
    if value is not None:
        return constant(value.transpose(tuple(axes)))
    return emit(relax.op.permute_dims(expr, list(axes)))


def per_channel(emit: Emit, vector: relax.Expr, axes: int) -> relax.Expr:
    """A vector [C] in the shape that broadcasts along axis 1 of `axes` axes: [1,C,1,1], [C] for a matrix."""
    return reshape(emit, vector, (1, -1, *[1] * (axes - 2)) if axes > 2 else (-1,))


def convolution(
    emit: Emit,
    x: relax.Expr,
    weight: relax.Expr,
    bias: relax.Expr | None,
    window: Window,
    *,
    name: str,
    alpha: relax.Expr | None = None,
) -> relax.Expr:
    """x float32 [N,C,(H,)W], weight [F,C/g,(kh,)kw], alpha and bias [F] → [N,F,(HO,)WO], a named `relax.nn.conv2d`.

    A 1-D convolution is a 2-D one of height 1 between two reshapes. Raises HorqError for three and more axes.
    """
    shape_of_x, shape_of_w = shape(x), shape(weight)
    _need_float32(name, x, weight)
    if len(shape_of_x) not in (3, 4) or len(shape_of_w) != len(shape_of_x):
        raise HorqError(
            f"layer {name!r}: found a convolution of a {list(shape_of_x)} tensor by a {list(shape_of_w)} weight; "
            "accepted are 1-D and 2-D convolutions"
        )
    line = len(shape_of_x) == 3
    if line:
        x = reshape(emit, x, (*shape_of_x[:2], 1, shape_of_x[2]))
        weight = reshape(emit, weight, (*shape_of_w[:2], 1, shape_of_w[2]))
    planar = window.planar()
    _need_a_window(shape(x), shape(weight)[2:], planar)
    named = emit(ops.name(weight, name=name, affines=_count(alpha, bias)))
    y = emit(
        relax.op.nn.conv2d(
            x,
            named,
            strides=planar.strides,
            padding=planar.padding,
            dilation=planar.dilation,
            groups=planar.groups,
            data_layout="NCHW",
            kernel_layout="OIHW",
        )
    )
    if line:
        n, f, _, wo = shape(y)
        y = reshape(emit, y, (n, f, wo))
    if alpha is not None:
        y = emit(relax.op.multiply(y, per_channel(emit, alpha, rank(y))))
    return y if bias is None else emit(relax.op.add(y, per_channel(emit, bias, rank(y))))


def dense(
    emit: Emit,
    x: relax.Expr,
    weight: relax.Expr,
    bias: relax.Expr | None,
    *,
    name: str,
    alpha: relax.Expr | None = None,
) -> relax.Expr:
    """x float32 [...,L], weight [L,F] (or what else a matmul takes), alpha and bias [F] → [...,F], a named matmul.

    A vector [L] is a row [1,L] between two reshapes: what is named has a batch.
    """
    _need_float32(name, x, weight)
    named = emit(ops.name(weight, name=name, affines=_count(alpha, bias)))
    if rank(x) == 1 and rank(weight) == 2:
        y = reshape(emit, emit(relax.op.matmul(reshape(emit, x, (1, -1)), named)), (-1,))
    else:
        y = emit(relax.op.matmul(x, named))
    if alpha is not None:
        y = emit(relax.op.multiply(y, alpha))
    return y if bias is None else emit(relax.op.add(y, bias))


def _count(*operands: relax.Expr | None) -> int:
    return sum(operand is not None for operand in operands)


def batch_norm(
    emit: Emit,
    x: relax.Expr,
    gamma: relax.Expr | None,
    beta: relax.Expr | None,
    mean: relax.Expr,
    variance: relax.Expr,
    epsilon: float,
) -> relax.Expr:
    """Batch normalisation in inference, (x − μ)·γ/√(σ² + ε) + β over axis 1, as one multiply and one add.

    Factor and addend are computed in float64 and rounded once. Raises HorqError unless the parameters are constant.
    """
    ones = np.ones(shape(mean))
    mu, var = _parameter(mean, ones), _parameter(variance, ones)
    scale = _parameter(gamma, ones) / np.sqrt(var + epsilon)
    shift = _parameter(beta, 0 * ones) - mu * scale
    dtype = str(x.ty.dtype.dtype)
    scaled = emit(relax.op.multiply(x, per_channel(emit, constant(scale.astype(dtype)), rank(x))))
    return emit(relax.op.add(scaled, per_channel(emit, constant(shift.astype(dtype)), rank(x))))


def _parameter(expr: relax.Expr | None, default: Array) -> Array:
    """A parameter of batch normalisation in float64, `default` where it is left out."""
    if expr is None:
        return default
    value = array(expr)
    if value is None:
        raise HorqError("batch normalisation: found parameters that are computed; accepted are constants")
    return value.astype(np.float64)


def trained_config(name: str, order: int, scale: str, weight: relax.Expr, beta: relax.Expr | None) -> LayerConfig:
    """The configuration that a HORQ node states. Raises HorqError where node and contract (interface.md) disagree."""
    if not 1 <= order <= MAX_ORDER:
        raise HorqError(f"HORQ layer {name!r}: found order {order}; accepted are 1 to {MAX_ORDER}")
    if scale not in SCALES:
        raise HorqError(f"HORQ layer {name!r}: found scale {scale!r}; accepted are {', '.join(SCALES)}")
    signs = array(weight)
    if signs is None or not np.all(np.abs(signs) == 1.0):
        raise HorqError(f"HORQ layer {name!r}: found a weight that is not constant ±1; accepted are ±1 constants")
    if scale != "static":
        return LayerConfig(order, scale)
    betas = array(beta)
    if betas is None or betas.size != order:
        found = "none" if betas is None else str(betas.size)
        raise HorqError(f"HORQ layer {name!r}: found {found} constant betas; accepted are {order}, one an order")
    return LayerConfig(order, "static", tuple(float(b) for b in betas.reshape(-1)))


def max_pool(emit: Emit, x: relax.Expr, kernel: tuple[int, ...], window: Window, *, ceil_mode: bool) -> relax.Expr:
    """The maximum over windows of x [N,C,(H,)W]; `ceil_mode` becomes padding, which a maximum cannot see."""
    if ceil_mode:
        window = _ceil(x, kernel, window)

    def pool(planar: relax.Expr, kernel_2d: tuple[int, ...], w: Window) -> relax.Expr:
        return relax.op.nn.max_pool2d(planar, kernel_2d, w.strides, w.padding, w.dilation)

    return _pool(emit, x, kernel, window, pool)


def average_pool(
    emit: Emit,
    x: relax.Expr,
    kernel: tuple[int, ...],
    window: Window,
    *,
    ceil_mode: bool,
    count_include_pad: bool,
) -> relax.Expr:
    """The mean over windows of x [N,C,(H,)W]. What `ceil_mode` adds at the end never counts as an element."""
    if ceil_mode:
        longer = _ceil(x, kernel, window)
        if count_include_pad and longer != window and any(window.padding):
            # Two kinds of padding: the zeros that count become elements, the rest stays padding.
            axes = len(window.strides)
            pairs = [(0, 0), (0, 0), *zip(window.padding[:axes], window.padding[axes:], strict=True)]
            x = emit(relax.op.nn.pad(x, [width for pair in pairs for width in pair]))
            extra = tuple(a - b for a, b in zip(longer.padding, window.padding, strict=True))
            window, count_include_pad = Window(window.strides, extra, window.dilation), False
        elif longer != window:
            window, count_include_pad = longer, False

    def pool(planar: relax.Expr, kernel_2d: tuple[int, ...], w: Window) -> relax.Expr:
        return relax.op.nn.avg_pool2d(
            planar, kernel_2d, w.strides, w.padding, w.dilation, count_include_pad=count_include_pad
        )

    return _pool(emit, x, kernel, window, pool)


def _pool(
    emit: Emit,
    x: relax.Expr,
    kernel: tuple[int, ...],
    window: Window,
    pool: Callable[[relax.Expr, tuple[int, ...], Window], relax.Expr],
) -> relax.Expr:
    """`pool` on a tensor of one or two spatial axes. Raises HorqError for more."""
    extents = shape(x)
    if len(kernel) not in (1, 2) or len(extents) != len(kernel) + 2:
        raise HorqError(
            f"found pooling by {list(kernel)} of a {list(extents)} tensor; accepted are 1-D and 2-D pooling"
        )
    if len(kernel) == 2:
        _need_a_window(extents, kernel, window)
        return emit(pool(x, kernel, window))
    _need_a_window((*extents[:2], 1, extents[2]), (1, *kernel), window.planar())
    y = emit(pool(reshape(emit, x, (*extents[:2], 1, extents[2])), (1, *kernel), window.planar()))
    n, c, _, wo = shape(y)
    return reshape(emit, y, (n, c, wo))


def _ceil(x: relax.Expr, kernel: tuple[int, ...], window: Window) -> Window:
    """The window with the end padding that makes rounding down give what rounding up gives.

    A last window that would start in the end padding is dropped, as PyTorch does and ONNX says since opset 19.
    """
    axes = len(kernel)
    begin, end = list(window.padding[:axes]), list(window.padding[axes:])
    for axis, extent in enumerate(shape(x)[2:]):
        stride, span = window.strides[axis], window.dilation[axis] * (kernel[axis] - 1) + 1
        steps = -(-(extent + begin[axis] + end[axis] - span) // stride)
        if steps * stride >= extent + begin[axis]:
            steps -= 1
        end[axis] = max(end[axis], steps * stride + span - extent - begin[axis])
    return Window(window.strides, (*begin, *end), window.dilation, window.groups)


def clip(emit: Emit, x: relax.Expr, low: float | None, high: float | None) -> relax.Expr:
    """min(max(x, low), high); a bound that is None, infinite or NaN is no bound."""
    dtype = str(x.ty.dtype.dtype)
    if low is not None and low > -np.inf:
        x = emit(relax.op.nn.relu(x) if low == 0 else relax.op.maximum(x, relax.const(low, dtype)))
    if high is not None and high < np.inf:
        x = emit(relax.op.minimum(x, relax.const(high, dtype)))
    return x


def _need_a_window(image: Sequence[int], kernel: Sequence[int], window: Window) -> None:
    """HorqError where not one window of `kernel` fits the padded image [N,C,H,W]: TVM goes on with a negative size."""
    padded = [image[2 + axis] + window.padding[axis] + window.padding[2 + axis] for axis in (0, 1)]
    spans = [window.dilation[axis] * (kernel[axis] - 1) + 1 for axis in (0, 1)]
    if padded[0] < spans[0] or padded[1] < spans[1]:
        raise HorqError(f"found an image of {padded} with its padding; accepted is no less than a window, {spans}")


def _need_float32(name: str, *operands: relax.Expr) -> None:
    for operand in operands:
        if operand.ty.dtype.dtype != "float32":
            raise HorqError(f"layer {name!r}: found dtype {operand.ty.dtype.dtype}; accepted is float32")
