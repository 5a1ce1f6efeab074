"""Whole networks lowered for CUDA and executed by PoCL: every layer on its own input, and what they predict."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

pytest.importorskip("tvm")

from horq_tvm import compiler, targets
from horq_tvm.relay_passes.rewrite_layers import TAP_NAMES
from tests.end_to_end.alone import as_image, operands
from tests.end_to_end.subjects import FLATTENED, Maker, cifar, digits_network, resnet18, trained_file
from tests.end_to_end.taps import Array, Tap, compare
from tests.schedules.cuda import pocl
from tests.schedules.cuda.card import OnPocl

torch.set_num_threads(1)

IMAGES = 4
NETWORKS: Mapping[str, Maker] = {
    "digits": digits_network,
    "mnist-k2": trained_file("mnist-k2"),
    "resnet20-k2": trained_file("resnet20-k2"),
    "cifar-static-3": partial(cifar, 3, "static", IMAGES),
    "cifar-sample-2": partial(cifar, 2, "sample", IMAGES),
    "cifar-patch-2": partial(cifar, 2, "patch", IMAGES),
    "resnet18-k2-64": partial(resnet18, 2, 64),
    "resnet18-k1-224": partial(resnet18, 1, 224),
    "resnet18-k2-224": partial(resnet18, 2, 224),
}
SLOW = ("cifar-static-3", "resnet18-k1-224", "resnet18-k2-224")


@pytest.fixture(scope="module", autouse=True)
def _device() -> None:
    pocl.device()


@lru_cache(maxsize=1)
def made(network: str) -> tuple[onnx.ModelProto, Array]:
    """The file and its images."""
    with tempfile.TemporaryDirectory() as folder:
        path, x = NETWORKS[network](Path(folder))
        return onnx.load(path), x[:IMAGES]


def on_pocl(model: onnx.ModelProto, x: Array, taps: list[str]) -> Mapping[str, Array]:
    """The outputs of the network lowered for CUDA; of large images it is worth to optimise the kernels."""
    rewritten = compiler.rewritten(model, targets.resolve("cuda"), input_shapes={"image": x.shape}, taps=taps)
    labels = ["scores", *(str(name) for name in rewritten.attrs[TAP_NAMES])] if taps else ["scores"]
    return OnPocl(rewritten, labels, optimised=x[0].size > 2**16)(x)


@pytest.mark.parametrize("network", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in NETWORKS])
def test_network(network: str) -> None:
    """Planes and sums of every layer are the reference's on its own input; predictions are ONNX Runtime's."""
    model, x = made(network)
    layers = operands(model)
    outputs = on_pocl(model, x, list(layers))
    for layer, given in layers.items():
        tap = Tap.of(outputs, layer)
        found = _compare(replace(tap, input=as_image(tap.input), output=as_image(tap.output)), given, network, layer)
        assert found.doubtful <= 1e-4 * found.signs
    (expected,) = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        ["scores"], {"image": x}
    )
    np.testing.assert_array_equal(outputs["scores"].argmax(1), expected.argmax(1))
    # Without taps, epilogues go on to the next layer's planes.
    np.testing.assert_array_equal(on_pocl(model, x, [])["scores"].argmax(1), expected.argmax(1))


def _compare(tap: Tap, given: Any, network: str, layer: str) -> Any:
    weight = given.weight
    if weight.ndim == 2:
        if (network, layer) in FLATTENED:  # the library has its rows in the order H, W, C
            channels, *size = FLATTENED[network, layer]
            weight = np.moveaxis(weight.reshape(-1, channels, *size), 1, 3).reshape(weight.shape)
        weight = weight[..., None, None]
    return compare(tap, weight, given.alpha, given.bias, scale=given.attributes["scale"].decode(), **given.geometry)
