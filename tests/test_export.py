"""A trained model as an ExportedProgram and as ONNX: the nodes it holds, and that ONNX Runtime computes the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from horq_tvm import reference
from horq_tvm.errors import HorqError, UsageError
from horq_tvm.export import export_program, to_onnx
from horq_tvm.nn import HorqConv2d, HorqLinear
from horq_tvm.specs import SCALES, Scale
from tests.networks import HORQ_LAYERS, binary_weight, cifar_images, cifar_resnet, cifar_resnet_float

torch.set_num_threads(1)


def _run(path: Path, **inputs: Tensor) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {name: x.numpy() for name, x in inputs.items()})[0]


def _horq_nodes(program: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    return [node for node in program.graph.nodes if node.target is torch.ops.horq.horq_conv2d.default]


def _constants(program: torch.export.ExportedProgram) -> dict[str, Tensor]:
    """Placeholder name → value of what the graph takes besides the model's inputs."""
    values = {**program.state_dict, **program.constants}
    return {spec.arg.name: values[spec.target] for spec in program.graph_signature.input_specs if spec.target}


# torch.export ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["sample", "static"])
@pytest.mark.parametrize("frozen", [True, False])
def test_each_layer_is_one_node_of_constants(scale: Scale, frozen: bool) -> None:
    model, x = cifar_resnet(2, scale), cifar_images(1)
    program = export_program(model, x) if frozen else torch.export.export(model, (x,))
    nodes, constants = _horq_nodes(program), _constants(program)
    assert len(nodes) == len(HORQ_LAYERS)
    for node, name in zip(nodes, HORQ_LAYERS, strict=True):
        layer = model.get_submodule(name)
        assert isinstance(layer, HorqConv2d)
        weight, alpha = binary_weight(layer)
        np.testing.assert_array_equal(constants[node.args[1].name].numpy(), weight)
        np.testing.assert_array_equal(constants[node.args[2].name].numpy(), alpha)
        if scale == "static":
            assert torch.equal(constants[node.args[3].name], layer.beta)
        else:
            assert node.args[3] is None
        assert list(node.meta["nn_module_stack"].values())[-1][0] == name
    with torch.no_grad():
        assert torch.equal(program.module()(x), model(x))
    latent = {f"{name}.weight" for name in HORQ_LAYERS}
    assert latent.isdisjoint(program.state_dict) == frozen


def test_program_survives_a_file(tmp_path: Path) -> None:
    model, x = cifar_resnet(3, "static"), cifar_images(2)
    torch.export.save(export_program(model, x), tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    assert len(_horq_nodes(loaded)) == len(HORQ_LAYERS)
    with torch.no_grad():
        assert torch.equal(loaded.module()(x), model(x))


def test_exporting_leaves_the_model_as_it_was() -> None:
    model = cifar_resnet().train()
    model.stem.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_program(model, cifar_images(1))
    assert model.training
    assert not model.stem.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_changed_since_eval_are_the_ones_exported() -> None:
    model, x = cifar_resnet(), cifar_images(1)
    with torch.no_grad():
        model.layer2[1].conv.weight.neg_()
        program = export_program(model, x)
        assert torch.equal(program.module()(x), model(x))


# ONNX -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("order", [1, 3])
def test_onnx_runtime_computes_a_layer_as_the_reference_does(scale: Scale, order: int, tmp_path: Path) -> None:
    torch.manual_seed(order)
    layer = HorqConv2d(12, 6, (3, 2), (1, 2), (1, 0, 2, 1), (1, 2), 3, bias=True, order=order, scale=scale)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 12, 9, 11)
    layer(x)
    to_onnx(layer, x, tmp_path / "layer.onnx", ["x"])
    y = _run(tmp_path / "layer.onnx", x=x)
    weight, alpha = binary_weight(layer)
    expected = reference.conv2d(
        x.numpy(),
        weight,
        alpha,
        None if layer.beta is None else layer.beta.detach().numpy(),
        layer.bias.detach().numpy(),
        order=order,
        scale=scale,
        strides=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
    )
    assert y.shape == expected.output.shape
    assert not np.any((np.abs(y - expected.output) > expected.tolerance) & ~expected.doubtful)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", [(5, 20), (2, 3, 20), (2, 1, 3, 20)])
def test_onnx_runtime_computes_a_dense_layer_as_the_reference_does(
    scale: Scale, shape: tuple[int, ...], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    layer, x = HorqLinear(20, 7, bias=True, order=2, scale=scale), torch.randn(shape)
    nn.init.normal_(layer.bias)
    layer(x)
    proto = to_onnx(layer, x, tmp_path / "layer.onnx", ["x"])
    assert [(node.op_type, node.overload) for node in proto.graph.node] == [("HorqLinear", f"{scale}_2")]
    y = _run(tmp_path / "layer.onnx", x=x)
    weight, alpha = binary_weight(layer)
    beta = None if layer.beta is None else layer.beta.detach().numpy()
    expected = reference.dense(x.numpy(), weight, alpha, beta, layer.bias.detach().numpy(), order=2, scale=scale)
    assert y.shape == expected.output.shape
    assert not np.any((np.abs(y - expected.output) > expected.tolerance) & ~expected.doubtful)


@pytest.mark.parametrize("scale", SCALES)
def test_onnx_runtime_runs_the_network(scale: Scale, tmp_path: Path) -> None:
    model, x = cifar_resnet(2, scale), cifar_images(64, seed=9)
    to_onnx(model, x, tmp_path / "model.onnx", ["image"], ["scores"])
    with torch.no_grad():
        expected = model(x).numpy()
    scores = _run(tmp_path / "model.onnx", image=x)
    # Floats differ from engine to engine, and a sign here and there with them: most images match closely.
    assert np.mean(np.abs(scores - expected).max(1) < 1e-4) > 0.5
    assert np.mean(scores.argmax(1) == expected.argmax(1)) > 0.95


def test_float_twin_matches_onnx_runtime(tmp_path: Path) -> None:
    model, x = cifar_resnet_float(), cifar_images(3)
    proto = to_onnx(model, x, tmp_path / "model.onnx", ["image"])
    assert not proto.functions
    with torch.no_grad():
        np.testing.assert_allclose(_run(tmp_path / "model.onnx", image=x), model(x).numpy(), rtol=1e-4, atol=1e-5)


def test_what_the_file_holds(tmp_path: Path) -> None:
    model, x = cifar_resnet(2, "static"), cifar_images(1)
    to_onnx(model, x, tmp_path / "model.onnx", ["image"], ["scores"])
    proto = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(proto)
    assert proto.ir_version == 10
    assert {entry.domain for entry in proto.opset_import} == {"", "horq"}
    assert [(f.domain, f.name, f.overload) for f in proto.functions] == [("horq", "HorqConv2d", "static_2")]
    assert [value.name for value in (*proto.graph.input, *proto.graph.output)] == ["image", "scores"]
    assert [dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 32, 32]

    initialisers = {value.name: numpy_helper.to_array(value) for value in proto.graph.initializer}
    horq = [node for node in proto.graph.node if node.domain == "horq"]
    assert [node.name for node in horq] == list(HORQ_LAYERS)
    for node in horq:
        layer = model.get_submodule(node.name)
        weight, alpha = binary_weight(layer)
        np.testing.assert_array_equal(initialisers[node.input[1]], weight)
        np.testing.assert_array_equal(initialisers[node.input[2]], alpha)
        np.testing.assert_array_equal(initialisers[node.input[3]], layer.beta.detach().numpy())
        attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert attributes == {
            "order": 2,
            "scale": b"static",
            "strides": list(layer.stride),
            "pads": [1, 1, 1, 1],
            "dilations": [1, 1],
            "group": layer.groups,
        }
    others = [node.name for node in proto.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert others == ["stem.0", "layer2.0.shortcut.1", "layer3.0.shortcut.1", "head"]
    # Nothing that no node reads (latent weights, say), and nothing of the machine that exported it.
    assert set(initialisers) <= {name for node in proto.graph.node for name in node.input}
    assert str(Path(__file__).parent).encode() not in (tmp_path / "model.onnx").read_bytes()


def test_batch_may_stay_free(tmp_path: Path) -> None:
    model = cifar_resnet_float()
    to_onnx(model, cifar_images(1), tmp_path / "model.onnx", ["image"], dynamic_batch=True)
    for count in (1, 3):
        x = cifar_images(count)
        with torch.no_grad():
            np.testing.assert_allclose(_run(tmp_path / "model.onnx", image=x), model(x).numpy(), rtol=1e-4, atol=1e-5)
    horq = HorqConv2d(4, 3, 3, scale="sample").eval()
    to_onnx(horq, torch.zeros(1, 4, 5, 5), tmp_path / "layer.onnx", ["x"], dynamic_batch=True)
    assert _run(tmp_path / "layer.onnx", x=torch.zeros(4, 4, 5, 5)).shape == (4, 3, 3, 3)


class _Twice(nn.Module):
    """One layer used twice, and an operation that no module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = HorqConv2d(4, 4, 3, padding=1, scale="sample")

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.conv(x)).flatten(2)
        return y @ y.transpose(1, 2)


def test_names_are_unique(tmp_path: Path) -> None:
    proto = to_onnx(_Twice(), torch.randn(1, 4, 5, 5), tmp_path / "model.onnx")
    assert [node.name for node in proto.graph.node if node.domain == "horq"] == ["conv", "conv_1"]
    assert [node.name for node in proto.graph.node if node.op_type == "MatMul"] == ["matmul"]
    assert len({node.name for node in proto.graph.node}) == len(proto.graph.node)


def test_two_exports_are_the_same_bytes(tmp_path: Path) -> None:
    model, x = cifar_resnet(), cifar_images(1)
    for name in ("a.onnx", "b.onnx"):
        to_onnx(model, x, tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


# Mistakes -------------------------------------------------------------------------------------------------------------


class _DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class _Untranslatable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x)


@pytest.mark.parametrize(
    ("model", "inputs", "error", "message"),
    [
        (nn.ReLU(), (), UsageError, "example_inputs is empty; accepted"),
        (nn.ReLU(), [1.0], UsageError, "example_inputs holds float; accepted"),
        (HorqConv2d(2, 2, 1, scale="static"), torch.zeros(1, 2, 1, 1), UsageError, "no beta yet"),
        (_DataDependent(), torch.ones(2), HorqError, "_DataDependent: torch.export cannot trace it: .+"),
        (_Untranslatable(), torch.ones(2, 2), HorqError, "_Untranslatable: torch.onnx cannot translate it: .*eig"),
        (HorqConv2d(2, 2, 1, scale="sample"), torch.zeros(1, 3, 1, 1), HorqError, r"x\[1, 3, 1, 1\]"),
    ],
)
def test_a_mistake_is_named_and_leaves_no_file(
    model: nn.Module, inputs: Tensor | Sequence[Tensor], error: type[HorqError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as caught:
        to_onnx(model, inputs, tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_unwritable_path_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    target.mkdir()
    for path in (target, tmp_path / "absent" / "model.onnx"):
        with pytest.raises(HorqError, match="cannot be written"):
            to_onnx(nn.ReLU(), torch.zeros(1), path)
    assert list(tmp_path.iterdir()) == [target]
