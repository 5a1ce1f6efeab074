"""Which layers of a model are swapped, what they take over, and what is said of the others."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import horq_tvm
from horq_tvm.errors import UsageError
from horq_tvm.nn import HorqConv2d, HorqLayer, HorqLinear, RPReLU, RSign, convert
from horq_tvm.torch_ops import sign
from tests.networks import HORQ_LAYERS, cifar_images, cifar_resnet_float

torch.set_num_threads(1)


class Mixed(nn.Module):
    """Layers of every kind, [N,3,12,12] → [N,2]; branches, and functional layers, which are layers too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 8, (3, 2), (2, 1), padding="valid", groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.reflect = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.same = nn.Conv2d(8, 8, (4, 3), padding="same", dilation=(1, 2), bias=False)
        self.unused = nn.Conv2d(8, 8, 1)
        self.other = nn.Linear(8, 8)
        self.left, self.right = nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x))
        x = self.same(self.reflect(self.depthwise(self.inner(x)))).mean((2, 3))
        y = self.other(x)
        return self.left(y) + self.right(F.relu(y))


def _swapped(model: nn.Module) -> dict[str, HorqLayer]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, HorqLayer)}


def _quietly(model: nn.Module, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="layer")
        return convert(model, **options)


EXAMPLES = [None, torch.zeros(2, 3, 12, 12)]


@pytest.mark.parametrize("example", EXAMPLES)
def test_which_layers(example: Tensor | None) -> None:
    assert list(_swapped(_quietly(Mixed(), example_inputs=example))) == ["inner", "same", "other"]


def test_the_same_layers_as_build_would_rewrite() -> None:
    """Those whose HORQ twins the tests' network has; the shortcuts are layers like any other."""
    names = list(_swapped(_quietly(cifar_resnet_float())))
    assert [name for name in names if "shortcut" not in name] == list(HORQ_LAYERS)
    library = horq_tvm.build(cifar_resnet_float(), example_inputs=(cifar_images(1),), order=1, scale="sample")
    assert names == sorted(record["name"] for record in library.report["layers"] if record["order"] is not None)


def test_weights_geometry_mode_and_options_are_taken_over() -> None:
    torch.manual_seed(0)
    model = Mixed().eval()
    options: dict[str, Any] = {"order": 3, "scale": "static", "ste": "tanh", "beta": "running", "balance": False}
    new = _quietly(model, **options)
    assert not any(isinstance(layer, HorqLayer) for layer in model.modules())
    for name, layer in _swapped(new).items():
        old = model.get_submodule(name)
        assert torch.equal(layer.weight, old.weight)
        assert layer.weight is not old.weight
        assert (layer.bias is None) == (old.bias is None)
        assert layer.bias is None or torch.equal(layer.bias, old.bias)
        assert not layer.training
        assert {key: getattr(layer.options, key) for key in options} == options
    inner, same = new.inner, new.same
    assert (inner.stride, inner.padding, inner.groups) == ((2, 1), (0, 0, 0, 0), 2)
    assert (same.dilation, same.padding) == ((1, 2), (1, 2, 2, 2))
    x = torch.randn(2, 8, 9, 9)
    assert same.train()(x).shape == model.same(x).shape


@pytest.mark.parametrize("name", ["inner", "same", "other"])
def test_a_converted_layer_is_the_float_one_but_for_its_rounding(name: str) -> None:
    """With weights of ±1 and K = 8 the layer is nearly the float one: the windows lie where they did."""
    torch.manual_seed(0)
    model = Mixed().eval()
    model.get_submodule(name).weight.data = sign(model.get_submodule(name).weight.data)
    layer = _quietly(model, order=8, balance=False).get_submodule(name)
    x = torch.randn((2, 8, 7, 7) if isinstance(layer, HorqConv2d) else (2, 8))
    expected = model.get_submodule(name)(x)
    assert (layer(x) - expected).norm() < 0.2 * expected.norm()


def test_layers_to_skip() -> None:
    assert list(_swapped(_quietly(Mixed(), skip=["same"]))) == ["inner", "other"]
    with pytest.raises(UsageError, match=r"skip: no layer conv9 in the model; there are stem, inner, depthwise"):
        convert(Mixed(), skip=["conv9"])


def _chain(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), *between, nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(512, 2))


class _Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = _chain()

    def forward(self, x: Tensor) -> Tensor:
        x = self.body[0](x).relu()
        return self.body[3](self.body[2](self.body[1](x + F.max_pool2d(x, 3, 1, 1))))


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize(
    ("model", "warned"),
    [
        (_chain(nn.ReLU()), True),
        (_chain(nn.BatchNorm2d(8), nn.ReLU6(), nn.MaxPool2d(3, 1, 1), nn.Dropout()), True),
        (_Functional(), True),
        (_chain(nn.ReLU(), nn.BatchNorm2d(8)), False),
        (_chain(nn.ReLU(), RSign(8)), False),
        (_chain(RPReLU(8)), False),
        (_chain(nn.Hardtanh()), False),
    ],
)
def test_a_layer_fed_by_a_relu_is_warned_of_with_the_remedy(
    model: nn.Module, warned: bool, example: Tensor | None
) -> None:
    if not warned:
        _quietly(model, example_inputs=example)
        return
    with pytest.warns(UserWarning, match="layer '.*' is fed by a ReLU.*K − 1.*RSign.*RPReLU") as caught:
        convert(model, example_inputs=example)
    assert len(caught) == 1


def test_a_shared_layer_stays_shared() -> None:
    model = _chain(nn.BatchNorm2d(8))
    model.insert(3, model[2])
    model[5] = nn.Linear(288, 2)
    new = _quietly(model)
    assert isinstance(new[2], HorqConv2d)
    assert new[2] is new[3]
    assert new(torch.randn(2, 3, 12, 12)).shape == (2, 2)


def test_nothing_to_convert_says_why_for_each_layer() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), Own(512, 4), nn.Linear(4, 2))
    with pytest.raises(UsageError) as caught:
        convert(model)
    assert str(caught.value) == (
        "Sequential has nothing to convert: 0: it reads the model's input; 1: it is depthwise; "
        "3: it is a Own, whose forward may be its own; 4: it feeds the model's output"
    )
    with pytest.raises(UsageError, match=r"nothing to convert: no nn.Conv2d and no nn.Linear"):
        convert(nn.ReLU())


class _Branching(nn.Module):
    """What torch.fx cannot trace and torch.export can: a branch on a value that depends on shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _chain(nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.shape[0] > 1 else self.body(x) * 2


def test_a_model_that_cannot_be_traced_is_named() -> None:
    with pytest.raises(UsageError, match=r"_Branching: torch.fx cannot trace its forward \(.*\); .* example_inputs"):
        convert(_Branching())
    new = _quietly(_Branching(), example_inputs=torch.zeros(2, 3, 12, 12))
    assert list(_swapped(new)) == ["body.2"]
    with pytest.raises(UsageError, match="_Branching: torch.export cannot trace its forward: "):
        convert(_Branching(), example_inputs=torch.zeros(2, 4, 12, 12))


@pytest.mark.parametrize("bad", [{"order": 0}, {"scale": "image"}, {"ste": "no"}])
def test_options_are_checked_first(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="accepted are"):
        convert(nn.ReLU(), **bad)


def test_a_converted_network_learns() -> None:
    """A ReLU network, its head float: half the loss is gone in some steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 1))
    new = _quietly(model, scale="static")
    assert isinstance(new[2], HorqLinear)
    x = torch.randn(256, 6)
    target = (x[:, :1] * x[:, 1:2]).tanh()
    optimiser, losses = torch.optim.Adam(new.parameters(), 0.01), []
    for _ in range(120):
        loss = F.mse_loss(new(x), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
