"""Two `static` layers with an epilogue between them: the fast path, in which activations never exist as floats.

The library without taps goes from the first layer's integers to the second layer's planes in one kernel. The same
network with taps keeps what stands between, and from that the reference says what the second layer gives. A kernel may
round an epilogue otherwise, so a sign is doubtful here where a residual is within ROUNDING of 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper

from horq_tvm import pipeline, reference, targets
from horq_tvm.compiler import emit
from horq_tvm.frontend.imported import ImportedModel, result_specs
from horq_tvm.frontend.onnx import import_onnx
from horq_tvm.manifest import Manifest
from horq_tvm.relay_passes.rewrite_layers import TAP_NAMES
from horq_tvm.runtime.loader import LoadedModel
from horq_tvm.specs import LayerConfig
from tests.end_to_end.taps import Array, Tap, assert_within, compare

ROUNDING = 1e-5
SIZE = (2, 9, 11)


@dataclass(frozen=True)
class Chain:
    """conv [C→M], affine, `middle`, conv [M→F]; both 3×3, padded by one, `static` of `order`."""

    channels: int
    width: int
    filters: int
    order: int
    middle: str
    groups: int = 1
    stride: int = 1

    @property
    def betas(self) -> tuple[float, ...]:
        return (1.0, 0.5, 0.25, 0.125)[: self.order]


MIDDLES = ("affine", "relu", "prelu", "clip", "residual", "residual prelu", "both")
CHAINS = [
    *(Chain(32, 32, 16, 2, middle) for middle in MIDDLES),
    *(Chain(32, 32, 16, order, middle) for middle in ("residual prelu", "both") for order in (1, 3)),
    *(Chain(20, width, 40, 2, "relu") for width in (16, 33, 48, 64, 96, 160)),
    *(Chain(64, 64, 64, 2, middle, groups, stride) for middle, groups, stride in (("prelu", 2, 1), ("affine", 1, 2))),
]


class Builder:
    """An ONNX graph of all chains, chain i from input x<i> to output y<i>."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.rng = np.random.default_rng(3)

    def constant(self, name: str, value: Array) -> str:
        self.weights.append(numpy_helper.from_array(value.astype("float32"), name))
        return name

    def add(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def conv(self, x: str, name: str, filters: int, channels: int, groups: int = 1, stride: int = 1) -> str:
        weight = self.constant(f"{name}.w", self.rng.standard_normal((filters, channels // groups, 3, 3)))
        return self.add("Conv", [x, weight], name, pads=[1, 1, 1, 1], group=groups, strides=[stride, stride])

    def chain(self, i: int, chain: Chain) -> None:
        y = self.conv(f"x{i}", f"first{i}", chain.width, chain.channels, chain.groups, chain.stride)
        channel = (chain.width, 1, 1)
        # To about the spread of β: a sum of L products of ±1 and of about 1 has a deviation of about √L.
        scale = np.exp(0.3 * self.rng.standard_normal(channel)) / np.sqrt(9 * chain.channels / chain.groups)
        y = self.add("Mul", [y, self.constant(f"scale{i}", scale)], f"scaled{i}")
        y = self.add("Add", [y, self.constant(f"shift{i}", 0.3 * self.rng.standard_normal(channel))], f"shifted{i}")
        if "residual" in chain.middle:
            y = self.add("Add", [y, f"r{i}"], f"sum{i}")
        if "prelu" in chain.middle:
            y = self.add("PRelu", [y, self.constant(f"slope{i}", self.rng.uniform(0, 0.5, channel))], f"prelu{i}")
        elif chain.middle == "relu":
            y = self.add("Relu", [y], f"relu{i}")
        elif chain.middle == "clip":
            limits = [self.constant(f"low{i}", np.array(-0.9)), self.constant(f"high{i}", np.array(1.1))]
            y = self.add("Clip", [y, *limits], f"clip{i}")
        second = self.conv(y, f"second{i}", chain.filters, chain.width)
        if chain.middle == "both":  # the activation is needed as a float as well
            second = self.conv(self.add("Add", [y, y], f"twice{i}"), f"third{i}", chain.filters, chain.width)
            self.add("Add", [f"second{i}", second], f"y{i}")
        else:
            self.add("Identity", [second], f"y{i}")

    def model(self) -> onnx.ModelProto:
        inputs = []
        for i, chain in enumerate(CHAINS):
            self.chain(i, chain)
            inputs.append(_tensor(f"x{i}", (SIZE[0], chain.channels, *SIZE[1:])))
            if "residual" in chain.middle:
                inputs.append(_tensor(f"r{i}", (SIZE[0], chain.width, *SIZE[1:])))
        outputs = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None) for i in range(len(CHAINS))]
        graph = helper.make_graph(self.nodes, "chains", inputs, outputs, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def _tensor(name: str, shape: tuple[int, ...]) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return Builder().model()


@pytest.fixture(scope="module")
def outputs(model: onnx.ModelProto) -> tuple[dict[str, Array], dict[str, Array]]:
    """The outputs without and with taps of the second layers."""
    configs = {
        f"{place}{i}": LayerConfig(chain.order, "static", chain.betas)
        for i, chain in enumerate(CHAINS)
        for place in ("first", "second")
    }
    imported = import_onnx(model)
    rng = np.random.default_rng(4)
    feed = [rng.standard_normal(spec.shape).astype("float32") for spec in imported.inputs]
    canonical = pipeline.canonicalise()(imported.mod)
    fused, tapped = (
        library(imported, pipeline.rewrite(configs, taps)(canonical))(*feed)
        for taps in ([], [name for name in configs if name.startswith("second")])
    )
    return fused, tapped


def library(imported: ImportedModel, rewritten: tvm.IRModule) -> LoadedModel:
    """As `build` makes it, without the comparison with the float model."""
    names = [str(name) for name in rewritten.attrs[TAP_NAMES]] if TAP_NAMES in (rewritten.attrs or {}) else []
    outputs = result_specs(rewritten, [*(spec.name for spec in imported.outputs), *names])
    return emit(rewritten, targets.resolve("native"), Manifest(imported.inputs, outputs), lambda _message: None).load()


@pytest.mark.parametrize("i", range(len(CHAINS)), ids=lambda i: str(CHAINS[i]).removeprefix("Chain"))
def test_a_fused_chain_is_the_same_as_its_parts(
    i: int, model: onnx.ModelProto, outputs: tuple[dict[str, Array], dict[str, Array]]
) -> None:
    fused, tapped = outputs
    (weight,) = (numpy_helper.to_array(w) for w in model.graph.initializer if w.name == f"second{i}.w")
    signs, alpha = reference.binarize_weights(weight)
    tap, padding = Tap.of(tapped, f"second{i}"), (1, 1, 1, 1)
    compare(tap, signs, alpha, scale="static", padding=padding)
    doubtful = doubtful_windows(tap.image, tap.beta[0])
    assert doubtful.mean() < 0.25
    expected = reference.conv2d(
        tap.image, signs, alpha, tap.beta[0], order=CHAINS[i].order, scale="static", padding=padding
    )
    found = np.where(doubtful, tapped[f"y{i}"], fused[f"y{i}"])
    # What stays float between and behind the layers has roundings of its own.
    assert_within(found, tapped[f"y{i}"], expected.tolerance + 1e-4 * (CHAINS[i].middle == "both"))
    assert not np.array_equal(fused[f"y{i}"], np.zeros_like(fused[f"y{i}"]))


def doubtful_windows(x: Array, beta: Array) -> Array:
    """bool [N,1,HO,WO]: the windows with a value that other roundings could send to the other side of a threshold."""
    residual, doubtful = x, np.zeros(x.shape, bool)
    for step in beta:
        doubtful |= np.abs(residual) <= ROUNDING * np.maximum(np.abs(x), 1)
        residual = residual - np.where(residual >= 0, step, -step).astype("float32")
    doubtful &= x != 0  # what a ReLU makes 0 is 0 in any rounding
    return reference.patches(doubtful, (3, 3), padding=(1, 1, 1, 1)).any(axis=(3, 4))[:, None]
