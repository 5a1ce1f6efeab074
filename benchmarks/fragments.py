"""Pieces of networks, each a Relax module for our passes: the layers whose kernels are timed.

Tensors are NHWC and random; a fragment's main takes what the kernel itself reads (bit planes, not the float activation
behind them), so that the passes of a real build make of it the kernel of a real build.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from horq_tvm import ops, pipeline, targets
from horq_tvm.compiler import CompiledModel, emit
from horq_tvm.manifest import Manifest
from horq_tvm.specs import TensorSpec
from horq_tvm.straightline import constant, fields_of, read_main

SEED = 0
Body = Callable[..., "relax.Expr | list[relax.Expr]"]


@dataclass(frozen=True)
class Fragment:
    """A module in the HORQ dialect, not yet optimised, and what to feed it."""

    mod: tvm.IRModule
    feeds: Mapping[str, np.ndarray]

    def compile(self, target: targets.Target) -> CompiledModel:
        """The library that `horq_tvm.build` would make of it."""
        rewritten = pipeline.rewrite({})(self.mod)
        inputs = tuple(TensorSpec(name, array.shape, array.dtype.name) for name, array in self.feeds.items())
        results = fields_of(read_main(rewritten).result)
        outputs = tuple(
            TensorSpec(f"y{i}", ops.shape_of(result), str(result.ty.dtype)) for i, result in enumerate(results)
        )
        return emit(rewritten, target, Manifest(inputs, outputs), lambda _doing: None)


@dataclass(frozen=True)
class Conv:
    """A convolution of C channels to F filters with a square kernel, "same" padding; `groups` = C is depthwise."""

    size: int
    channels: int
    filters: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1

    @property
    def geometry(self) -> ops.Geometry:
        """With the padding of PyTorch's `padding=kernel // 2`."""
        pad = self.kernel // 2
        square, step = (self.kernel, self.kernel), (self.stride, self.stride)
        return ops.Geometry(square, step, (pad, pad, pad, pad), groups=self.groups)

    @property
    def layer(self) -> str:
        """ "56x56x64": the input's height, width and channels."""
        return f"{self.size}x{self.size}x{self.channels}"

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the output."""
        return self.geometry.output_size(self.size, self.size)

    def macs(self, batch: int, planes: int = 1) -> int:
        """planes·N·HO·WO·F·L; no padding counted, no dropped plane left out."""
        height, width = self.out
        return planes * batch * height * width * self.filters * self.kernel**2 * (self.channels // self.groups)


def bare_conv(conv: Conv, order: int, batch: int, first: int = 0) -> Fragment:
    """planes → α·Σ β_i·S_i, `static`: the bitserial kernel with one FMA a plane and nothing else fused to it."""
    rng = np.random.default_rng(SEED)
    feeds = {"planes": _planes(rng, conv, order - first, batch)}
    return _fragment(feeds, lambda emit, planes: emit(_bitserial(rng, conv, order, first, planes)))


def conv_with_epilogue(conv: Conv, order: int, batch: int, *, relu: bool, shortcut: bool) -> Fragment:
    """planes, residual → the next layer's planes (and the float value, if `shortcut`): a block of a residual network.

    conv · α·β, BN, + residual, ReLU, and the `static` binarisation of the next layer. Signed (not `relu`), a shift a
    channel stands before the binarisation, as in RSign or BN: what follows a ReLU directly is all +1 in its first plane,
    which the compiler drops, on both sides.
    """
    rng = np.random.default_rng(SEED)
    first = int(relu)
    shape = (batch, *conv.out, conv.filters)
    feeds = {
        "planes": _planes(rng, conv, order - first, batch),
        "residual": rng.standard_normal(shape).astype("float32"),
    }

    def channel(low: float, high: float) -> relax.Expr:
        return constant(rng.uniform(low, high, conv.filters).astype("float32"))

    def body(emit: Callable[..., relax.Var], planes: relax.Var, residual: relax.Var) -> list[relax.Expr]:
        y = emit(_bitserial(rng, conv, order, first, planes))
        y = emit(relax.op.add(emit(relax.op.multiply(y, channel(0.5, 1.5))), channel(-0.5, 0.5)))
        y = emit(relax.op.nn.relu(emit(relax.op.add(y, residual))))
        z = y if relu else emit(relax.op.add(y, channel(-1.0, 0.0)))
        beta = constant(_betas(order))
        planes = ops.binarize(z, beta, order=order, scale="static", geometry=ops.Geometry((3, 3)), first=first)
        return [emit(planes), y] if shortcut else [emit(planes)]

    return _fragment(feeds, body)


def pack(conv: Conv, order: int, batch: int) -> Fragment:
    """x → planes, `static`: binarise and pack as a pass of its own."""
    feeds = {"x": np.random.default_rng(SEED).standard_normal((batch, conv.size, conv.size, conv.channels), "float32")}

    def body(emit: Callable[..., relax.Var], x: relax.Var) -> relax.Expr:
        beta = constant(_betas(order))
        return emit(ops.binarize(x, beta, order=order, scale="static", geometry=conv.geometry))

    return _fragment(feeds, body)


def float_conv(conv: Conv, batch: int, weight: np.ndarray, bias: np.ndarray) -> Fragment:
    """x → ReLU(conv(x) + bias), weight [F,kh,kw,C/g]."""
    geometry = conv.geometry

    def body(emit: Callable[..., relax.Var], x: relax.Var) -> relax.Expr:
        how = {"strides": geometry.strides, "padding": geometry.padding, "groups": geometry.groups}
        y = emit(ops.conv2d(x, constant(weight), name="layer", **how))
        return emit(relax.op.nn.relu(emit(relax.op.add(y, constant(bias)))))

    shape = (batch, conv.size, conv.size, conv.channels)
    return _fragment({"x": np.random.default_rng(SEED).standard_normal(shape, "float32")}, body)


def float_dense(features: int, batch: int, weight: np.ndarray, bias: np.ndarray) -> Fragment:
    """x [N,L] → x·Wᵀ + bias, weight [F,L]."""

    def body(emit: Callable[..., relax.Var], x: relax.Var) -> relax.Expr:
        y = emit(ops.dense(x, constant(weight), name="layer"))
        return emit(relax.op.add(y, constant(bias)))

    return _fragment({"x": np.random.default_rng(SEED).standard_normal((batch, features), "float32")}, body)


def max_pool(conv: Conv, batch: int) -> Fragment:
    """x → max over the windows of `conv`, which weighs nothing."""
    geometry = conv.geometry

    def body(emit: Callable[..., relax.Var], x: relax.Var) -> relax.Expr:
        window = {"pool_size": geometry.kernel, "strides": geometry.strides, "padding": geometry.padding}
        return emit(relax.op.nn.max_pool2d(x, **window, layout="NHWC"))

    shape = (batch, conv.size, conv.size, conv.channels)
    return _fragment({"x": np.random.default_rng(SEED).standard_normal(shape, "float32")}, body)


def _fragment(feeds: Mapping[str, np.ndarray], body: Body) -> Fragment:
    builder = relax.BlockBuilder()
    params = [relax.Var(name, relax.TensorType(array.shape, array.dtype.name)) for name, array in feeds.items()]
    with builder.function("main", params):
        with builder.dataflow():
            result = body(builder.emit, *params)
            output = builder.emit_output(relax.Tuple(result) if isinstance(result, list) else result)
        builder.emit_func_output(output)
    return Fragment(builder.get(), feeds)


def _planes(rng: np.random.Generator, conv: Conv, planes: int, batch: int) -> np.ndarray:
    """Random bits as `horq.binarize` lays them out, bits beyond a group's channels zero."""
    channels = conv.channels // conv.groups
    bits = rng.integers(0, 2, (batch, conv.size, conv.size, conv.groups, planes, channels), "uint8")
    padded = np.pad(bits, [(0, 0)] * 5 + [(0, -channels % ops.WORD_BITS)])
    return np.packbits(padded, axis=-1, bitorder="little").view("<u4")


def _betas(order: int) -> np.ndarray:
    """[1, K]: the means of a standard normal's residuals, about 0.8·0.45^i."""
    return np.array([[0.8 * 0.45**i for i in range(order)]], "float32")


def _bitserial(rng: np.random.Generator, conv: Conv, order: int, first: int, planes: relax.Expr) -> relax.Call:
    shape = (conv.filters, conv.kernel, conv.kernel, conv.channels // conv.groups)
    weight = np.where(rng.integers(0, 2, shape), 1, -1).astype("int8")
    alpha = rng.uniform(0.01, 0.05, conv.filters)
    operands = (constant(weight), constant(alpha), constant(np.zeros(conv.filters)), constant(_betas(order)))
    how = {"name": "layer", "order": order, "scale": "static", "geometry": conv.geometry, "first": first}
    return ops.bitserial(planes, *operands, **how)
