"""Loading: without TVM, safely, from several threads, and with errors that name the thing."""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tvm import relax, topi

from horq_tvm import targets
from horq_tvm.emit.cpu_features import X86
from horq_tvm.errors import HorqError, UsageError
from horq_tvm.runtime import loader
from horq_tvm.runtime.loader import load, read_manifest
from tests.emit.models import emit, module, parallel_rows, spec

WEIGHT = np.random.default_rng(1).standard_normal((32, 32)).astype("float32")
ROOT = Path(__file__).parents[2]


def chain(builder: relax.BlockBuilder, x: relax.Var, y: relax.Var) -> list[relax.Expr]:
    """Long enough that two calls at once meet in it."""
    value = builder.emit_te(topi.add, x, y)
    for _ in range(6):
        value = builder.emit_te(topi.tanh, builder.emit_te(topi.matmul, value, relax.const(WEIGHT)))
    return [value]


INPUTS = (spec("x", 64, 32), spec("y", 64, 32))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("library") / "model.so"
    emit(path, parallel_rows(module(chain, *INPUTS), "tanh"))
    return path


def arrays(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    return draw.standard_normal((64, 32)).astype("float32"), draw.standard_normal((64, 32)).astype("float32")


def test_a_device_needs_numpy_alone(library: Path) -> None:
    script = (
        "import sys, numpy as np; from horq_tvm.runtime.loader import load; "
        f"m = load({str(library)!r}); z = np.zeros((64, 32), 'float32'); assert m(z, z)['out0'].any() == False; "
        "heavy = {'tvm', 'tvm_ffi', 'torch', 'onnx', 'onnxruntime', 'yaml', 'pydantic'}; "
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_by_position_by_name_and_both(library: Path) -> None:
    model = load(library)
    x, y = arrays()
    want = model(x, y)["out0"]
    for got in (model(y=y, x=x), model(x, y=y)):
        np.testing.assert_array_equal(got["out0"], want)


@pytest.mark.parametrize("threads", [1, 2])
def test_two_python_threads_at_once(library: Path, threads: int) -> None:
    model = load(library, threads=threads)
    alone = load(library)
    wrong: list[int] = []

    def work(seed: int) -> None:
        x, y = arrays(seed)
        want = alone(x, y)["out0"]
        for _ in range(100):
            if not np.array_equal(model(x, y)["out0"], want):
                wrong.append(seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_results_are_the_callers_own(library: Path) -> None:
    model = load(library)
    first = model(*arrays(0))["out0"]
    kept = first.copy()
    model(*arrays(1))
    np.testing.assert_array_equal(first, kept)


def test_arrays_that_are_not_contiguous_are_copied(library: Path) -> None:
    model = load(library)
    x, y = arrays()
    transposed, strided = np.asfortranarray(x), np.repeat(y, 2, axis=1)[:, ::2]
    assert not transposed.flags.c_contiguous
    assert not strided.flags.c_contiguous
    np.testing.assert_array_equal(model(transposed, strided)["out0"], model(x, y)["out0"])


def test_mistakes_in_a_call(library: Path) -> None:
    model = load(library)
    x, y = arrays()
    for call, message in (
        (lambda: model(x), "input 'y' is missing; the model's inputs are: x, y"),
        (lambda: model(x, y, x), "3 arrays given; the model's inputs are: x, y"),
        (lambda: model(x, x=x, y=y), "input 'x' is given twice"),
        (lambda: model(x, z=y), "no input 'z'; its inputs are: x, y"),
        (lambda: model(x, y.T), r"input 'y' has shape \[32, 64\]; accepted is \[64, 32\]"),
        (lambda: model(x, y[0]), r"input 'y' has shape \[32\]; accepted is \[64, 32\]"),
        (lambda: model(x.astype("float64"), y), "input 'x' has dtype float64; accepted is float32"),
        (lambda: model(x.astype(">f4"), y), "input 'x' has dtype >f4; accepted is float32"),
        (lambda: model.profile(x, y, runs=0), "runs is 0"),
        (lambda: load(library, threads=0), "threads is 0; accepted are 1 to 256"),
        (lambda: load(library, threads=257), "threads is 257"),
    ):
        with pytest.raises(UsageError, match=message):
            call()


def test_profile_names_every_step_and_times_it(library: Path) -> None:
    model = load(library)
    times = model.profile(*arrays(), runs=5)
    assert [step.name for step in times] == ["add", *["matmul", "tanh"] * 6]
    assert all(step.median_ns > 0 for step in times)


def test_profile_keeps_the_memory_that_kernels_write_into(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(library)
    made: list[weakref.ref[np.ndarray]] = []
    empty, run = loader._Slot.empty, model._library.horq_run

    def watched_empty(slot: loader._Slot) -> tuple[np.ndarray, int]:
        array, address = empty(slot)
        made.append(weakref.ref(array))
        return array, address

    def watched_run(*arguments: object) -> int:
        gc.collect()
        assert made
        assert all(array() is not None for array in made)
        return run(*arguments)

    monkeypatch.setattr(loader._Slot, "empty", watched_empty)
    monkeypatch.setattr(model._library, "horq_run", watched_run)
    model.profile(*arrays(), runs=2)


def test_a_rebuilt_library_is_not_mistaken_for_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "m.so"
    results, models = [], []
    for value in (1.0, 2.0, 3.0):
        emit(
            path,
            module(
                lambda builder, x, v=value: [builder.emit_te(topi.add, x, relax.const(np.float32(v)))], spec("x", 2)
            ),
        )
        models.append(load(path))
        results.append(models[-1](np.zeros(2, "float32"))["out0"][0])
    assert results == [1, 2, 3]
    assert [model(np.zeros(2, "float32"))["out0"][0] for model in models] == [1, 2, 3]


def test_threads_end_with_the_model(library: Path) -> None:
    def count() -> int:
        return sum(1 for _ in Path("/proc/self/task").iterdir())

    before = count()
    model = load(library, threads=4)
    assert count() == before + 3
    del model
    gc.collect()
    assert count() == before


def test_a_forked_child_gets_threads_of_its_own(library: Path) -> None:
    model = load(library, threads=2)
    x, y = arrays()
    want = model(x, y)["out0"]
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(model(x, y)["out0"], want) else 1)
    assert os.waitpid(child, 0)[1] == 0


def absent_feature() -> str:
    flags = re.findall(r"^flags\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0].split()
    absent = [feature for feature in X86 if feature not in flags]
    if not absent:
        pytest.skip("this CPU has every feature that we know")
    return absent[0]


def test_missing_cpu_features_are_named_and_nothing_runs(tmp_path: Path) -> None:
    feature = absent_feature()
    target = replace(targets.resolve("x86-64"), features=("sse2", feature))
    emit(tmp_path / "m.so", module(chain, *INPUTS), target)
    with pytest.raises(HorqError, match=f"needs CPU features that this machine lacks: {feature};"):
        load(tmp_path / "m.so")
    assert read_manifest(tmp_path / "m.so").cpu_features == ("sse2", feature)


def test_a_library_for_another_machine_can_be_inspected_not_loaded(library: Path, tmp_path: Path) -> None:
    data = bytearray(library.read_bytes())
    data[18:20] = (183).to_bytes(2, "little")
    (tmp_path / "m.so").write_bytes(data)
    assert read_manifest(tmp_path / "m.so") == read_manifest(library)
    with pytest.raises(HorqError, match="built for aarch64; this machine is"):
        load(tmp_path / "m.so")


def test_files_that_are_not_ours(library: Path, tmp_path: Path) -> None:
    whole = library.read_bytes()
    damaged = bytearray(whole)
    at = whole.index(b'{"version"')
    damaged[at : at + 10] = b'{"vers--n"'
    for name, data, message in (
        ("empty", b"", "not a shared library"),
        ("text", b"hello, world", "not a shared library"),
        ("cut", whole[: len(whole) // 2], "cut short or damaged"),
        ("short", whole[:-1], "cut short or damaged"),
        ("damaged", bytes(damaged), "the manifest cannot be read"),
        ("other", Path(sys.executable).resolve().read_bytes(), "was not built by horq-tvm"),
    ):
        (tmp_path / name).write_bytes(data)
        for action in (load, read_manifest):
            with pytest.raises(HorqError, match=f"{name}.*{message}"):
                action(tmp_path / name)
    for action in (load, read_manifest):
        with pytest.raises(UsageError, match=r"none\.so: found no such file"):
            action(tmp_path / "none.so")


def test_a_library_of_a_later_abi(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    assert compiler is not None
    (tmp_path / "m.c").write_text(
        'const char text[] __attribute__((section(".horq.manifest"))) = "{\\"version\\":1,\\"inputs\\":[],'
        '\\"outputs\\":[],\\"target\\":\\"\\",\\"cpu_features\\":[],\\"layers\\":[],\\"bytes\\":{}}";'
        "int horq_abi_version(void) { return 99; }"
    )
    subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / "m.so", tmp_path / "m.c"], check=True)
    with pytest.raises(HorqError, match=r"m\.so has ABI version 99; this horq-tvm loads version 1"):
        load(tmp_path / "m.so")
