"""build from end to end: a small CNN in, a library out, and every mistake named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from horq_tvm.cli import main

pytest.importorskip("tvm")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

SHAPE = (1, 3, 8, 8)

NO_SUCH_CPU = """
version: 1
targets:
  chimera: {description: No CPU has both, extends: x86-64, features: [avx512_fp16, xop]}
  bare: {description: A host without a compiler, extends: x86-64, compiler: [no-such-cc]}
"""


def save(nodes: list[object], path: Path, batch: int | str = 1, **weights: np.ndarray) -> Path:
    """A model x → y, x of SHAPE but for the batch."""
    helper = onnx.helper
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [batch, *SHAPE[1:]])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(value.astype("float32"), name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


def network(path: Path, batch: int | str = 1) -> Path:
    """stem and head stay float by default; body is what a build rewrites."""
    rng = np.random.default_rng(1)
    node = onnx.helper.make_node
    nodes = [
        node("Conv", ["x", "w0"], ["a"], name="stem", pads=[1, 1, 1, 1]),
        node("Conv", ["a", "w1"], ["b"], name="body", pads=[1, 1, 1, 1]),
        node("GlobalAveragePool", ["b"], ["c"]),
        node("Flatten", ["c"], ["d"]),
        node("Gemm", ["d", "w2"], ["y"], name="head", transB=1),
    ]
    shapes = {"w0": (16, 3, 3, 3), "w1": (16, 16, 3, 3), "w2": (10, 16)}
    weights = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    return save(nodes, path, batch, **weights)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return network(tmp_path_factory.mktemp("model") / "small.onnx")


@pytest.fixture
def x(tmp_path: Path) -> Path:
    path = tmp_path / "x.npy"
    np.save(path, np.random.default_rng(2).standard_normal(SHAPE).astype("float32"))
    return path


def test_float_build_equals_onnxruntime(model: Path, x: Path, tmp_path: Path) -> None:
    library, out = str(tmp_path / "m.so"), tmp_path / "out.npz"
    assert main(["build", str(model), "-o", library, "--order", "float"]) == 0
    assert main(["run", library, str(x), "-o", str(out)]) == 0
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    [expected] = session.run(None, {"x": np.load(x)})
    np.testing.assert_allclose(np.load(out)["y"], expected, rtol=1e-4, atol=1e-5)


def test_default_build_warns_once_with_a_number_and_reports(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library = str(tmp_path / "m.so")
    assert main(["build", str(model), "-o", library, "--json", "-"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    layers = {layer["name"]: layer for layer in report["layers"]}
    assert (layers["body"]["order"], layers["body"]["scale"], layers["body"]["reason"]) == (2, "sample", None)
    for name in ("stem", "head"):
        assert layers[name]["order"] is None
        assert layers[name]["reason"]
    assert 0 <= report["agreement"] <= 1
    assert -1 <= report["cosine"] <= 1
    assert captured.err.startswith("horq-tvm: warning: ")
    assert captured.err.count("\n") == 1
    assert main(["inspect", library, "--json", "-"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest == {name: value for name, value in report.items() if name not in ("agreement", "cosine")}


def test_bench_compiles_a_model_and_keeps_standard_output_clean(model: Path) -> None:
    """In a process of its own: the libraries beneath write to the file descriptors, not to sys.stdout."""
    words = ["bench", str(model), "--peers", "onnxruntime,onnxruntime-int8", "--seconds", "0.02", "--json", "-"]
    done = subprocess.run([sys.executable, "-m", "horq_tvm", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = json.loads(done.stdout)
    assert [record["engine"] for record in records] == ["horq-tvm", "onnxruntime", "onnxruntime-int8"]
    assert {record["network"] for record in records} == {"small"}
    assert [line for line in done.stderr.splitlines() if not line.startswith("horq-tvm: warning: ")] == []


@pytest.mark.parametrize(
    ("options", "code", "complaint"),
    [
        ("--target zen6", 2, "unknown target 'zen6' (did you mean zen5?); accepted: native, x86-64,"),
        ("--target {own}:bare", 1, "no-such-cc"),
        ("--scale static", 2, "body: scale static without betas"),
        ("--plan {plan}", 2, "no layer 'bdy' in the model; accepted: body"),
        ("--tap bdy", 2, "bdy"),
        ("--input z=1,3,8,8", 2, "z"),
    ],
)
def test_mistakes_leave_one_line_and_no_file(
    options: str, code: int, complaint: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.yaml").write_text(NO_SUCH_CPU)
    (tmp_path / "plan.yaml").write_text("version: 1\nlayers: {bdy: {order: 2, scale: sample}}\n")
    words = options.format(own=tmp_path / "own.yaml", plan=tmp_path / "plan.yaml").split()
    assert main(["build", str(model), "-o", str(tmp_path / "m.so"), *words]) == code
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.yaml", "plan.yaml"]


def test_a_mistyped_output_does_not_replace_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, library = network(tmp_path / "small.onnx"), tmp_path / "m.so"
    before = model.read_bytes()
    for words in (
        ["-o", str(model)],
        ["-o", str(library), "--json", str(model)],
        ["-o", str(library), "--json", str(library)],
    ):
        assert main(["build", str(model), *words]) == 2
        assert "the call names it twice" in capsys.readouterr().err
    assert model.read_bytes() == before
    assert not library.exists()


def test_models_that_cannot_be_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.onnx").write_text("not a model")
    save([onnx.helper.make_node("Det", ["x"], ["y"], name="odd")], tmp_path / "det.onnx")
    network(tmp_path / "open.onnx", batch="N")
    cases = {
        "text.onnx": ("text.onnx",),
        "missing.onnx": ("missing.onnx",),
        "det.onnx": ("Det", "odd"),
        "open.onnx": ("x", "--input"),
    }
    for name, words in cases.items():
        assert main(["build", str(tmp_path / name), "-o", str(tmp_path / "m.so")]) in (1, 2)
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1, captured.err
        assert "internal error" not in captured.err
        for word in words:
            assert word in captured.err
    assert not (tmp_path / "m.so").exists()


def test_an_open_shape_is_given_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = network(tmp_path / "open.onnx", batch="N")
    words = ["build", str(path), "-o", str(tmp_path / "m.so"), "--input", "x=2,3,8,8", "--json", "-"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["inputs"] == [{"name": "x", "shape": [2, 3, 8, 8], "dtype": "float32"}]


@pytest.mark.parametrize(
    "order",
    [
        "float",
        "2",
    ],
)
def test_a_library_for_a_cpu_that_this_is_not(
    order: str, model: Path, x: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It builds on any host, and refuses to run before its first kernel does."""
    (tmp_path / "own.yaml").write_text(NO_SUCH_CPU)
    library, target = str(tmp_path / "m.so"), f"{tmp_path / 'own.yaml'}:chimera"
    assert main(["build", str(model), "-o", library, "--target", target, "--order", order]) == 0
    capsys.readouterr()
    assert main(["run", library, str(x)]) == 1
    error = capsys.readouterr().err
    assert "CPU features that this machine lacks: " in error
    assert "xop" in error
    assert main(["inspect", library]) == 0
