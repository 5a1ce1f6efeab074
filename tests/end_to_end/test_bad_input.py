"""What goes wrong at the command line.

A mistake ends in exit code 1 (the work failed) or 2 (the call is wrong), one line on standard error that names the
thing, what was found and what is accepted, and no file. Output is captured at the file descriptors, since the libraries
beneath print to these; a few calls are made in a process of their own, as a script would make them.
"""

from __future__ import annotations

import _ctypes
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from horq_tvm.cli import main

Horq = Callable[..., "subprocess.CompletedProcess[str]"]
ROOT = Path(__file__).resolve().parents[2]
SHAPE = (1, 3, 8, 8)
TARGETS = """
version: 1
targets:
  chimera: {description: No CPU has both, extends: x86-64, features: [avx512_fp16, xop]}
  bare: {description: A compiler that is not there, extends: x86-64, compiler: [no-such-cc]}
"""


def process(*words: object, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m horq_tvm WORDS` in `folder`."""
    return subprocess.run(
        [sys.executable, "-m", "horq_tvm", *map(str, words)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def horq(prepared: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Horq:
    """The same in this process, in the folder `prepared`."""
    monkeypatch.chdir(prepared)

    def call(*words: object) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        code = main([str(word) for word in words])
        captured = capfd.readouterr()
        return subprocess.CompletedProcess(words, code, captured.out, captured.err)

    return call


def assert_one_line(done: subprocess.CompletedProcess[str], code: int, words: Sequence[str]) -> None:
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("horq-tvm: error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "internal error" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def files(folder: Path) -> Mapping[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save(
    path: Path, nodes: Sequence[onnx.NodeProto], shape: Sequence[int | str] = SHAPE, **weights: np.ndarray
) -> None:
    """A model from x to y."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        [onnx.numpy_helper.from_array(value.astype("float32"), name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models good and bad, a library good and bad, and inputs."""
    folder = tmp_path_factory.mktemp("prepared")
    node, rng = onnx.helper.make_node, np.random.default_rng(0)
    weights = {"w0": rng.standard_normal((16, 3, 3, 3)), "w1": rng.standard_normal((16, 16, 3, 3))}
    weights["w2"] = rng.standard_normal((10, 16 * 16))
    body = [
        node("Conv", ["x", "w0"], ["a"], name="stem"),
        node("Conv", ["a", "w1"], ["b"], name="body"),
        node("Flatten", ["b"], ["c"]),
        node("Gemm", ["c", "w2"], ["y"], name="head", transB=1),
    ]
    save(folder / "good.onnx", body, **weights)
    save(folder / "open.onnx", body, ("N", *SHAPE[1:]), **weights)
    save(folder / "det.onnx", [node("Relu", ["x"], ["r"]), node("Det", ["r"], ["y"], name="odd")])
    save(folder / "pool.onnx", [node("Relu", ["x"], ["y"])])
    content = (folder / "good.onnx").read_bytes()
    (folder / "cut.onnx").write_bytes(content[: len(content) // 2])
    (folder / "empty.onnx").write_bytes(b"")
    (folder / "text.onnx").write_text("<html>404 Not Found</html>\n")
    (folder / "text.pt2").write_text("no archive")
    (folder / "targets.yaml").write_text(TARGETS)
    (folder / "unknown.yaml").write_text("version: 1\nlayers: {bodi: float}\n")
    (folder / "broken.yaml").write_text("version: 1\nlayers: {body: {order: 2\n")
    np.savez(folder / "elsewhere.npz", z=np.zeros((4, *SHAPE[1:]), "float32"))
    np.savez(folder / "shapes.npz", x=np.zeros((4, 3, 9, 9), "float32"))
    x = rng.standard_normal(SHAPE).astype("float32")
    np.save(folder / "x.npy", x)
    np.save(folder / "fortran.npy", np.asfortranarray(x))
    np.save(folder / "double.npy", x.astype("float64"))
    np.save(folder / "large.npy", np.zeros((1, 3, 9, 9), "float32"))
    np.savez(folder / "named.npz", image=x)
    (folder / "text.npy").write_text("no array")
    for name, target in (("good", "native"), ("chimera", f"{folder / 'targets.yaml'}:chimera")):
        words = ["build", folder / "good.onnx", "-o", folder / f"{name}.so", "--order", "float", "--target", target]
        assert main(list(map(str, words))) == 0
    _spoil((folder / "good.so").read_bytes(), folder)
    return folder


def _spoil(library: bytes, folder: Path) -> None:
    """Libraries that are not what they should be."""
    (folder / "half.so").write_bytes(library[: len(library) // 2])
    (folder / "stub.so").write_bytes(library[:40])
    machine_at = 18
    (folder / "sparc.so").write_bytes(library[:machine_at] + struct.pack("<H", 43) + library[machine_at + 2 :])
    (folder / "text.so").write_text("no library")
    shutil.copy(_ctypes.__file__, folder / "foreign.so")


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        ("missing.onnx", 2, ["missing.onnx"]),
        ("text.onnx", 1, ["text.onnx"]),
        ("empty.onnx", 1, ["empty.onnx"]),
        ("cut.onnx", 1, ["cut.onnx"]),
        ("text.pt2", 1, ["text.pt2"]),
        (".", 2, ["."]),
        ("det.onnx", 1, ["Det", "odd"]),
        ("open.onnx", 2, ["x", "--input"]),
        ("open.onnx --input x=1,3,8", 2, ["x"]),
        ("open.onnx --input image=1,3,8,8", 2, ["image", "x"]),
        ("open.onnx --input x=1,3,8,0", 2, ["x=1,3,8,0", "NAME=1,3,224,224"]),
        ("good.onnx --target z80", 2, ["z80", "native", "x86-64"]),
        ("good.onnx --target targets.yaml:none", 2, ["none", "chimera"]),
        ("good.onnx --target targets.yaml:bare", 1, ["no-such-cc", "PATH"]),
        ("good.onnx --order 0", 2, ["'0'", "1 to 8"]),
        ("good.onnx --order 100", 2, ["'100'", "1 to 8"]),
        ("good.onnx --order two", 2, ["'two'", "1 to 8"]),
        ("good.onnx --scale layer", 2, ["layer", "patch", "sample", "static"]),
        ("good.onnx --plan missing.yaml", 2, ["missing.yaml"]),
        ("good.onnx --plan broken.yaml", 2, ["broken.yaml"]),
        ("good.onnx --plan unknown.yaml", 2, ["unknown.yaml", "bodi", "body"]),
        ("good.onnx --tap stem", 2, ["stem", "body"]),
        ("good.onnx --scale static", 2, ["body", "betas", "--calibration"]),
        ("good.onnx --scale static --calibration missing.npz", 2, ["missing.npz"]),
        ("good.onnx --scale static --calibration x.npy", 2, ["x.npy", ".npz"]),
        ("good.onnx --scale static --calibration elsewhere.npz", 2, ["x", "z"]),
        ("good.onnx --scale static --calibration shapes.npz", 2, ["x", "9"]),
    ],
)
def test_a_build_that_cannot_be(prepared: Path, horq: Horq, words: str, code: int, expected: list[str]) -> None:
    before = files(prepared)
    assert_one_line(horq("build", *words.split(), "-o", "out.so"), code, expected)
    assert files(prepared) == before


@pytest.mark.parametrize("out", ["nowhere/out.so", "text.onnx/out.so", ".", "/proc/out.so"])
def test_a_path_that_cannot_be_written(prepared: Path, horq: Horq, out: str) -> None:
    before = files(prepared)
    assert_one_line(horq("build", "good.onnx", "-o", out, "--order", "float"), 1, [out])
    assert files(prepared) == before


def test_no_compiler_on_the_path(horq: Horq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = horq("build", "good.onnx", "-o", tmp_path / "out.so", "--order", "float")
    assert_one_line(done, 1, ["no C compiler", "cc", "apt install"])
    assert files(tmp_path) == {}


def test_a_compiler_that_fails(horq: Horq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cc").write_text("#!/bin/sh\necho 'model.c:1: error: no space left' >&2\nexit 3\n")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    done = horq("build", "good.onnx", "-o", tmp_path / "out.so", "--order", "float")
    assert_one_line(done, 1, ["cc", "exit status 3", "no space left"])
    assert list(files(tmp_path)) == ["cc"]


def test_a_failed_build_leaves_the_library_that_was_there(horq: Horq, tmp_path: Path) -> None:
    (tmp_path / "out.so").write_bytes(b"what was there")
    for words in (["det.onnx"], ["good.onnx", "--target", "targets.yaml:bare"]):
        assert horq("build", *words, "-o", tmp_path / "out.so").returncode == 1
        assert files(tmp_path) == {"out.so": b"what was there"}


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        ("good.so missing.npy", 2, ["missing.npy"]),
        ("good.so text.npy", 2, ["text.npy"]),
        ("good.so named.npz", 2, ["image", "x"]),
        ("good.so double.npy", 2, ["x", "float64", "float32"]),
        ("good.so large.npy", 2, ["x", "[1, 3, 9, 9]", "[1, 3, 8, 8]"]),
        ("good.so x.npy --threads 0", 2, ["'0'"]),
        ("good.so x.npy --threads 100000", 2, ["100000", "256"]),
        ("missing.so x.npy", 2, ["missing.so"]),
        ("text.so x.npy", 1, ["text.so"]),
        ("foreign.so x.npy", 1, ["foreign.so", "horq-tvm"]),
        ("half.so x.npy", 1, ["half.so"]),
        ("stub.so x.npy", 1, ["stub.so"]),
        ("sparc.so x.npy", 1, ["sparc.so"]),
        ("chimera.so x.npy", 1, ["chimera.so", "xop"]),
    ],
)
def test_a_run_that_cannot_be(prepared: Path, horq: Horq, words: str, code: int, expected: list[str]) -> None:
    before = files(prepared)
    assert_one_line(horq("run", *words.split(), "-o", "out.npz"), code, expected)
    assert files(prepared) == before


@pytest.mark.parametrize(
    ("library", "code"), [("missing.so", 2), ("text.so", 1), ("foreign.so", 1), ("half.so", 1), ("stub.so", 1)]
)
def test_an_inspection_that_cannot_be(horq: Horq, library: str, code: int) -> None:
    assert_one_line(horq("inspect", library), code, [library])


def test_arrays_in_another_order_are_copied(horq: Horq, tmp_path: Path) -> None:
    for name in ("x", "fortran"):
        done = horq("run", "good.so", f"{name}.npy", "-o", tmp_path / f"{name}.npz")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    np.testing.assert_array_equal(np.load(tmp_path / "x.npz")["y"], np.load(tmp_path / "fortran.npz")["y"])


def test_a_model_with_nothing_to_rewrite_says_so(horq: Horq, tmp_path: Path) -> None:
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], name="stem")
    save(tmp_path / "stem.onnx", [node], w=np.ones((4, 3, 3, 3)))
    done = horq("build", tmp_path / "stem.onnx", "-o", tmp_path / "out.so")
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1
    assert "no layer was rewritten: it reads the model's input" in done.stderr


# --- In a process of its own ------------------------------------------------------------------------------------------


def test_a_good_build_is_silent_on_standard_error(prepared: Path, tmp_path: Path) -> None:
    done = process("build", "good.onnx", "-o", tmp_path / "out.so", "--order", "float", folder=prepared)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(files(tmp_path)) == ["out.so"]


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        ("build det.onnx -o out.so", 1, ["Det", "odd"]),
        ("build good.onnx -o out.so --scale static", 2, ["body", "betas"]),
        ("build text.pt2 -o out.so", 1, ["text.pt2"]),
        ("run chimera.so x.npy", 1, ["xop"]),
    ],
)
def test_errors_reach_a_script(prepared: Path, words: str, code: int, expected: list[str]) -> None:
    before = files(prepared)
    assert_one_line(process(*words.split(), folder=prepared), code, expected)
    assert files(prepared) == before


def test_debug_shows_where(prepared: Path) -> None:
    done = process("build", "det.onnx", "-o", "out.so", "--debug", folder=prepared)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
