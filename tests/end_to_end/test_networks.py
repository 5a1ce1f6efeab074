"""A CIFAR-shaped ResNet with HORQ layers, from ONNX and from PyTorch, against the reference and ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

import horq_tvm
from horq_tvm import reference
from horq_tvm.compiler import CompiledModel
from horq_tvm.export import export_program, to_onnx
from horq_tvm.specs import Scale
from tests.end_to_end.alone import alone
from tests.end_to_end.taps import Array, Tap, assert_within, compare
from tests.networks import HORQ_LAYERS, binary_weight, cifar_images, cifar_resnet, cifar_resnet_float

torch.set_num_threads(1)

KINDS: tuple[tuple[int, Scale], ...] = ((2, "sample"), (2, "static"), (3, "static"))
BATCH = 8


@dataclass(frozen=True)
class Network:
    """A network in both forms, a library of it without taps, and what that library and one with taps give for `x`."""

    scale: Scale
    module: torch.nn.Module
    path: Path
    x: Array
    library: CompiledModel
    outputs: Array
    tapped: Mapping[str, Array]
    tapped_steps: int

    def tap(self, name: str) -> Tap:
        return Tap.of(self.tapped, name)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[1]}-{kind[0]}")
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Network:
    order, scale = request.param
    module, x = cifar_resnet(order, scale), cifar_images(BATCH, seed=5)
    path = tmp_path_factory.mktemp("network") / "resnet.onnx"
    to_onnx(module, x, path, ["x"], ["y"])
    library = horq_tvm.build(path)
    tapped = horq_tvm.build(path, taps=HORQ_LAYERS).load()
    steps = len(tapped.profile(x.numpy(), runs=1))
    return Network(scale, module, path, x.numpy(), library, library(x.numpy())["y"], tapped(x.numpy()), steps)


def session(model: Path | bytes) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def assert_same_network(found: Array, expected: Array) -> None:
    """Alike end to end: a sign may flip where a residual is as good as 0, which moves scores a little.

    Predictions agree but for ties closer than that.
    """
    slack = 0.01 * np.abs(expected).max()
    assert np.abs(found - expected).max() <= slack
    ranked = np.sort(expected, axis=1)
    clear = ranked[:, -1] - ranked[:, -2] > 2 * slack
    assert clear.sum() >= BATCH // 2
    np.testing.assert_array_equal(found.argmax(1)[clear], expected.argmax(1)[clear])


def test_every_horq_node_is_a_binary_layer_and_no_other(network: Network) -> None:
    records = {record["name"]: record for record in network.library.report["layers"]}
    rewritten = {name for name, record in records.items() if record["order"] is not None}
    assert rewritten == set(HORQ_LAYERS)
    assert {records[name]["scale"] for name in rewritten} == {network.scale}
    assert network.library.report["agreement"] is None  # trained layers cost nothing that training did not see


def test_onnx_and_pytorch_give_the_same(network: Network) -> None:
    x = torch.from_numpy(network.x)
    (y,) = horq_tvm.build(network.module, example_inputs=(x,))(network.x).values()
    np.testing.assert_array_equal(y, network.outputs)
    with torch.no_grad():
        assert_same_network(network.outputs, network.module(x).numpy())


def test_a_saved_program_gives_the_same(tmp_path: Path) -> None:
    module, x = cifar_resnet(2, "static"), cifar_images(BATCH, seed=7)
    torch.export.save(export_program(module, x), tmp_path / "network.pt2")
    (y,) = horq_tvm.build(tmp_path / "network.pt2")(x.numpy()).values()
    (expected,) = horq_tvm.build(module, example_inputs=(x,))(x.numpy()).values()
    np.testing.assert_array_equal(y, expected)


def test_onnxruntime_runs_the_same_file_to_the_same_end(network: Network) -> None:
    [expected] = session(network.path).run(None, {"x": network.x})
    assert_same_network(network.outputs, expected)


@pytest.mark.parametrize("name", HORQ_LAYERS)
def test_a_layer_is_the_reference_on_its_own_input(network: Network, name: str) -> None:
    layer = network.module.get_submodule(name)
    weight, alpha = binary_weight(layer)
    result = compare(network.tap(name), weight, alpha, scale=network.scale, **geometry(layer))
    assert result.doubtful <= 1e-4 * result.signs


def geometry(layer: Any) -> dict[str, Any]:
    return {
        "strides": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "groups": layer.groups,
    }


def test_layers_are_those_of_onnxruntime_on_the_same_input(network: Network) -> None:
    """The file's own HORQ nodes, each fed with what our library fed its layer."""
    taps = {name: network.tap(name) for name in HORQ_LAYERS}
    model = alone(onnx.load(network.path), {name: tap.image.shape for name, tap in taps.items()})
    results = session(model.SerializeToString()).run(None, {f"{name}.x": tap.image for name, tap in taps.items()})
    for name, tap, found in zip(taps, taps.values(), results, strict=True):
        layer = network.module.get_submodule(name)
        weight, alpha = binary_weight(layer)
        beta = tap.beta[0] if network.scale == "static" else None
        how: dict[str, Any] = {"order": tap.beta.shape[1], "scale": network.scale, **geometry(layer)}
        own = reference.conv2d(tap.image, weight, alpha, beta, **how)
        # Either engine is within the tolerance of the sum for its own β, which for `sample` are off by 1e-6·β_1.
        means = 0 if beta is not None else 1e-6 * tap.beta[:, :1, None, None] * alpha[:, None, None]
        slack = 2 * (own.tolerance + means * np.abs(own.sums).sum(0))
        assert own.doubtful.mean() < 0.01
        assert_within(np.where(own.doubtful, found, tap.features), found, slack)


def test_fusing_the_next_binarisation_changes_nothing(network: Network) -> None:
    """Taps keep activations in float and layers apart; without them an epilogue goes on to the next layer's planes."""
    assert_same_network(network.outputs, network.tapped["y"])
    if network.scale == "static":
        assert len(network.library.load().profile(network.x, runs=1)) < network.tapped_steps


def test_the_float_twin_is_onnxruntimes(tmp_path: Path) -> None:
    model, x = cifar_resnet_float(), cifar_images(BATCH, seed=6)
    to_onnx(model, x, tmp_path / "twin.onnx", ["x"], ["y"])
    [expected] = session(tmp_path / "twin.onnx").run(None, {"x": x.numpy()})
    for compiled in (
        horq_tvm.build(tmp_path / "twin.onnx", order="float"),
        horq_tvm.build(model, example_inputs=(x,), order="float"),
    ):
        (y,) = compiled(x.numpy()).values()
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
