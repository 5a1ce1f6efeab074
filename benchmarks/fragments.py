"""Pieces of networks, each a Relax module for our passes: the layers whose kernels are timed.

Tensors are NHWC and random; a fragment's main takes what the kernel itself reads (bit planes, not the float activation
behind them), so that the passes of a real build make of it the kernel of a real build.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tvm
import tvm_ffi
from tvm import relax, tirx

from horq_tvm import ops, pipeline, targets
from horq_tvm.emit import standalone
from horq_tvm.manifest import Manifest
from horq_tvm.schedules.legalize import LEGALIZE
from horq_tvm.specs import TensorSpec
from horq_tvm.straightline import constant, fields_of, read_main

SEED = 0
Body = Callable[..., "relax.Expr | list[relax.Expr]"]


@dataclass(frozen=True)
class Fragment:
    """A module in the HORQ dialect, not yet optimised, and what to feed it.

    `edit` is a pass between legalisation and scheduling, for a kernel that no network asks for.
    """

    mod: tvm.IRModule
    feeds: Mapping[str, np.ndarray]
    edit: tvm.transform.Pass | None = None

    def lowered(self, target: targets.Target) -> tvm.IRModule:
        """Scheduled kernels and a straight-line main, as a real build hands them to `emit`; `edit` is done too."""
        return self._lower(pipeline.rewrite({})(self.mod), target)

    def compile(self, target: targets.Target, library: Path) -> None:
        """Writes the library that `horq_tvm.build` would make of it, `edit` apart."""
        rewritten = pipeline.rewrite({})(self.mod)
        inputs = tuple(TensorSpec(name, array.shape, array.dtype.name) for name, array in self.feeds.items())
        outputs = tuple(
            TensorSpec(f"y{i}", ops.shape_of(result), str(result.ty.dtype))
            for i, result in enumerate(fields_of(read_main(rewritten).result))
        )
        standalone(self._lower(rewritten, target), target, Manifest(inputs, outputs), library)

    def _lower(self, rewritten: tvm.IRModule, target: targets.Target) -> tvm.IRModule:
        with target.tvm_target():
            mod = pipeline.optimise(target)(rewritten)
            if self.edit is not None:
                mod = self.edit(mod)
            return pipeline.lower(target)(mod)


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


def bare_conv(conv: Conv, order: int, batch: int, first: int = 0, *, integer: bool = True) -> Fragment:
    """planes → the bitserial kernel by itself.

    `integer`: Σ_i S_i as the kernel has it in its accumulators (−Σ S_i/2 where every S is even), int32 whose bits are
    seen as float32. Otherwise α·Σ β_i·S_i, `static`, which adds a conversion and an FMA a plane.
    """
    rng = np.random.default_rng(SEED)
    feeds = {"planes": _planes(rng, conv, order - first, batch)}
    fragment = _fragment(feeds, lambda emit, planes: emit(_bitserial(rng, conv, order, first, planes)))
    return replace(fragment, edit=StoreIntegers()) if integer else fragment


def conv_with_epilogue(conv: Conv, order: int, batch: int, *, relu: bool, shortcut: bool) -> Fragment:
    """planes, residual → the next layer's planes (and the float value, if `shortcut`): a block of a residual network.

    conv · α·β, BN, + residual, ReLU, and the `static` binarisation of the next layer. Signed (not `relu`), a shift a
    channel stands before the binarisation, as in RSign or BN: what follows a ReLU directly is all +1 in its first
    plane, which the compiler drops, on both sides. As inside a network, the residual is computed by another kernel and
    dies here, and the float value goes to another: a negation on either side stands for these.
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
        y = emit(relax.op.nn.relu(emit(relax.op.add(y, emit(relax.op.negative(residual))))))
        z = y if relu else emit(relax.op.add(y, channel(-1.0, 0.0)))
        beta = constant(_betas(order))
        planes = ops.binarize(z, beta, order=order, scale="static", geometry=ops.Geometry((3, 3)), first=first)
        return [emit(planes), emit(relax.op.negative(y))] if shortcut else [emit(planes)]

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
        strides, padding, groups = geometry.strides, geometry.padding, geometry.groups
        y = emit(ops.conv2d(x, constant(weight), name="layer", strides=strides, padding=padding, groups=groups))
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


@tvm.transform.module_pass(opt_level=0, name="StoreIntegers")
class StoreIntegers:
    """Legalises, and lets a bitserial kernel store Σ_i of its integers in place of their affine."""

    def transform_module(self, mod: tvm.IRModule, _context: object) -> tvm.IRModule:
        passes = [relax.transform.LegalizeOps(dict(LEGALIZE)), relax.transform.FuseTIR()]
        mod = tvm.transform.Sequential(passes)(mod)
        functions = {
            gvar: tvm_ffi.structural_map(func, (tirx.BufferStore, _as_integers))
            if isinstance(func, tirx.PrimFunc)
            else func
            for gvar, func in mod.functions.items()
        }
        return tvm.IRModule(functions, attrs=mod.attrs)


def _as_integers(store: tirx.BufferStore) -> tirx.BufferStore:
    """The store with the int32 sums that its float32 value converts; any other store as it is."""
    sums: list[tirx.Expr] = []
    if str(store.buffer.dtype) == "float32":
        tvm_ffi.structural_walk(store.value, (tirx.Cast, lambda cast: sums.append(cast.value)))
    if not sums:
        return store
    total = functools.reduce(operator.add, sums)
    return tirx.BufferStore(store.buffer, tirx.reinterpret("float32", total), store.indices)


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
    return ops.bitserial(
        planes, *operands, name="layer", order=order, scale="static", geometry=conv.geometry, first=first
    )
