"""Weights as bits: the same model, a fraction of the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import horq_tvm
from horq_tvm.errors import HorqError
from horq_tvm.export import to_onnx
from horq_tvm.nn import HorqConv2d, HorqLinear
from horq_tvm.onnx_bits import pack_signs

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    """A float stem, a HORQ conv of 3·5·3·3 = 135 weights, which fill no whole bytes, and a dense layer; float head."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        HorqConv2d(3, 5, 3, padding=1, order=2, scale="static"),
        nn.BatchNorm2d(5),
        nn.Flatten(),
        HorqLinear(5 * 6 * 6, 7, order=1, scale="sample"),
        nn.Linear(7, 4),
    )
    x = torch.randn(2, 1, 8, 8)
    net.train()(x)
    return to_onnx(net.eval(), x, tmp_path_factory.mktemp("bits") / "model.onnx", ["x"], ["y"])


def _run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def test_computes_the_same_to_the_bit(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    packed = pack_signs(model)
    onnx.checker.check_model(packed, full_check=True)
    x = rng.standard_normal((2, 1, 8, 8), np.float32)
    np.testing.assert_array_equal(_run(packed, x), _run(model, x))


def test_holds_a_bit_a_weight(model: onnx.ModelProto) -> None:
    bits = [numpy_helper.to_array(t) for t in pack_signs(model).graph.initializer if t.name.endswith(".bits")]
    assert [b.size for b in bits] == [17, 158]  # ⌈135/8⌉, ⌈180·7/8⌉
    assert not any(t.dims and np.prod(t.dims) in (135, 1260) for t in pack_signs(model).graph.initializer)


def test_packs_once(model: onnx.ModelProto) -> None:
    packed = pack_signs(model)
    assert pack_signs(packed) == packed


def test_compiles_to_the_same(model: onnx.ModelProto, tmp_path: Path, rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 1, 8, 8), np.float32)
    outputs = []
    for name, proto in (("plain", model), ("packed", pack_signs(model))):
        horq_tvm.build(proto, "native").export(tmp_path / f"{name}.so")
        outputs.append(horq_tvm.load(tmp_path / f"{name}.so")(x)["y"])
    np.testing.assert_array_equal(*outputs)
    sizes = [(tmp_path / f"{name}.so").stat().st_size for name in ("plain", "packed")]
    assert sizes[0] == sizes[1]


def test_other_values_than_signs(model: onnx.ModelProto) -> None:
    broken = onnx.ModelProto()
    broken.CopyFrom(model)
    node = next(n for n in broken.graph.node if n.domain == "horq")
    tensor = next(t for t in broken.graph.initializer if t.name == node.input[1])
    tensor.CopyFrom(numpy_helper.from_array(np.full(list(tensor.dims), 0.5, np.float32), tensor.name))
    with pytest.raises(HorqError, match="other values than ±1"):
        pack_signs(broken)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
