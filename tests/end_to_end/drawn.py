"""Drawn layers, many of them compiled into one library, and what the reference says of each.

A layer has an input and an output of its own, so that one library (and one call of the linker) serves a whole draw.
Layouts: the library's images are NHWC and its dense inputs [..., L], as in the canonical form; the reference's images
are NCHW. What is compared is brought to the reference's layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from hypothesis import strategies as st
from numpy.typing import NDArray
from tvm import relax

from horq_tvm import ops, pipeline, reference, targets
from horq_tvm.compiler import CompiledModel, emit
from horq_tvm.manifest import Manifest
from horq_tvm.reference import HorqResult
from horq_tvm.relay_passes.expose_scales import BITSERIAL, EXPOSED, ExposeScales
from horq_tvm.specs import LayerConfig, Scale, TensorSpec
from horq_tvm.straightline import Writer, constant, fields_of, op_name, read_main
from tests.relay_passes.program import module

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Drawn:
    """A conv over x [N,H,W,C] or, where `lead` is given, a dense layer over x [*lead,L], L = `channels`.

    `channels` and `filters` are of one group. `relu` puts a ReLU before the layer, so that its first plane is known;
    `biased` gives it a bias.
    """

    channels: int
    filters: int
    order: int
    scale: Scale
    lead: tuple[int, ...] | None = None
    size: tuple[int, int, int] = (1, 1, 1)
    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    groups: int = 1
    relu: bool = False
    biased: bool = True
    seed: int = 0

    @property
    def row(self) -> int:
        """L: the elements that one output sums over."""
        return self.channels * self.kernel[0] * self.kernel[1]

    @property
    def input_shape(self) -> tuple[int, ...]:
        if self.lead is not None:
            return (*self.lead, self.channels)
        return (*self.size, self.groups * self.channels)

    def weight(self, unit: bool) -> Float32:
        """[F,kh,kw,C/g] or [F,L]; of ±1 if `unit`, else normal, filters of unlike magnitude."""
        rng = np.random.default_rng(self.seed)
        window = (self.channels,) if self.lead is not None else (*self.kernel, self.channels)
        values = rng.standard_normal((self.groups * self.filters, *window))
        if unit:
            return np.where(values >= 0, 1, -1).astype("float32")
        return (values * np.exp(rng.standard_normal((len(values), *(1,) * len(window))))).astype("float32")

    def bias(self, unit: bool) -> Float32 | None:
        """[F]; none if `unit`."""
        if unit or not self.biased:
            return None
        return np.random.default_rng(self.seed + 1).standard_normal(self.groups * self.filters).astype("float32")

    def image(self) -> Float32:
        """An input: normal, with a spread and a mean that differ from layer to layer."""
        rng = np.random.default_rng(self.seed + 2)
        spread, mean = np.exp(rng.standard_normal(2))
        return (spread * (rng.standard_normal(self.input_shape) + 0.3 * mean)).astype("float32")

    def config(self, unit: bool) -> LayerConfig:
        if self.scale != "static":
            return LayerConfig(self.order, self.scale)
        rng = np.random.default_rng(self.seed + 3)
        drawn = np.sort(np.abs(rng.standard_normal(self.order)) + 0.05)[::-1].astype("float32")
        return LayerConfig(self.order, "static", (1.0,) * self.order if unit else tuple(map(float, drawn)))

    def expected(self, x: Float32, unit: bool, beta: Float32 | None = None) -> HorqResult:
        """The reference on the library's input; `beta` as the library has it, [N,K] or [N,HO,WO,G,K]."""
        config = self.config(unit)
        signs, alpha = reference.binarize_weights(self.weight(unit))
        if config.betas is not None:
            beta = np.asarray(config.betas, "float32")
        x = np.maximum(x, 0) if self.relu else x
        bias = self.bias(unit)
        how: dict[str, Any] = {"order": self.order, "scale": self.scale}
        if self.lead is not None:
            if beta is not None and self.scale == "patch":
                beta = beta.reshape(*self.lead, self.order)
            return reference.dense(x, signs, alpha, beta, bias, **how)
        how |= {"strides": self.strides, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}
        return reference.conv2d(np.moveaxis(x, 3, 1), np.moveaxis(signs, 3, 1), alpha, beta, bias, **how)

    def in_reference_layout(self, output: Float32) -> Float32:
        return output if self.lead is not None else np.moveaxis(output, 3, 1)


# --- Drawing ----------------------------------------------------------------------------------------------------------

WORD_EDGES = (1, 2, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 255, 256, 257, 300)
"""Channels around whole words and vectors, where packing and tails go wrong if they do."""


@st.composite
def layers(draw: st.DrawFn, scales: Sequence[Scale] = ("patch", "sample", "static"), least_row: int = 1) -> Drawn:
    """Any layer of up to 300 channels; `least_row` keeps out windows of fewer elements."""
    groups = draw(st.sampled_from((1, 1, 1, 2, 3, 4)))
    channels = min(draw(st.sampled_from(WORD_EDGES) | st.integers(1, 300)), 300 // groups)
    filters = min(draw(st.sampled_from((1, 15, 16, 17, 32, 33, 64)) | st.integers(1, 300)), 300 // groups)
    common: dict[str, Any] = {
        "channels": channels,
        "filters": filters,
        "order": draw(st.integers(1, 4)),
        "scale": draw(st.sampled_from(scales)),
        "relu": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }
    batch = draw(st.integers(1, 3))
    if draw(st.sampled_from((False, False, False, True))):
        lead = draw(st.sampled_from(((batch,), (batch, 2), (batch, 2, 3), (batch, 1))))
        return Drawn(**common | {"channels": max(channels, least_row)}, lead=lead)
    kernel, dilation = draw(_pair(1, 3)), draw(_pair(1, 3))
    if kernel[0] * kernel[1] * channels < least_row:
        kernel = (3, 3)
    padding = tuple(draw(st.integers(0, 3)) for _ in range(4))
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    around = (padding[0] + padding[2], padding[1] + padding[3])
    # At least one window must fit.
    height, width = (
        max(1, span - pad) + extra for span, pad, extra in zip(spans, around, draw(_pair(0, 5)), strict=True)
    )
    return Drawn(
        **common | {"channels": channels if kernel[0] * kernel[1] * channels >= least_row else least_row},
        size=(batch, height, width),
        kernel=kernel,
        strides=draw(_pair(1, 3)),
        dilation=dilation,
        padding=padding,
        groups=groups,
    )


def _pair(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


# --- Compiling --------------------------------------------------------------------------------------------------------


def canonical(drawn: Sequence[Drawn], unit: bool) -> tvm.IRModule:
    """Layer i from input x<i> to output i, named L<i>."""

    def body(emit: Any, *inputs: relax.Var) -> list[relax.Expr]:
        outputs = []
        for i, (layer, x) in enumerate(zip(drawn, inputs, strict=True)):
            if layer.relu:
                x = emit(relax.op.nn.relu(x))
            weight = constant(layer.weight(unit))
            if layer.lead is not None:
                y = ops.dense(x, weight, name=f"L{i}")
            else:
                y = ops.conv2d(
                    x,
                    weight,
                    name=f"L{i}",
                    strides=layer.strides,
                    padding=layer.padding,
                    dilation=layer.dilation,
                    groups=layer.groups,
                )
            y, bias = emit(y), layer.bias(unit)
            outputs.append(y if bias is None else emit(relax.op.add(y, constant(bias))))
        return outputs

    return module([layer.input_shape for layer in drawn], body)


def with_given_scales(drawn: Sequence[Drawn], target: str = "native") -> tuple[CompiledModel, list[list[int]]]:
    """±1 weights, no bias, β = 1 in `static` layers, a further input of the others.

    Also returns which layers each β input feeds, in order.
    """
    mod, fed = rewritten_with_given_scales(drawn)
    return compile_module(mod, target=target), fed


def rewritten_with_given_scales(drawn: Sequence[Drawn]) -> tuple[tvm.IRModule, list[list[int]]]:
    """`with_given_scales` before anything is compiled."""
    names = [f"L{i}" for i in range(len(drawn))]
    configs = {name: layer.config(unit=True) for name, layer in zip(names, drawn, strict=True)}
    mod = pipeline.rewrite(configs)(canonical(drawn, unit=True))
    mod = ExposeScales(names)(mod)
    return mod, [[int(str(name)[1:]) for name in group] for group in mod.attrs[EXPOSED]]


def with_own_scales(drawn: Sequence[Drawn], target: str = "native") -> CompiledModel:
    """General weights and biases; β of the layers that compute theirs are further outputs, beta_<i>."""
    mod, labels = rewritten_with_own_scales(drawn)
    return compile_module(mod, labels, target)


def rewritten_with_own_scales(drawn: Sequence[Drawn]) -> tuple[tvm.IRModule, list[str]]:
    """`with_own_scales` before anything is compiled: the module and what its outputs are called."""
    configs = {f"L{i}": layer.config(unit=False) for i, layer in enumerate(drawn)}
    return rewritten_with_betas(canonical(drawn, unit=False), configs)


def with_betas(mod: tvm.IRModule, configs: Mapping[str, LayerConfig], target: str = "native") -> CompiledModel:
    """The library of a module whose layer L<i> makes its output y<i>; β that it computes are outputs beta_<i>."""
    rewritten, labels = rewritten_with_betas(mod, configs)
    return compile_module(rewritten, labels, target)


def rewritten_with_betas(mod: tvm.IRModule, configs: Mapping[str, LayerConfig]) -> tuple[tvm.IRModule, list[str]]:
    """`with_betas` before anything is compiled."""
    mod = pipeline.rewrite(configs)(mod)
    program = read_main(mod)
    beta = {str(v.attrs["name"]): v.args[4] for _, v in program.bindings if op_name(v) in BITSERIAL}
    computed = {f"beta_{n[1:]}": beta[n] for n, c in configs.items() if c.scale != "static"}
    with Writer(mod, program) as writer:
        for var, value in program.bindings:
            writer.bind(var, value)
        mod = writer.finish(relax.Tuple([*fields_of(program.result), *computed.values()]))
    return mod, [*(f"y{i}" for i in range(len(configs))), *computed]


def compile_module(mod: tvm.IRModule, labels: Sequence[str] | None = None, target: str = "native") -> CompiledModel:
    """The library of a rewritten module for `target`; its outputs y<i> unless `labels` says otherwise."""
    program = read_main(mod)
    results = fields_of(program.result)
    labels = labels or [f"y{i}" for i in range(len(results))]
    inputs = tuple(_spec(f"x{i}", param) for i, param in enumerate(program.params))
    outputs = tuple(_spec(label, result) for label, result in zip(labels, results, strict=True))
    return emit(mod, targets.resolve(target), Manifest(inputs, outputs), lambda _message: None)


def _spec(name: str, expr: relax.Expr) -> TensorSpec:
    return TensorSpec(name, ops.shape_of(expr), str(expr.ty.dtype.dtype))
