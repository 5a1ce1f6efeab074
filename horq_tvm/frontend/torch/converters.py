"""Our converters of PyTorch operators, by the name that an exported graph has for them ("conv2d.default").

An operator that is not here goes to TVM's converter of its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import relax

from ...errors import HorqError
from ...specs import LayerConfig
from .. import layers
from ..layers import Window


@dataclass(frozen=True)
class Node:
    """One call of an operator while it is converted; `arguments` by the schema's names, defaults filled in."""

    name: str
    op: str
    arguments: dict[str, Any]
    emit: Callable[[relax.Expr], relax.Expr]
    trained: dict[str, LayerConfig]

    def __getitem__(self, argument: str) -> Any:
        return self.arguments[argument]

    def ints(self, argument: str, length: int) -> tuple[int, ...]:
        """An argument of one int for all axes or one an axis."""
        value = self.arguments[argument]
        values = [value] if isinstance(value, int) else list(value)
        return tuple(int(v) for v in (values * length if len(values) == 1 else values))


Converter = Callable[[Node], "relax.Expr | None"]
CONVERTERS: dict[str, Converter] = {}
"""A converter returns None for a form of its operator that it leaves to TVM's converter."""
LAYERS = {
    *("conv1d.default", "conv1d.padding", "conv2d.default", "conv2d.padding", "convolution.default"),
    *("linear.default", "matmul.default", "mm.default", "bmm.default", "addmm.default"),
    *("horq_conv2d.default", "horq_linear.default"),
}
"""The operators whose calls are named."""


def converts(*ops: str) -> Callable[[Converter], Converter]:
    """Enters a function into CONVERTERS."""

    def enter(convert: Converter) -> Converter:
        CONVERTERS.update(dict.fromkeys(ops, convert))
        return convert

    return enter


@converts("conv1d.default", "conv2d.default", "conv1d.padding", "conv2d.padding", "convolution.default")
def conv(node: Node) -> relax.Expr | None:
    """conv1d and conv2d, padding by numbers or "same" and "valid" → named conv2d and an add.

    A transposed convolution is no HORQ layer and stays TVM's.
    """
    weight = node["weight"]
    kernel = layers.shape(weight)[2:]
    if node.arguments.get("transposed"):
        return None
    dilation = node.ints("dilation", len(kernel))
    if isinstance(node["padding"], str):
        begin, end = _named_padding(node["padding"], kernel, dilation)
    else:
        begin = end = node.ints("padding", len(kernel))
    window = Window(node.ints("stride", len(kernel)), (*begin, *end), dilation, int(node["groups"]))
    return layers.convolution(node.emit, node["input"], weight, node["bias"], window, name=node.name)


def _named_padding(
    padding: str, kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if padding not in ("same", "valid"):
        raise HorqError(f"found padding {padding!r}; accepted are 'same' and 'valid'")
    totals = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
    return tuple(total // 2 for total in totals), tuple(total - total // 2 for total in totals)


@converts("linear.default")
def linear(node: Node) -> relax.Expr:
    """x[...,L], weight[F,L] → named matmul and an add."""
    weight = layers.transpose(node.emit, node["weight"], (1, 0))
    return layers.dense(node.emit, node["input"], weight, node["bias"], name=node.name)


@converts("matmul.default")
def matmul(node: Node) -> relax.Expr:
    """A product of any two tensors → named matmul: whether it is a layer is decided later."""
    return layers.dense(node.emit, node["self"], node["other"], None, name=node.name)


@converts("mm.default", "bmm.default")
def mm(node: Node) -> relax.Expr:
    """A product of (batches of) matrices → named matmul."""
    return layers.dense(node.emit, node["self"], node["mat2"], None, name=node.name)


@converts("addmm.default")
def addmm(node: Node) -> relax.Expr:
    """beta·self + alpha·(mat1 · mat2) → named matmul and an add."""
    if (node["alpha"], node["beta"]) != (1, 1):
        raise HorqError(f"found alpha {node['alpha']}, beta {node['beta']}; accepted is 1 for both")
    return layers.dense(node.emit, node["mat1"], node["mat2"], node["self"], name=node.name)


@converts("horq_conv2d.default")
def horq_conv2d(node: Node) -> relax.Expr:
    """torch.ops.horq.horq_conv2d (interface.md) → conv2d · alpha + bias; its padding is (t,l,b,r)."""
    node.trained[node.name] = _trained(node)
    window = Window(node.ints("stride", 2), node.ints("padding", 4), node.ints("dilation", 2), int(node["groups"]))
    weight, bias = node["weight"], node["bias"]
    return layers.convolution(node.emit, node["x"], weight, bias, window, name=node.name, alpha=node["alpha"])


@converts("horq_linear.default")
def horq_linear(node: Node) -> relax.Expr:
    """torch.ops.horq.horq_linear (interface.md) → matmul · alpha + bias."""
    node.trained[node.name] = _trained(node)
    weight = layers.transpose(node.emit, node["weight"], (1, 0))
    return layers.dense(node.emit, node["x"], weight, node["bias"], name=node.name, alpha=node["alpha"])


def _trained(node: Node) -> LayerConfig:
    return layers.trained_config(node.name, int(node["order"]), str(node["scale"]), node["weight"], node["beta"])


@converts("_native_batch_norm_legit_no_training.default")
def batch_norm(node: Node) -> relax.Expr:
    """Batch normalisation in inference → multiply and add; the saved mean and variance are not there to be used."""
    y = layers.batch_norm(
        node.emit,
        node["input"],
        node["weight"],
        node["bias"],
        node["running_mean"],
        node["running_var"],
        float(node["eps"]),
    )
    return relax.Tuple([y])


@converts("_native_batch_norm_legit_functional.default", "_native_batch_norm_legit.default")
def batch_norm_in_training(node: Node) -> relax.Expr:
    """An exported training graph would normalise by the batch it sees."""
    raise HorqError("found batch normalisation in training mode; accepted is a model exported after model.eval()")


@converts("prelu.default")
def prelu(node: Node) -> relax.Expr:
    """A slope for all or one a channel, axis 1 → leakyrelu or nn.prelu."""
    x, slope = node["self"], node["weight"]
    value = layers.array(slope)
    if value is not None and value.size == 1:
        return node.emit(relax.op.nn.leakyrelu(x, float(value.reshape(()))))
    return node.emit(relax.op.nn.prelu(x, slope, 1))


@converts("max_pool1d.default", "max_pool2d.default")
def max_pool(node: Node) -> relax.Expr:
    """max_pool of one or two axes, rounding up turned into padding."""
    kernel, window = _pooling(node)
    return layers.max_pool(node.emit, node["self"], kernel, window, ceil_mode=bool(node["ceil_mode"]))


@converts("avg_pool1d.default", "avg_pool2d.default")
def avg_pool(node: Node) -> relax.Expr:
    """avg_pool of one or two axes, rounding up turned into padding that does not count."""
    if node.arguments.get("divisor_override") is not None:
        raise HorqError(f"found divisor_override {node['divisor_override']}; accepted is none")
    kernel, window = _pooling(node)
    return layers.average_pool(
        node.emit,
        node["self"],
        kernel,
        window,
        ceil_mode=bool(node["ceil_mode"]),
        count_include_pad=bool(node["count_include_pad"]),
    )


def _pooling(node: Node) -> tuple[tuple[int, ...], Window]:
    """Kernel and window; a tensor without the batch axis is not taken."""
    axes = 1 if node.op.startswith(("max_pool1d", "avg_pool1d")) else 2
    kernel = node.ints("kernel_size", axes)
    strides = node.ints("stride", axes) if node["stride"] else kernel
    dilation = node.ints("dilation", axes) if "dilation" in node.arguments else (1,) * axes
    return kernel, Window(strides, node.ints("padding", axes) * 2, dilation)
