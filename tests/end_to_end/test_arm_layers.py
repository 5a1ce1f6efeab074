"""Networks on ARM under qemu and on x86: every layer on the same input, and what they predict of real images."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import horq_tvm
from tests.end_to_end.alone import alone, as_image, horq_nodes, operands
from tests.end_to_end.emulator import machine
from tests.end_to_end.subjects import FLATTENED, IMAGES, Maker, cifar, digits_network, resnet18, trained_file
from tests.end_to_end.taps import MEAN_ERROR, Array, Tap, compare

torch.set_num_threads(1)

TARGETS = (("rpi4", "aarch64"), ("rpi2", "armv7"))

# --- Networks ---------------------------------------------------------------------------------------------------------

NETWORKS: Mapping[str, Maker] = {
    "digits": digits_network,
    "mnist-k2": trained_file("mnist-k2"),
    "resnet20-k2": trained_file("resnet20-k2"),
    "cifar-sample": partial(cifar, 2, "sample", IMAGES),
    "resnet20-k1": trained_file("resnet20-k1"),
    "resnet18-k1": partial(resnet18, 1, 224),
}
SLOW = ("resnet20-k1", "resnet18-k1")


@lru_cache(maxsize=len(NETWORKS))
def made(network: str) -> tuple[onnx.ModelProto, Array]:
    """The file and its images, for both tests and both architectures."""
    with tempfile.TemporaryDirectory() as folder:
        path, x = NETWORKS[network](Path(folder))
        return onnx.load(path), x


def marked(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in names]


# --- Layer by layer ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=len(NETWORKS))
def tapped_on_x86(network: str) -> Mapping[str, Tap]:
    """What each HORQ layer was fed and gave in the x86 library."""
    model, x = made(network)
    layers = list(horq_nodes(model))
    outputs = horq_tvm.build(model, input_shapes={"image": x.shape}, taps=layers)(x)
    return {layer: Tap.of(outputs, layer) for layer in layers}


def as_node(tapped: Array, flattened: tuple[int, ...] | None = None) -> Array:
    """An input [N,H,W,C] or [N,L] in the order of the file."""
    if tapped.ndim == 4:
        return np.ascontiguousarray(np.moveaxis(tapped, 3, 1))
    if flattened is None:
        return tapped
    channels, *size = flattened
    return np.ascontiguousarray(np.moveaxis(tapped.reshape(-1, *size, channels), 3, 1)).reshape(tapped.shape)


@pytest.mark.parametrize(("target", "name"), TARGETS)
@pytest.mark.parametrize("network", marked(NETWORKS))
def test_every_layer_on_the_input_that_x86_fed_its_own(network: str, target: str, name: str) -> None:
    """Bit-equal inputs: the reference's planes and sums, and x86's planes but where a sign is in doubt."""
    emulated, (model, _), here = machine(name), made(network), tapped_on_x86(network)
    fed = {layer: as_node(tap.input, FLATTENED.get((network, layer))) for layer, tap in here.items()}
    layers = alone(model, {layer: x.shape for layer, x in fed.items()})
    outputs = emulated(horq_tvm.build(layers, target, taps=list(fed)), **{f"{layer}.x": x for layer, x in fed.items()})
    for layer, given in operands(model).items():
        there = Tap.of(outputs, layer)
        np.testing.assert_array_equal(as_node(there.input), fed[layer])
        tap = replace(there, input=as_image(there.input), output=as_image(there.output))
        dense = given.weight.ndim == 2
        weight = given.weight[..., None, None] if dense else given.weight
        scale = given.attributes["scale"].decode()
        found = compare(tap, weight, given.alpha, given.bias, scale=scale, **given.geometry)
        assert found.doubtful <= 1e-4 * found.signs
        means = np.abs(tap.beta.astype("float64") - here[layer].beta)
        assert (means <= 2 * MEAN_ERROR * here[layer].beta[:, :1]).all()
        if (network, layer) not in FLATTENED:  # else the bits are in another order
            differing = np.bitwise_count(tap.planes ^ here[layer].planes).sum()
            assert differing <= found.doubtful * tap.beta.shape[1]


# --- End to end -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=len(NETWORKS))
def scores_on_x86(network: str) -> Array:
    model, x = made(network)
    return horq_tvm.build(model, input_shapes={"image": x.shape})(x)["scores"]


@pytest.mark.parametrize(("target", "name"), TARGETS)
@pytest.mark.parametrize("network", marked(name for name in NETWORKS if name != "cifar-sample"))
def test_predictions_of_real_images_are_those_of_x86(network: str, target: str, name: str) -> None:
    emulated, (model, x), expected = machine(name), made(network), scores_on_x86(network)
    found = emulated(horq_tvm.build(model, target, input_shapes={"image": x.shape}), image=x)["scores"]
    assert len(set(expected.argmax(1))) > (1 if network == "resnet18-k1" else 3)
    np.testing.assert_array_equal(found.argmax(1), expected.argmax(1))


@pytest.mark.parametrize(("target", "name"), [("rpi5", "aarch64"), ("rpi4", "aarch64"), ("rpi2", "armv7")])
def test_an_int8_rest_predicts_as_on_x86(target: str, name: str) -> None:
    """SDOT, SMULL and VMULL; the ranges are those of the same calibration."""
    emulated, (model, x) = machine(name), made("mnist-k2")
    how = {"input_shapes": {"image": x.shape}, "rest": "int8", "calibration": {"image": x}}
    compiled = horq_tvm.build(model, target, **how)
    assert {layer["rest"] for layer in compiled.report["layers"]} == {"int8", None}
    found = emulated(compiled, image=x)["scores"]
    expected = horq_tvm.build(model, **how)(x)["scores"]
    np.testing.assert_array_equal(found.argmax(1), expected.argmax(1))
    assert np.abs(found - expected).max() <= 0.05 * np.abs(expected).max()
