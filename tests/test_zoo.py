"""The networks: their shapes, what is binary in them, and that the variants differ in nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from horq_tvm import zoo
from horq_tvm.errors import UsageError
from horq_tvm.export import to_onnx
from horq_tvm.nn import HorqConv2d, HorqLayer, HorqLinear, warm_start
from horq_tvm.nn.quantise import balanced
from horq_tvm.torch_ops import filter_scales, sign

torch.set_num_threads(1)

# Network: its HORQ convolutions, HORQ dense layers, and float convolutions.
LAYERS = {
    "mnist": (1, 1, 1),
    "vgg_small": (5, 0, 1),
    "resnet20": (18, 0, 1 + 2),
    "resnet10": (8, 0, 1 + 3),
    "resnet18": (16, 0, 1 + 3),
    "quicknet": (16, 0, 3 + 3),
}


def _count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(layer, kind) for layer in model.modules())


@pytest.mark.parametrize("network", zoo.NETWORKS)
def test_layers_and_shapes(network: str) -> None:
    model = zoo.build(network, 2, "sample").eval()
    found = (_count(model, HorqConv2d), _count(model, HorqLinear), _count(model, nn.Conv2d))
    assert found == LAYERS[network]
    x = zoo.example(network)
    with torch.no_grad():
        assert model(x).shape == (1, zoo.NETWORKS[network].classes)


@pytest.mark.parametrize("network", ["mnist", "resnet20"])
def test_what_is_binarised_is_signed(network: str) -> None:
    """Behind a ReLU the first plane would say nothing: every HORQ layer is given some of either sign."""
    model, shares = zoo.build(network, 1, "sample").train(), []
    for layer in model.modules():
        if isinstance(layer, HorqLayer):
            layer.register_forward_pre_hook(lambda _, inputs: shares.append((inputs[0] < 0).float().mean().item()))
    model(zoo.example(network, 4))
    assert len(shares) == sum(LAYERS[network][:2])
    assert all(0.2 < share < 0.8 for share in shares)


@pytest.mark.parametrize("network", ["mnist", "resnet20"])
def test_variants_share_their_parameters(network: str) -> None:
    """So that each starts from any other: β apart, they are the same state dict."""
    state = zoo.build(network, "float").state_dict()
    for order in ("bw", 1, 3):
        model = zoo.build(network, order, "static")
        fitted = warm_start(model, state)
        assert len(fitted) == (sum(LAYERS[network][:2]) if isinstance(order, int) else 0)
        assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def test_binary_weights_are_those_of_a_horq_layer() -> None:
    """On activations of ±1, of which K=1 with β = 1 loses nothing, `bw` computes what the HORQ layer does."""
    torch.manual_seed(0)
    layers = zoo.Layers("bw"), zoo.Layers(1, "sample")
    x = sign(torch.randn(2, 8, 5, 5))
    binary, horq = (layer.conv(8, 6, 3, stride=2, padding=1) for layer in layers)
    horq.load_state_dict(binary.state_dict())
    torch.testing.assert_close(binary(x), horq.eval()(x))
    torch.testing.assert_close(binary.eval()(x), horq(x))
    binary, horq = (layer.linear(8, 6).eval() for layer in layers)
    horq.load_state_dict(binary.state_dict())
    rows = sign(torch.randn(3, 8))
    torch.testing.assert_close(binary(rows), horq(rows))
    weight = balanced(binary.weight)
    torch.testing.assert_close(binary(torch.eye(8)), (filter_scales(weight)[:, None] * sign(weight)).T)


def test_bw_trains_its_latent_weights() -> None:
    layer = zoo.Layers("bw").conv(4, 4, 3)
    layer(torch.randn(2, 4, 5, 5)).square().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().min() > 0


def test_bw_exports_to_plain_onnx(tmp_path: Path) -> None:
    """Any runtime takes it."""
    model, x = zoo.build("mnist", "bw").eval(), zoo.example("mnist")
    proto = to_onnx(model, x, tmp_path / "bw.onnx", ["image"], ["scores"])
    assert all(not node.domain for node in proto.graph.node)
    session = onnxruntime.InferenceSession(tmp_path / "bw.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        np.testing.assert_allclose(session.run(None, {"image": x.numpy()})[0], model(x).numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: zoo.build("resnet50", 2), "network 'resnet50'; accepted: mnist, vgg_small, resnet20"),
        (lambda: zoo.build("mnist", 0), "order 0; accepted are 1 to 8"),
        (lambda: zoo.build("mnist", "two"), "order 'two'; accepted: an int, 'float' or 'bw'"),
        (lambda: zoo.build("mnist", 2, "image"), "scale 'image'; accepted are"),
    ],
)
def test_mistakes(call: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()
