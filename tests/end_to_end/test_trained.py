"""What is trained is what runs: convolutions and dense layers of all scales, from training to the library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import horq_tvm
from horq_tvm import reference
from horq_tvm.compiler import CompiledModel
from horq_tvm.export import export_program, to_onnx
from horq_tvm.nn import HorqConv2d, HorqLayer, HorqLinear, RPReLU, RSign
from horq_tvm.specs import SCALES, Scale
from tests.end_to_end.taps import Array, Tap, assert_within, compare
from tests.networks import binary_weight

torch.set_num_threads(1)

LAYERS = ("conv", "dilated", "dense", "tokens")
BATCH = 8


class Net(nn.Module):
    """Groups, dilation, asymmetric padding, biases, dense of two and of three axes; [N,3,9,8] → [N,4]."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.shift = RSign(16)
        self.conv = HorqConv2d(16, 24, 3, (2, 1), (1, 0, 2, 1), groups=2, bias=True, order=3, scale=scale)
        self.act = RPReLU(24)
        self.norm2 = nn.BatchNorm2d(24)
        self.dilated = HorqConv2d(24, 20, 3, padding=2, dilation=2, scale=scale)
        self.norm3 = nn.BatchNorm2d(20)
        self.dense = HorqLinear(20 * 5 * 7, 20, bias=True, scale=scale)
        self.norm4 = nn.BatchNorm1d(20)
        self.tokens = HorqLinear(10, 8, order=1, scale=scale)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(self.shift(self.norm(self.stem(x)))))
        x = self.norm3(self.dilated(self.norm2(x)))
        x = self.norm4(self.dense(x.flatten(1)))
        return self.head(self.tokens(x.reshape(-1, 2, 10)).flatten(1))


@dataclass(frozen=True)
class Trained:
    """A network trained for some steps, its ONNX file, the library of it, and what one with taps gives."""

    scale: Scale
    module: Net
    path: Path
    x: Tensor
    library: CompiledModel
    tapped: Mapping[str, Array]

    def tap(self, name: str) -> Tap:
        """A layer's tensors; a dense one's as those of the 1×1 convolution [N,1,M,L] that the compiler makes of it."""
        tap = Tap.of(self.tapped, name)
        images = len(tap.input)
        rows = {part: getattr(tap, part) for part in ("input", "output")}
        as_image = {part: v.reshape(images, 1, -1, v.shape[-1]) if v.ndim < 4 else v for part, v in rows.items()}
        return replace(tap, **as_image)


@pytest.fixture(scope="module", params=SCALES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    torch.manual_seed(0)
    module, x = Net(request.param), torch.randn(BATCH, 3, 9, 8)
    optimiser = torch.optim.Adam(module.parameters(), 0.01)
    for _ in range(5):
        loss = (module(torch.randn(16, 3, 9, 8)) - torch.randn(16, 4)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    path = tmp_path_factory.mktemp("trained") / "net.onnx"
    to_onnx(module.eval(), x, path, ["x"], ["y"])
    tapped = horq_tvm.build(path, taps=LAYERS).load()
    return Trained(request.param, module, path, x, horq_tvm.build(path), tapped(x.numpy()))


def test_onnx_and_pytorch_give_the_same_library(trained: Trained) -> None:
    (y,) = trained.library(trained.x.numpy()).values()
    (other,) = horq_tvm.build(export_program(trained.module, trained.x))(trained.x.numpy()).values()
    np.testing.assert_array_equal(y, other)
    orders = {record["name"]: (record["order"], record["scale"]) for record in trained.library.report["layers"]}
    wanted = {name: (trained.module.get_submodule(name).order, trained.scale) for name in LAYERS}
    assert orders == {"stem": (None, None), **wanted, "head": (None, None)}


def test_pytorch_onnxruntime_and_the_library_agree(trained: Trained) -> None:
    (compiled,) = trained.library(trained.x.numpy()).values()
    [interpreted] = ort.InferenceSession(trained.path).run(None, {"x": trained.x.numpy()})
    with torch.no_grad():
        expected = trained.module(trained.x).numpy()
    for found in (compiled, interpreted):
        # A sign that flips where a residual is as good as 0 moves an image's scores; in most images none does.
        close = np.abs(found - expected).max(1) <= 1e-5 * np.abs(expected).max()
        assert close.mean() >= 0.75
        np.testing.assert_array_equal(found.argmax(1)[close], expected.argmax(1)[close])


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_exact_on_its_own_input(trained: Trained, name: str) -> None:
    layer, tap = trained.module.get_submodule(name), trained.tap(name)
    weight, geometry = _as_conv2d(name, layer)
    alpha, bias = layer.alpha.numpy(), None if layer.bias is None else layer.bias.detach().numpy()
    if trained.scale != "patch":
        assert compare(tap, weight, alpha, bias, scale=trained.scale, **geometry).doubtful <= 1e-3 * tap.input.size
        return
    how: dict[str, Any] = {"order": layer.order, "scale": "patch", **geometry}
    given = reference.conv2d(tap.image, weight, alpha, tap.beta, bias, **how)
    taps = weight.shape[2] * weight.shape[3]
    np.testing.assert_array_equal(tap.planes, reference.pack_rows(given.planes, taps))
    assert_within(tap.features, given.output, given.tolerance)
    own = reference.conv2d(tap.image, weight, alpha, **how)
    assert (np.abs(tap.beta.astype("float64") - own.beta) <= 1e-6 * own.beta[..., :1]).all()
    assert own.doubtful_signs.mean() < 1e-3


@pytest.mark.parametrize("name", LAYERS)
def test_pytorch_computes_a_layer_as_the_library_does(trained: Trained, name: str) -> None:
    """The layer of the network in eval, fed with what the library fed its own."""
    layer, tap = trained.module.get_submodule(name), trained.tap(name)
    weight, geometry = _as_conv2d(name, layer)
    with torch.no_grad():
        if isinstance(layer, HorqConv2d):
            found = layer(torch.from_numpy(tap.image)).numpy()
        else:
            found = layer(torch.from_numpy(_channels_first(name, tap.input[:, 0]))).mT[:, :, None].numpy()
    bias = np.zeros(len(weight), "float32") if layer.bias is None else layer.bias.detach().numpy()
    beta = None if layer.beta is None else layer.beta.detach().numpy()
    how: dict[str, Any] = {"order": layer.order, "scale": trained.scale, **geometry}
    own = reference.conv2d(tap.image, weight, layer.alpha.numpy(), beta, bias, **how)
    # Each engine's means are its own: off by 1e-6·β_1 at most, and so is what they are multiplied with.
    means = 0 if beta is not None else 2e-6 * np.abs(own.output - bias[:, None, None]).max()
    expected = np.where(own.doubtful, found, tap.features)
    assert own.doubtful.mean() < 0.05
    assert_within(found, expected, 2 * own.tolerance + means)


FLATTENED = {"dense": (20, 5, 7)}
"""The [C,H,W] whose flattening the layer reads: the library has its rows, and the weight's, in the order H, W, C."""


def _channels_first(name: str, rows: Array) -> Array:
    """Rows [...,L] in the order of the module."""
    if name not in FLATTENED:
        return rows
    channels, *size = FLATTENED[name]
    return np.moveaxis(rows.reshape(*rows.shape[:-1], *size, channels), -1, -3).reshape(rows.shape)


def _channels_last(name: str, rows: Array) -> Array:
    """Rows [...,L] in the order of the library."""
    if name not in FLATTENED:
        return rows
    return np.moveaxis(rows.reshape(*rows.shape[:-1], *FLATTENED[name]), -3, -1).reshape(rows.shape)


def _as_conv2d(name: str, layer: HorqLayer) -> tuple[Array, dict[str, Any]]:
    """The weight ±1 [F,C/g,kh,kw] and the geometry; a dense layer is a 1×1 convolution, as the compiler has it."""
    weight, _ = binary_weight(layer)
    if isinstance(layer, HorqConv2d):
        return weight, {
            "strides": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
            "groups": layer.groups,
        }
    return _channels_last(name, weight)[..., None, None], {}
