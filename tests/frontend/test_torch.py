"""The PyTorch importer against PyTorch in eval, layer form by layer form, and its errors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from horq_tvm import torch_ops  # noqa: E402
from horq_tvm.errors import HorqError, UsageError  # noqa: E402
from horq_tvm.frontend.torch import import_torch  # noqa: E402


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(3)


class Call(nn.Module):
    """A module out of a function of (image) and submodules."""

    def __init__(self, function: Any, **children: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, image: torch.Tensor) -> Any:
        return self.function(self, image)


def batch_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    nn.init.uniform_(norm.weight, -1, 2)
    nn.init.normal_(norm.bias)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.2, 2)
    return norm


X = (2, 4, 9, 8)
CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "conv, bn, relu": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), batch_norm(6), nn.ReLU()), X),
    "bn first, conv without bias": (lambda: nn.Sequential(batch_norm(4), nn.Conv2d(4, 6, (3, 1), bias=False)), X),
    "conv same, even kernel": (lambda: nn.Conv2d(4, 6, (2, 4), padding="same", dilation=(2, 1)), X),
    "conv groups and depthwise": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 6, 3, groups=6)), X),
    "conv 1d": (
        lambda: nn.Sequential(nn.Conv1d(4, 5, 3, 2, 2, 2), nn.ReLU(), nn.Conv1d(5, 3, 2, padding="same")),
        (2, 4, 11),
    ),
    "linear of a matrix": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(288, 5), nn.ReLU6(), nn.Linear(5, 2)), X),
    "linear of 3-D": (lambda: nn.Linear(4, 5), (2, 3, 4)),
    "matmul by a buffer": (lambda: Call(lambda _, x: x @ torch.ones(8, 3)), (2, 3, 8)),
    "matmul of activations": (lambda: Call(lambda _, x: torch.bmm(x, x.transpose(1, 2))), (2, 3, 8)),
    "addmm": (lambda: Call(lambda _, x: torch.addmm(torch.ones(3), x, torch.ones(8, 3))), (2, 8)),
    "max pool, ceil": (lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True), X),
    "max pool, dilated": (lambda: nn.MaxPool2d(2, 1, dilation=(3, 2)), X),
    "average pool": (lambda: nn.AvgPool2d(3, 2, 1), X),
    "average pool, ceil": (lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True), X),
    "average pool, padding not counted": (lambda: nn.AvgPool2d((3, 2), 2, (1, 0), True, False), X),
    "pools 1d": (lambda: nn.Sequential(nn.MaxPool1d(3, 2), nn.AvgPool1d(2)), (2, 3, 12)),
    "adaptive pools": (lambda: nn.Sequential(nn.AdaptiveAvgPool2d((3, 4)), nn.AdaptiveAvgPool2d(1)), X),
    "activations": (
        lambda: nn.Sequential(nn.LeakyReLU(0.1), nn.PReLU(4), nn.Hardtanh(), nn.Hardswish(), nn.SiLU(), nn.Sigmoid()),
        X,
    ),
    "dropout, identity, softmax": (lambda: nn.Sequential(nn.Dropout(), nn.Identity(), nn.Softmax(1)), X),
    "concat, chunk, residual": (
        lambda: Call(lambda _, x: torch.cat([x.chunk(2, 1)[1] + 1, x * x.mean((2, 3), keepdim=True)], 1)),
        X,
    ),
    "transposed convolution": (lambda: nn.ConvTranspose2d(4, 3, 2, 2), X),
    "pad and upsample": (lambda: nn.Sequential(nn.ZeroPad2d((1, 0, 2, 1)), nn.Upsample(scale_factor=2)), X),
}


@pytest.mark.parametrize("case", CASES)
def test_same_as_torch(case: str, execute: Any) -> None:
    make, shape = CASES[case]
    model = make().eval()
    x = torch.randn(shape)
    imported = import_torch(model, (x,))
    assert [s.shape for s in imported.inputs] == [shape]
    assert [s.name for s in imported.outputs] == ["output"]
    (found,) = execute(imported, [x.numpy()])
    np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-5, atol=1e-5)


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(channels, channels, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(self.conv1(self.conv1(x)), self.scale)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(Block(4), nn.ReLU())
        self.head = nn.Linear(4, 3)

    def forward(self, image: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.layer1(image) + shift
        return F.linear(y.mean((2, 3)), torch.ones(2, 4)), self.head(y.mean((2, 3)))


NAMES = ["layer1.0.conv1", "layer1.0.conv1_1", "layer1.0", "linear", "head"]


def test_layers_are_named_by_their_modules(layer_names: Any) -> None:
    inputs = (torch.randn(1, 4, 5, 5), torch.randn(1, 4, 1, 1))
    imported = import_torch(Net(), inputs)
    assert layer_names(imported) == NAMES
    assert [s.name for s in imported.inputs] == ["image", "shift"]
    assert [(s.name, s.shape) for s in imported.outputs] == [("output_0", (1, 2)), ("output_1", (1, 3))]
    assert imported.trained == {}


def test_the_mode_of_the_module_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Dropout())
    model[2].eval()
    import_torch(model, (torch.randn(X),))
    assert [module.training for module in model] == [True, True, False]


def test_a_saved_program_with_an_open_batch(tmp_path: Path, layer_names: Any, execute: Any) -> None:
    net = Net().eval()
    inputs = (torch.randn(2, 4, 5, 5), torch.randn(1, 4, 1, 1))
    batch = torch.export.Dim("batch", max=64)
    program = torch.export.export(net, inputs, dynamic_shapes={"image": {0: batch}, "shift": None})
    torch.export.save(program, tmp_path / "net.pt2")
    with pytest.raises(UsageError, match=r"'image': found the shape .*,4,5,5.*--input image=1,4,5,5"):
        import_torch(tmp_path / "net.pt2")
    with pytest.raises(UsageError, match="accepted are image, shift"):
        import_torch(tmp_path / "net.pt2", input_shapes={"picture": (1, 4, 5, 5)})
    with pytest.raises(UsageError, match=r"--input image: found 1,4,6,5"):
        import_torch(tmp_path / "net.pt2", input_shapes={"image": (1, 4, 6, 5)})
    imported = import_torch(str(tmp_path / "net.pt2"), input_shapes={"image": (3, 4, 5, 5)})
    assert layer_names(imported) == NAMES
    assert [(s.name, s.shape) for s in imported.inputs] == [("image", (3, 4, 5, 5)), ("shift", (1, 4, 1, 1))]
    x = (torch.randn(3, 4, 5, 5), inputs[1])
    for found, wanted in zip(execute(imported, [v.numpy() for v in x]), net(*x), strict=True):
        np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=1e-5, atol=1e-5)


class Horq(nn.Module):
    """The two operators on buffers, as `horq_tvm.nn` calls them, and once on signs taken in forward."""

    def __init__(self, scale: str) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("w", torch_ops.sign(torch.randn(6, 2, 3, 2)))
        self.register_buffer("alpha", torch.rand(6))
        self.register_buffer("beta", torch.tensor([0.75, 0.25]) if scale == "static" else None)
        self.latent = nn.Parameter(torch.randn(3, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.horq.horq_conv2d(
            x, self.w, self.alpha, self.beta, None, 2, self.scale, [2, 1], [0, 1, 2, 3], [1, 2], 2
        )
        signs = torch_ops.sign(self.latent)
        return torch.ops.horq.horq_linear(y.mean((2, 3)), signs, self.alpha[:3], None, torch.ones(3), 1, "sample")


@pytest.mark.parametrize("scale", ["static", "sample"])
def test_horq_operators_speak_for_their_layers(scale: str, tmp_path: Path, execute: Any, layer_names: Any) -> None:
    model = Call(lambda self, x: self.body(x), body=Horq(scale)).eval()
    x = torch.randn(X)
    program = torch.export.export(model, (x,))
    torch.export.save(program, tmp_path / "horq.pt2")
    imported = import_torch(tmp_path / "horq.pt2")
    assert layer_names(imported) == ["body", "body_1"]
    conv, linear = imported.trained["body"], imported.trained["body_1"]
    assert (conv.order, conv.scale, conv.betas) == (2, scale, (0.75, 0.25) if scale == "static" else None)
    assert (linear.order, linear.scale, linear.betas) == (1, "sample", None)

    body = model.body
    y = F.conv2d(F.pad(x, (1, 3, 0, 2)), body.w, None, (2, 1), 0, (1, 2), 2) * body.alpha.reshape(-1, 1, 1)
    wanted = F.linear(y.mean((2, 3)), torch_ops.sign(body.latent)) * body.alpha[:3] + 1
    np.testing.assert_allclose(execute(imported, [x.numpy()])[0], wanted.detach().numpy(), rtol=1e-5, atol=1e-5)


def test_every_unsupported_operator_is_named() -> None:
    model = Call(lambda _, x: torch.fft.fft(torch.lgamma(x)).real + torch.lgamma(x + 1))
    with pytest.raises(HorqError) as caught:
        import_torch(model, (torch.rand(2, 3),))
    message = str(caught.value)
    assert "lgamma.default (node 'lgamma' and 1 more)" in message
    assert "_fft" in message
    assert "\n" not in message


def test_mistakes_in_the_call(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Conv2d: found no example inputs.*example_inputs="):
        import_torch(nn.Conv2d(4, 4, 1))
    with pytest.raises(UsageError, match="found a tensor that is in no tuple; accepted are the tensors of one call"):
        import_torch(nn.Conv2d(4, 4, 1), torch.rand(1, 4, 8, 8))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"absent\.pt2: found no such file"):
        import_torch(tmp_path / "absent.pt2")
    with pytest.raises(UsageError, match="found a int; accepted are an nn.Module"):
        import_torch(3)  # type: ignore[arg-type]
    (tmp_path / "text.pt2").write_text("hello")
    with pytest.raises(HorqError, match=r"text\.pt2: not a readable ExportedProgram"):
        import_torch(tmp_path / "text.pt2")


def test_a_module_that_cannot_be_exported() -> None:
    with pytest.raises(HorqError, match="Call: torch.export cannot export it") as caught:
        import_torch(Call(lambda _, x: x if x.sum() > 0 else -x), (torch.rand(2, 3),))
    assert "\n" not in str(caught.value)


def test_a_program_exported_in_training_mode() -> None:
    program = torch.export.export(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).train(), (torch.randn(X),))
    with pytest.raises(HorqError, match=r"training mode; accepted is a model exported after model\.eval"):
        import_torch(program)


def test_without_torch_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UsageError, match=r"horq-tvm\[torch\]"):
        import_torch("net.pt2")
