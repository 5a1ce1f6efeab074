"""The benchmark for cards: what it says without one, what kernels take of one, and that it checks before it times."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("tvm")

from benchmarks import cuda
from horq_tvm import targets
from horq_tvm.cuda import device
from horq_tvm.errors import HorqError
from horq_tvm.nn import HorqConv2d
from tests.cuda import nvcc

NATIVE = targets.resolve("native")


def test_without_a_card_it_names_what_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device, "DRIVER", "libno-such-driver.so.1")
    assert cuda.main([]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmarks.cuda: error: no CUDA device")
    assert "--resources" in line


def test_resources_are_a_cards(capsys: pytest.CaptureFixture[str]) -> None:
    assert cuda.main(["--resources", "--target", "x86-64"]) == 2
    assert "--target x86-64 is a CPU; accepted with --resources: cuda, cuda-aarch64" in capsys.readouterr().err


@pytest.mark.slow
def test_each_kernel_with_its_instruction(tmp_path: Path) -> None:
    found = nvcc.found()
    if not found.program("cuobjdump") or not found.program("nvdisasm"):
        pytest.skip("no cuobjdump and nvdisasm here (make cuda)")
    records = cuda.resources("resnet20", (2,), targets.resolve("cuda-sm75"), tmp_path)
    by_kernel = {record["kernel"]: record for record in records}
    assert len(by_kernel) == len(records)
    binary = [record for record in records if record["layer"].startswith("layer") and "bitserial" in record["kernel"]]
    assert len(binary) == 18
    assert {record["instruction"] for record in binary} == {"BMMA"}
    assert all(record["spilled_bytes"] == 0 and 0 < record["occupancy"] <= 1 for record in records)
    text = cuda.describe_resources(records)
    assert f"{len(records)} kernels × 1 architectures, 0 with spills" in text
    assert "layer1.0.conv" in text
    assert sum(int(line.split()[1]) for line in text.splitlines() if "BMMA" in line) == 18


@pytest.mark.slow
def test_layers_are_checked_and_a_wrong_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = cuda.Subject("resnet20", 1, 1)
    shapes = cuda.check(subject, NATIVE, tmp_path)
    assert len(shapes) == 18
    assert shapes["layer1.0.conv"] == (1, 32, 32, 16)

    class Other(cuda.Subject):
        """A network in which one weight has another sign than in the file."""

        def module(self) -> cuda.torch.nn.Module:
            found = super().module()
            layer = found.get_submodule("layer2.1.conv")
            assert isinstance(layer, HorqConv2d)
            layer.weight_sign[3, 0, 1, 1] *= -1
            return found

    with pytest.raises(HorqError, match=r"resnet20 K=1, layer layer2.1.conv: .* outputs are wrong .*nothing was timed"):
        cuda.check(Other("resnet20", 1, 1), NATIVE, tmp_path)


def test_the_median_of_blocks() -> None:
    runs: list[int] = []

    def timer(count: int) -> float:
        runs.append(count)
        return 1e-3 * count

    half, least = cuda.median(timer, 0.9)
    assert half == pytest.approx(1.0)
    assert least == pytest.approx(1.0)
    assert runs == [3, 3, *[100] * 9] or runs == [3, 3, *[99] * 9]


def test_one_table_of_networks_and_one_of_layers() -> None:
    ours = {"engine": cuda.OURS, "order": 2, "rest": "float32", "batch": 1, "median_ms": 0.25, "min_ms": 0.2}
    peer = {**ours, "engine": cuda.TORCH, "order": None, "rest": "float16", "median_ms": 0.5}
    text = cuda.describe(
        [{"network": "n", **ours}, {"network": "n", **peer}, {"layer": "l", **ours}, {"layer": "l", **peer}]
    )
    rows = [line.split() for line in text.splitlines()]
    assert ["n", "1", "horq-tvm", "2", "float32", "0.250", "0.200"] in rows
    assert ["l", "250.0", "500.0"] in rows


def test_a_model_for_int8_is_symmetric(tmp_path: Path) -> None:
    import onnx

    torch = cuda.torch
    path = tmp_path / "m.onnx"
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()
    image = torch.randn(1, 3, 8, 8)
    cuda.to_onnx(model, image, path, [cuda.IMAGE], [cuda.SCORES])
    graph = onnx.load(cuda.quantised(path, image)).graph
    zeros = {name for node in graph.node if node.op_type == "QuantizeLinear" for name in node.input[2:]}
    values = [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.name in zeros]
    assert values
    assert all(value.dtype == np.int8 and not value.any() for value in values)
