"""run, inspect and bench on a real library: y = x + 1, z = x[0] + x[1], emitted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from horq_tvm import targets
from horq_tvm.cli import main
from horq_tvm.manifest import LayerRecord, Manifest
from horq_tvm.specs import TensorSpec

tvm = pytest.importorskip("tvm")
onnx = pytest.importorskip("onnx")

SHAPE = (2, 5)
X = np.arange(10, dtype="float32").reshape(SHAPE)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tvm import relax, te

    from horq_tvm import emit

    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(SHAPE, "float32"))
    with builder.function("main", [x]):
        y = builder.emit(builder.call_te(lambda a: te.compute(SHAPE, lambda i, j: a[i, j] + 1), x))
        z = builder.emit(builder.call_te(lambda a: te.compute((5,), lambda j: a[0, j] + a[1, j]), x))
        builder.emit_func_output(relax.Tuple([y, z]))
    layers = (LayerRecord("stem", "conv2d", reason="first layer"), LayerRecord("body", "conv2d", 2, "sample"))
    outputs = (TensorSpec("y", SHAPE, "float32"), TensorSpec("z", (5,), "float32"))
    manifest = Manifest((TensorSpec("x", SHAPE, "float32"),), outputs, layers=layers)
    path = tmp_path_factory.mktemp("library") / "plus_one.so"
    emit.standalone(builder.get(), targets.resolve("x86-64"), manifest, path)
    return path


@pytest.fixture(scope="module")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The peers' idea of the same network: input x."""
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "twin",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (2, 3))],
        [onnx.numpy_helper.from_array(np.ones((5, 3), "float32"), "w")],
    )
    path = tmp_path_factory.mktemp("model") / "twin.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


def test_run_writes_every_output_under_its_name(library: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=X)
    assert main(["run", str(library), str(tmp_path / "in.npz"), "-o", str(tmp_path / "out.npz")]) == 0
    outputs = np.load(tmp_path / "out.npz")
    assert outputs.files == ["y", "z"]
    np.testing.assert_array_equal(outputs["y"], X + 1)
    np.testing.assert_array_equal(outputs["z"], X.sum(0))


def test_run_prints_name_shape_dtype_and_first_values(
    library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "in.npy", X)
    assert main(["run", str(library), str(tmp_path / "in.npy")]) == 0
    assert capsys.readouterr().out == "y  2x5  float32  1 2 3 4 5 6 7 8 ...\nz  5  float32  5 7 9 11 13\n"


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ({"image": X}, "no input 'image'; its inputs are: x"),
        ({"x": X, "image": X}, "no input 'image'; its inputs are: x"),
        ({"x": X[:1]}, "input 'x' has shape [1, 5]; accepted is [2, 5]"),
        ({"x": X.astype("float64")}, "input 'x' has dtype float64; accepted is float32"),
        ({}, "input 'x' is missing"),
    ],
)
def test_run_on_the_wrong_inputs(
    arrays: dict[str, np.ndarray], complaint: str, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "in.npz", **arrays)
    assert main(["run", str(library), str(tmp_path / "in.npz"), "-o", str(tmp_path / "out.npz")]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out.npz").exists()


def test_files_that_are_no_library_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "in.npy", X)
    (tmp_path / "text.so").write_text("no library")
    for words in (["inspect"], ["run", str(tmp_path / "in.npy")]):
        words.insert(1, str(tmp_path / "text.so"))
        assert main(words) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "text.so" in captured.err
        assert captured.err.count("\n") == 1


def test_inspect_as_text_and_json(library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(library)]) == 0
    text = capsys.readouterr().out
    assert "target    x86-64\n" in text
    assert "needs     sse2\n" in text
    assert "body   conv2d      2  sample  default         0\n" in text
    assert main(["inspect", str(library), "--json", "-"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert list(manifest) == ["version", "inputs", "outputs", "target", "cpu_features", "layers", "bytes"]
    assert manifest["layers"][0] == {
        "name": "stem",
        "op": "conv2d",
        "order": None,
        "scale": None,
        "reason": "first layer",
        "schedule": "default",
        "records": 0,
        "rest": None,
    }
    assert set(manifest["bytes"]) == {"code", "weights_packed", "weights_float", "manifest"}
    assert main(["inspect", str(library), "--json", str(tmp_path / "m.json")]) == 0
    assert json.loads((tmp_path / "m.json").read_text()) == manifest


def test_bench_of_a_library_and_its_peers(library: Path, float_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", str(library), "--peers", "onnxruntime,onnxruntime-int8", "--model", str(float_model)]
    assert main([*words, "--seconds", "0.02", "--json", "-"]) == 0
    captured = capsys.readouterr()
    records = json.loads(captured.out)
    assert [record["engine"] for record in records] == ["horq-tvm", "onnxruntime", "onnxruntime-int8"]
    for record in records:
        assert (record["network"], record["threads"], record["batch"]) == ("plus_one", 1, 2)
        assert 0 < record["min_ms"] <= record["median_ms"] < 100
        assert {"order", "scale", "rest", "activation"} <= set(record)
    assert (records[0]["order"], records[0]["scale"], records[0]["rest"]) == (2, "sample", "float32")
    assert records[2]["form"] in ("QDQ", "QOperator")
    assert records[2]["calibration"] == "32 seeded normal samples"
    assert captured.err == ""


def test_bench_as_text(library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(library), "--seconds", "0.01"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "plus_one: order 2, sample, batch 2, 1 thread(s)"
    assert lines[1].split() == ["engine", "median", "ms", "min", "ms", "time", "/", "horq-tvm"]
    assert lines[2].startswith("horq-tvm")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--peers onnxruntime", "is a library; accepted: with --model, the .onnx that the peers run"),
        ("--peers onnxruntime --model m.pt2", "cannot run m.pt2; accepted: --model with an .onnx file"),
        ("--peers onnxruntime --model nowhere.onnx", "nowhere.onnx: no such file"),
        ("--order 2 --target zen4", "compiled already; order, target: accepted with a model only"),
        ("--seconds 0", "--seconds: found '0'; accepted: a number of seconds above 0"),
    ],
)
def test_bench_mistakes(options: str, complaint: str, library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(library), *options.split()]) == 2
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert captured.err.count("\n") == 1
