"""What anyone may rely on of a library that `build` wrote: what it needs, what it exports, and how it runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest

import horq_tvm
from horq_tvm.cli import main
from horq_tvm.export import to_onnx
from horq_tvm.nn import HorqConv2d
from tests.networks import cifar_images, cifar_resnet

ROOT = Path(__file__).resolve().parents[2]
BATCH = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "resnet.onnx"
    to_onnx(cifar_resnet(2, "static"), cifar_images(BATCH), path, ["x"], ["y"])
    return path


@pytest.fixture(scope="module")
def library(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("library") / "resnet.so"
    assert main(["build", str(model), "-o", str(path)]) == 0
    return path


def images(seed: int) -> np.ndarray:
    return cifar_images(BATCH, seed).numpy()


@pytest.fixture(scope="module")
def readelf() -> str:
    found = shutil.which("readelf")
    if found is None:
        pytest.skip("readelf (binutils) is not installed")
    return found


def test_needs_nothing_but_the_c_library(library: Path, readelf: str) -> None:
    text = subprocess.run([readelf, "-d", "-W", library], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+?)\]", text))
    assert needed
    assert needed <= {"libc.so.6", "libm.so.6", "libpthread.so.0"}
    assert "RPATH" not in text
    assert "RUNPATH" not in text


def test_exports_horq_alone(library: Path, readelf: str) -> None:
    text = subprocess.run([readelf, "--dyn-syms", "-W", library], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in text.splitlines() if re.match(r"\s*\d+:", line)]
    exported = {row[7].split("@")[0] for row in rows if len(row) > 7 and row[6] != "UND"}
    assert "horq_run" in exported
    assert {name for name in exported if not name.startswith("horq_")} == set()


def test_weights_are_bits(library: Path) -> None:
    """With what the kernels add in words (border corrections, the tails of words) far from a float a weight."""
    network = cifar_resnet(2, "static")
    weights = sum(layer.weight.numel() for layer in network.modules() if isinstance(layer, HorqConv2d))
    assert weights / 8 <= horq_tvm.load(library).manifest.bytes.weights_packed <= weights / 2
    assert library.stat().st_size < 150_000


def test_two_builds_are_the_same_bytes(library: Path, model: Path, tmp_path: Path) -> None:
    """In a process of its own, from another folder, under another hash seed and another name."""
    copy = tmp_path / "elsewhere" / "copy.onnx"
    copy.parent.mkdir()
    shutil.copy(model, copy)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "12345"}
    words = [sys.executable, "-m", "horq_tvm", "build", copy.name, "-o", str(tmp_path / "again.so")]
    done = subprocess.run(words, cwd=copy.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again.so").read_bytes() == library.read_bytes()


def test_says_nothing_of_the_machine_it_was_built_on(library: Path, model: Path) -> None:
    content = library.read_bytes()
    for trace in (str(ROOT), str(Path.home()), str(model.parent), "/tmp/", ".onnx"):
        assert trace.encode() not in content, trace


def test_runs_where_there_is_no_compiler(library: Path, tmp_path: Path) -> None:
    """A process that has numpy: nothing of TVM, ONNX or PyTorch gets imported."""
    np.save(tmp_path / "x.npy", images(3))
    script = """
import sys
import numpy as np
import horq_tvm
model = horq_tvm.load(sys.argv[1])
np.save(sys.argv[3], model(np.load(sys.argv[2]))["y"])
imported = {name.split(".")[0] for name in sys.modules}
assert not imported & {"tvm", "tvm_ffi", "onnx", "onnxruntime", "torch", "pydantic", "yaml"}, imported
"""
    words = [sys.executable, "-c", script, str(library), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), horq_tvm.load(library)(images(3))["y"])


def test_the_first_run_is_like_every_other(library: Path) -> None:
    """No state stays behind from one input to the next."""
    model = horq_tvm.load(library)
    first = model(images(1))["y"]
    assert not np.array_equal(model(images(2))["y"], first)
    np.testing.assert_array_equal(model(images(1))["y"], first)


@pytest.mark.parametrize("threads", [1, 2])
def test_two_threads_run_one_model_at_once(library: Path, threads: int) -> None:
    model = horq_tvm.load(library, threads=threads)
    inputs = [images(seed) for seed in range(4)]
    expected = [horq_tvm.load(library)(x)["y"] for x in inputs]
    wrong: list[object] = []
    start = threading.Barrier(len(inputs))

    def work(index: int) -> None:
        try:
            start.wait(timeout=30)
            for _ in range(20):
                if not np.array_equal(model(inputs[index])["y"], expected[index]):
                    wrong.append(index)
        except Exception as error:
            wrong.append(error)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_change_no_bit(library: Path, threads: int) -> None:
    x = images(4)
    np.testing.assert_array_equal(horq_tvm.load(library, threads=threads)(x)["y"], horq_tvm.load(library)(x)["y"])


@pytest.mark.parametrize("scale", ["sample", "patch", "static"])
def test_threads_change_no_bit_of_a_large_layer(scale: str, tmp_path: Path) -> None:
    """Large enough that every kernel is shared out, with rows that do not divide evenly."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 48, 37, 41)).astype("float32")
    plan = {"version": 1, "layers": {"conv": {"order": 2, "scale": scale}}}
    if scale == "static":
        plan["layers"]["conv"]["betas"] = [0.8, 0.4]
    with pytest.warns(UserWarning, match="not trained"):
        compiled = horq_tvm.build(one_conv(x.shape, 48), plan=plan)
    alone = compiled.load()(x)["y"]
    for threads in (2, 5):
        np.testing.assert_array_equal(compiled.load(threads)(x)["y"], alone)


def one_conv(shape: tuple[int, ...], filters: int) -> onnx.ModelProto:
    """y = conv(x), 3×3, padded by one."""
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((filters, shape[1], 3, 3)).astype("float32")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], name="conv", pads=[1, 1, 1, 1])],
        "one",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def test_arrays_that_are_not_contiguous_are_copied(library: Path) -> None:
    model, x = horq_tvm.load(library), images(5)
    strided = np.repeat(x, 2, axis=3)[..., ::2]
    assert not strided.flags.c_contiguous
    unaligned = np.empty(x.nbytes + 1, np.uint8)[1:].view("float32").reshape(x.shape)
    unaligned[...] = x
    for array in (strided, np.asfortranarray(x), unaligned):
        np.testing.assert_array_equal(model(array)["y"], model(x)["y"])
