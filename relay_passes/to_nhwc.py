"""`ToNHWC`: channels become the last axis, and as few permutes as possible stay.

TVM's own ConvertLayout stops at clip, leakyrelu, pad, where and reshape, crashes on a stacked sum, and leaves a permute
at every flatten. Here a permute is never emitted where it arises: each value is remembered as a permuted view of a
tensor that exists, an operator that does not care about the order of axes works on that tensor, and a permute is
written only where an operator needs an order that does not exist yet.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax

from horq_tvm import ops
from horq_tvm.straightline import Array, Program, Writer, array_of, constant, op_name, read_main, substitute, vars_of

Axes = tuple[int, ...]

UNARY = {
    *("abs", "astype", "ceil", "erf", "exp", "floor", "log", "negative", "round", "rsqrt", "sigmoid", "sign", "sqrt"),
    *("square", "tanh", "trunc", "logical_not", "cos", "sin", "isnan"),
    "horq.fake_quantize",
    *("nn.gelu", "nn.gelu_tanh", "nn.leakyrelu", "nn.relu", "nn.selu", "nn.silu", "nn.softplus"),
}
NARY = {
    *("add", "divide", "floor_divide", "maximum", "minimum", "multiply", "power", "subtract", "where"),
    *("equal", "greater", "greater_equal", "less", "less_equal", "not_equal", "logical_and", "logical_or"),
}
REDUCTIONS = {"max", "mean", "min", "prod", "sum"}


def channels_last(rank: int) -> Axes:
    """Where each axis of [N,C,*spatial] lies in [N,*spatial,C]."""
    return (0, rank - 1, *range(1, rank - 1)) if rank > 2 else tuple(range(rank))


@dataclass(frozen=True)
class _View:
    """A value of the old program: axis i of it is axis `axes[i]` of `base`, a tensor of the new one.

    `features` = (C, P) marks a matrix whose rows are an image [C, P pixels] in the old program and [P, C] in `base`: a
    flatten that has not been undone. `axes` is None for a tuple.
    """

    base: relax.Expr
    axes: Axes | None
    features: tuple[int, int] | None = None


@tvm.transform.module_pass(opt_level=0, name="ToNHWC")
class ToNHWC:
    """Imported form → channels last (docs/architecture.md, sections 1 and 2); main's parameters and results stay.

    conv2d becomes NHWC/OHWI, clip becomes maximum (relu for 0) and minimum, a subtracted constant an added one;
    constants of elementwise operators broadcast from the last axis ([C] where they were [1,C,1,1]).
    """

    def transform_module(self, mod: tvm.IRModule, _context: Any) -> tvm.IRModule:
        mod = relax.transform.FoldConstant()(mod)
        program = read_main(mod)
        with Writer(mod, program) as writer:
            layout = _Layout(writer, program)
            for var, value in program.bindings:
                layout.views[var] = layout.convert(value)
            result = program.result
            plain = {var: layout.plain(var) for var in dict.fromkeys(vars_of(result))}
            mod = writer.finish(substitute(result, plain))
        return relax.transform.DeadCodeElimination(["main"])(mod)


class _Layout:
    """Emits the new program and knows the view that each old variable is of it."""

    def __init__(self, writer: Writer, program: Program) -> None:
        self.writer = writer
        self.program = program
        self.views: dict[relax.Var, _View] = {}
        self._ordered: dict[tuple[relax.Expr, Axes], relax.Expr] = {}

    def view(self, expr: relax.Expr) -> _View:
        """The view that an old variable or a constant is."""
        found = self.views.get(expr) if isinstance(expr, relax.Var) else None
        return found or _View(expr, tuple(range(len(expr.ty.shape))) if isinstance(expr.ty, relax.TensorType) else None)

    def ordered(self, expr: relax.Expr, axes: Axes) -> relax.Expr:
        """A tensor of the new program of which `expr` is the view by `axes`."""
        view = self._unflattened(self.view(expr))
        if view.axes is None or view.axes == axes:
            return view.base
        inverse = np.argsort(axes)
        return self._permute(view.base, tuple(view.axes[i] for i in inverse))

    def plain(self, expr: relax.Expr) -> relax.Expr:
        """`expr` with its axes in the old order."""
        view = self.view(expr)
        return view.base if view.axes is None else self.ordered(expr, tuple(range(len(view.axes))))

    def last(self, expr: relax.Expr) -> relax.Expr:
        """`expr`, [N,C,*spatial], as a tensor [N,*spatial,C]."""
        return self.ordered(expr, channels_last(len(expr.ty.shape)))

    def is_last(self, expr: relax.Expr) -> bool:
        """Whether an image exists with its channels last."""
        view = self.view(expr)
        return view.axes is not None and len(view.axes) > 2 and view.axes == channels_last(len(view.axes))

    def convert(self, value: relax.Expr) -> _View:
        """The view that an old expression becomes; what it needs is emitted."""
        name = op_name(value).removeprefix("relax.")
        if isinstance(value, relax.TupleGetItem):
            return self._field(value)
        if name in UNARY:
            return self._unary(value)
        if name in NARY:
            return self._nary(value)
        if name in REDUCTIONS:
            return self._reduction(value)
        rule = RULES.get(name)
        return (rule and rule(self, value)) or self.untouched(value)

    def emit(self, expr: relax.Expr, axes: Axes) -> _View:
        """A new tensor and the view of it."""
        return _View(self.writer.emit(expr), axes)

    def untouched(self, value: relax.Expr) -> _View:
        """The expression as it was, on operands in their old order."""
        plain = {var: self.plain(var) for var in dict.fromkeys(vars_of(value))}
        emitted = self.writer.emit(substitute(value, plain))
        is_tensor = isinstance(emitted.ty, relax.TensorType)
        return _View(emitted, tuple(range(len(emitted.ty.shape))) if is_tensor else None)

    def _field(self, value: relax.TupleGetItem) -> _View:
        view = self.view(value.tuple_value)
        field = self.writer.emit(relax.TupleGetItem(view.base, value.index))
        return _View(field, view.axes or tuple(range(len(field.ty.shape))))

    def _permute(self, base: relax.Expr, axes: Axes) -> relax.Expr:
        """`base` permuted, once however often it is asked for; a reshape where only axes of one element move."""
        array = array_of(base)
        if array is not None:
            return constant(array.transpose(axes))
        key = (base, axes)
        if key not in self._ordered:
            shape = ops.shape_of(base)
            moved = [axis for axis in axes if shape[axis] > 1]
            self._ordered[key] = self.writer.emit(
                relax.op.reshape(base, tuple(shape[axis] for axis in axes))
                if moved == sorted(moved)
                else relax.op.permute_dims(base, list(axes))
            )
        return self._ordered[key]

    def _unflattened(self, view: _View) -> _View:
        if view.features is None:
            return view
        channels, pixels = view.features
        rows = ops.shape_of(view.base)[0]
        image = self.writer.emit(relax.op.reshape(view.base, (rows, pixels, channels)))
        flat = relax.op.reshape(self._permute(image, (0, 2, 1)), (rows, channels * pixels))
        return self.emit(flat, (0, 1))

    def _unary(self, call: relax.Call) -> _View:
        view = self.view(call.args[0])
        base = self.writer.emit(relax.Call(call.op, [view.base, *call.args[1:]], call.attrs, list(call.ty_args)))
        return _View(base, view.axes, view.features)

    def _nary(self, call: relax.Call) -> _View:
        rank = len(call.ty.shape)
        images = [arg for arg in call.args if self.is_last(arg) and len(arg.ty.shape) == rank]
        if images:
            return self.emit(_arithmetic(call, [self._beside(arg, rank) for arg in call.args]), channels_last(rank))
        features = {f for arg in call.args if (f := self.view(arg).features)}
        others = [array_of(arg) for arg in call.args if not self.view(arg).features]
        if len(features) == 1 and all(value is not None and _strip(value).ndim < 2 for value in others):
            (found,) = features
            args = [self._feature_operand(arg, found) for arg in call.args]
            return _View(self.writer.emit(_arithmetic(call, args)), (0, 1), found)
        return self.untouched(_arithmetic(call, list(call.args)))

    def _beside(self, arg: relax.Expr, rank: int) -> relax.Expr:
        """An operand of an elementwise operator whose result is channels last."""
        missing = rank - len(arg.ty.shape)
        array = array_of(arg)
        if array is not None:
            return constant(_strip(array.reshape((1,) * missing + array.shape).transpose(0, *range(2, rank), 1)))
        if missing and len(arg.ty.shape):
            full = self.writer.emit(relax.op.reshape(self.plain(arg), (1,) * missing + ops.shape_of(arg)))
            return self._permute(full, (0, *range(2, rank), 1))
        return self.last(arg) if len(arg.ty.shape) else self.plain(arg)

    def _feature_operand(self, arg: relax.Expr, features: tuple[int, int]) -> relax.Expr:
        array = array_of(arg)
        if array is None:
            return self.view(arg).base
        return constant(array.reshape(features).T.reshape(-1)) if array.size > 1 else arg

    def _reduction(self, call: relax.Call) -> _View:
        (x,) = call.args
        rank = len(x.ty.shape)
        axes = range(rank) if call.attrs.axis is None else [int(axis) % rank for axis in call.attrs.axis]
        view = self._unflattened(self.view(x))
        if view.axes is None or not self.is_last(x):
            return self.untouched(call)
        reduce = getattr(relax.op, op_name(call).removeprefix("relax."))
        reduced = reduce(view.base, sorted(view.axes[axis] for axis in axes), bool(call.attrs.keepdims))
        if call.attrs.keepdims:
            return self.emit(reduced, view.axes)
        kept = [view.axes[axis] for axis in range(rank) if axis not in axes]
        return self.emit(reduced, tuple(int(position) for position in np.argsort(np.argsort(kept))))


def _arithmetic(call: relax.Call, args: Sequence[relax.Expr]) -> relax.Call:
    """The same operator on other operands; a constant that is subtracted is added, which is the same number."""
    if op_name(call) == "relax.subtract":
        array = array_of(args[1])
        if array is not None and array.dtype.kind == "f":
            return relax.op.add(args[0], constant(-array))
    return relax.Call(call.op, list(args), call.attrs, list(call.ty_args))


def _strip(array: Array) -> Array:
    """Without leading axes of one element, which broadcasting puts back."""
    while array.ndim and array.shape[0] == 1:
        array = array[0]
    return array


Rule = Callable[[_Layout, relax.Call], "_View | None"]
RULES: dict[str, Rule] = {}
"""By operator; a rule returns None where it does not apply, and the operator stays as it is."""


def _rule(name: str) -> Callable[[Rule], Rule]:
    def enter(rule: Rule) -> Rule:
        RULES[name] = rule
        return rule

    return enter


@_rule("nn.conv2d")
def _conv2d(layout: _Layout, call: relax.Call) -> _View | None:
    attrs = call.attrs
    if attrs.data_layout != "NCHW" or attrs.kernel_layout != "OIHW":
        return None
    conv = relax.op.nn.conv2d(
        layout.last(call.args[0]),
        layout.last(call.args[1]),
        strides=list(attrs.strides),
        padding=list(attrs.padding),
        dilation=list(attrs.dilation),
        groups=int(attrs.groups),
        data_layout="NHWC",
        kernel_layout="OHWI",
        out_dtype=attrs.out_dtype,
    )
    return layout.emit(conv, channels_last(4))


def _pool2d(layout: _Layout, call: relax.Call) -> _View | None:
    attrs = call.attrs
    if attrs.layout != "NCHW":
        return None
    pool = relax.op.nn.max_pool2d if op_name(call) == "relax.nn.max_pool2d" else relax.op.nn.avg_pool2d
    pooled = pool(
        layout.last(call.args[0]),
        list(attrs.pool_size),
        list(attrs.strides),
        list(attrs.padding),
        list(attrs.dilation),
        bool(attrs.ceil_mode),
        bool(attrs.count_include_pad),
        "NHWC",
    )
    return layout.emit(pooled, channels_last(4))


RULES |= {"nn.max_pool2d": _pool2d, "nn.avg_pool2d": _pool2d}


@_rule("nn.adaptive_avg_pool2d")
def _adaptive_avg_pool2d(layout: _Layout, call: relax.Call) -> _View | None:
    if call.attrs.layout != "NCHW":
        return None
    size = [int(extent) for extent in call.attrs.output_size or call.args[0].ty.shape[2:]]
    x = layout.last(call.args[0])
    if size == [1, 1]:
        return layout.emit(relax.op.mean(x, [1, 2], keepdims=True), channels_last(4))
    return layout.emit(relax.op.nn.adaptive_avg_pool2d(x, tuple(size), "NHWC"), channels_last(4))


@_rule("image.resize2d")
def _resize2d(layout: _Layout, call: relax.Call) -> _View | None:
    attrs = call.attrs
    if attrs.layout != "NCHW":
        return None
    resized = relax.op.image.resize2d(
        layout.last(call.args[0]),
        call.args[1],
        roi=[float(value) for value in attrs.roi],
        layout="NHWC",
        method=attrs.method,
        coordinate_transformation_mode=attrs.coordinate_transformation_mode,
        rounding_method=attrs.rounding_method,
        cubic_alpha=float(attrs.cubic_alpha),
        cubic_exclude=int(attrs.cubic_exclude),
        extrapolation_value=float(attrs.extrapolation_value),
        out_dtype=attrs.out_dtype,
    )
    return layout.emit(resized, channels_last(4))


@_rule("clip")
def _clip(layout: _Layout, call: relax.Call) -> _View:
    x, low, high = call.args
    view = layout.view(x)
    dtype = str(x.ty.dtype.dtype)
    base = view.base
    if low.value > -np.inf:
        floor = relax.op.nn.relu(base) if low.value == 0 else relax.op.maximum(base, relax.const(low.value, dtype))
        base = layout.writer.emit(floor)
    if high.value < np.inf:
        base = layout.writer.emit(relax.op.minimum(base, relax.const(high.value, dtype)))
    return _View(base, view.axes, view.features)


@_rule("nn.relu6")
def _relu6(layout: _Layout, call: relax.Call) -> _View:
    view = layout.view(call.args[0])
    positive = layout.writer.emit(relax.op.nn.relu(view.base))
    six = relax.const(6.0, str(call.ty.dtype.dtype))
    return _View(layout.writer.emit(relax.op.minimum(positive, six)), view.axes, view.features)


@_rule("nn.pad")
def _pad(layout: _Layout, call: relax.Call) -> _View | None:
    (x, *fill) = call.args
    if not layout.is_last(x):
        return None
    widths = np.array([int(width) for width in call.attrs.pad_width]).reshape(-1, 2)
    moved = widths[[0, *range(2, len(widths)), 1]].reshape(-1).tolist()
    value = fill[0] if fill else float(call.attrs.pad_value)
    return layout.emit(relax.op.nn.pad(layout.last(x), moved, call.attrs.pad_mode, value), channels_last(len(widths)))


@_rule("nn.prelu")
def _prelu(layout: _Layout, call: relax.Call) -> _View | None:
    x, slope = call.args
    view = layout.view(x)
    if view.axes is None or view.features:
        return None
    axis = view.axes[int(call.attrs.axis) % len(view.axes)]
    return layout.emit(relax.op.nn.prelu(view.base, layout.plain(slope), axis), view.axes)


def _softmax(layout: _Layout, call: relax.Call) -> _View | None:
    view = layout.view(call.args[0])
    if view.axes is None or view.features:
        return None
    op = relax.op.nn.softmax if op_name(call) == "relax.nn.softmax" else relax.op.nn.log_softmax
    return layout.emit(op(view.base, view.axes[int(call.attrs.axis) % len(view.axes)]), view.axes)


RULES |= {"nn.softmax": _softmax, "nn.log_softmax": _softmax}


@_rule("concat")
def _concat(layout: _Layout, call: relax.Call) -> _View | None:
    parts = call.args[0]
    if not isinstance(parts, relax.Tuple) or not any(layout.is_last(part) for part in parts.fields):
        return None
    axes = channels_last(len(call.ty.shape))
    axis = axes[int(call.attrs.axis) % len(axes)]
    return layout.emit(relax.op.concat([layout.last(part) for part in parts.fields], axis), axes)


@_rule("split")
def _split(layout: _Layout, call: relax.Call) -> _View | None:
    (x,) = call.args
    if not layout.is_last(x):
        return None
    axes = channels_last(len(x.ty.shape))
    where = call.attrs.indices_or_sections
    cuts = int(where) if isinstance(where, int | tvm.tirx.IntImm) else [int(cut) for cut in where]
    return layout.emit(relax.op.split(layout.last(x), cuts, axes[int(call.attrs.axis) % len(axes)]), axes)


@_rule("strided_slice")
def _strided_slice(layout: _Layout, call: relax.Call) -> _View | None:
    x, chosen, *rest = call.args
    if not layout.is_last(x) or not isinstance(chosen, relax.Tuple):
        return None
    axes = channels_last(len(x.ty.shape))
    moved = relax.Tuple([relax.prim_value(axes[int(axis.value) % len(axes)]) for axis in chosen.fields])
    sliced = relax.Call(call.op, [layout.last(x), moved, *rest], call.attrs, list(call.ty_args))
    return layout.emit(sliced, axes)


@_rule("permute_dims")
def _permute_dims(layout: _Layout, call: relax.Call) -> _View | None:
    """Emits nothing: a view of a view."""
    view = layout.view(call.args[0])
    if view.axes is None or view.features:
        return None
    rank = len(view.axes)
    axes = [int(axis) % rank for axis in call.attrs.axes] if call.attrs.axes else range(rank - 1, -1, -1)
    return _View(view.base, tuple(view.axes[axis] for axis in axes))


def _reshape(layout: _Layout, call: relax.Call) -> _View | None:
    """A reshape of the tensor that exists, where no axis of the new shape mixes axes that lie apart in it.

    So it is between images, for a channel shuffle, and for a pooled image to a matrix. A flatten of an image mixes C
    with H and W: it stays a view of the features, which a dense layer behind it takes in another order.
    """
    x = call.args[0]
    view = layout.view(x)
    old, new = ops.shape_of(x), ops.shape_of(call)
    if view.axes is None or view.features or array_of(view.base) is not None:
        return None
    if layout.is_last(x) and len(new) == 2 and new[0] == old[0]:
        channels, pixels = old[1], new[1] // max(old[1], 1)
        flat = layout.writer.emit(relax.op.reshape(view.base, new))
        return _View(flat, (0, 1), (channels, pixels) if channels > 1 and pixels > 1 else None)
    groups = _groups(old, new)
    if groups is None or len(groups) < 2:
        return None
    wanted = _contiguous(view.axes, [axes for axes, _ in groups])
    if wanted is None:  # the channels of a shuffled image: bring them together at the end
        order = [axis for axes, _ in (groups[0], *groups[2:], groups[1]) for axis in axes]
        wanted = tuple(order.index(axis) for axis in range(len(old)))
    base = layout.ordered(x, wanted)
    by_position = sorted(groups, key=lambda group: min((wanted[axis] for axis in group[0]), default=0))
    shape = [new[axis] for _, axes in by_position for axis in axes]
    placed = [axis for _, axes in by_position for axis in axes]
    return layout.emit(relax.op.reshape(base, shape), tuple(placed.index(axis) for axis in range(len(new))))


def _groups(old: Axes, new: Axes) -> list[tuple[list[int], list[int]]] | None:
    """The smallest runs of axes of `old` and of `new` that hold the same elements; None for shapes with a 0."""
    if 0 in old or 0 in new:
        return None
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) and j < len(new):
        left, right = [i], [j]
        size_left, size_right = old[i], new[j]
        while size_left != size_right:
            if size_left < size_right:
                left.append(left[-1] + 1)
                size_left *= old[left[-1]]
            else:
                right.append(right[-1] + 1)
                size_right *= new[right[-1]]
        groups.append((left, right))
        i, j = left[-1] + 1, right[-1] + 1
    if groups:  # axes of one element at the end belong to the last run
        groups[-1][0].extend(range(i, len(old)))
        groups[-1][1].extend(range(j, len(new)))
    return groups


def _contiguous(axes: Axes, groups: list[list[int]]) -> Axes | None:
    """`axes` itself if each group of old axes lies side by side and in order in the base, else None."""
    together = all(axes[b] == axes[a] + 1 for group in groups for a, b in itertools.pairwise(group))
    return axes if together else None


RULES |= {"reshape": _reshape, "flatten": _reshape, "squeeze": _reshape, "expand_dims": _reshape}


@_rule("matmul")
def _matmul(layout: _Layout, call: relax.Call) -> _View | None:
    """A dense layer behind a flatten takes the features in the order they lie in: the weight's rows move instead."""
    x, weight = call.args
    view = layout.view(x)
    named = layout.program.values.get(weight) if isinstance(weight, relax.Var) else None
    if view.features is None or named is None or op_name(named) != "horq.name":
        return None
    array = array_of(named.args[0])
    if array is None or array.ndim != 2:
        return None
    moved = array.reshape(*view.features, -1).transpose(1, 0, 2).reshape(array.shape)
    name, affines = str(named.attrs["name"]), int(named.attrs["affines"])
    renamed = layout.writer.emit(ops.name(constant(moved), name=name, affines=affines))
    return layout.emit(relax.op.matmul(view.base, renamed), (0, 1))
