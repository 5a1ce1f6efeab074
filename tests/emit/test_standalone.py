"""Whole libraries: what they compute, what they export, what they need, and that a build leaves nothing half done."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax, te, topi

from horq_tvm import targets
from horq_tvm.emit import standalone
from horq_tvm.emit.cpu_features import X86
from horq_tvm.errors import HorqError
from horq_tvm.manifest import ByteCounts, LayerRecord
from horq_tvm.runtime.loader import load, read_manifest
from tests.emit.models import emit, manifest_of, module, parallel_rows, spec

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((16, 24)).astype("float32")
BITS = RNG.integers(0, 2**32, (24,), dtype=np.uint32)


def network(builder: relax.BlockBuilder, x: relax.Var, y: relax.Var) -> list[relax.Expr]:
    """Every kind of output: computed, an alias of it, read again, an input, a constant, the same twice."""
    a = builder.emit(relax.op.reshape(builder.emit_te(topi.nn.relu, x), (6, 16)))
    b = builder.emit_te(topi.matmul, a, relax.const(WEIGHT))
    c = builder.emit(relax.op.reshape(b, (2, 3, 24)))
    d = builder.emit_te(topi.add, c, y)
    packed = relax.const(BITS)
    e = builder.emit_te(topi.bitwise_xor, packed, builder.emit_te(lambda v: topi.cast(v, "uint32"), d))
    return [c, d, b, x, relax.const(WEIGHT), d, e, builder.emit(relax.op.reshape(y, (144,))), packed]


X = RNG.standard_normal((2, 3, 16)).astype("float32")
Y = RNG.standard_normal((2, 3, 24)).astype("float32")
INPUTS = (spec("x", 2, 3, 16), spec("y", 2, 3, 24))


def expected() -> list[np.ndarray]:
    product = np.maximum(X, 0) @ WEIGHT
    total = product + Y
    clipped = np.where(total < 0, 0, total)  # a negative float as uint32 is whatever the machine makes of it
    return [product, total, product.reshape(6, 24), X, WEIGHT, total, clipped.astype("uint32"), Y.reshape(-1), BITS]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("library") / "model.so"
    emit(path, module(network, *INPUTS))
    return path


def test_every_kind_of_output(library: Path) -> None:
    model = load(library)
    results = list(model(X, Y).values())
    positive = expected()[1] >= 0
    for index, (got, want) in enumerate(zip(results, expected(), strict=True)):
        assert got.dtype == want.dtype
        if index == 6:
            np.testing.assert_array_equal(got[positive], (want ^ BITS)[positive])
        else:
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_inputs_are_left_as_they_were(library: Path) -> None:
    x, y = X.copy(), Y.copy()
    load(library)(x, y)
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y, Y)


def test_memory_of_any_alignment_gives_the_same(library: Path) -> None:
    model = load(library)
    want = model(X, Y)
    for shift in (0, 4, 60):
        memory = np.zeros(X.nbytes + 128, np.uint8)
        start = -memory.ctypes.data % 64 + shift
        x = memory[start : start + X.nbytes].view("float32").reshape(X.shape)
        x[...] = X
        got = model(x, Y)
        for name in want:
            np.testing.assert_array_equal(got[name], want[name])


def tool(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_it_needs_only_libc_libm_and_pthread(library: Path) -> None:
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", tool("readelf", "-dW", str(library))))
    assert "libc.so.6" in needed
    assert needed <= {"libc.so.6", "libm.so.6", "libpthread.so.0"}


def test_it_exports_horq_and_nothing_else(library: Path) -> None:
    table = tool("readelf", "--dyn-syms", "-W", str(library))
    rows = [line.split() for line in table.splitlines() if re.match(r"\s*\d+: ", line)]
    defined = {row[7] for row in rows if len(row) > 7 and row[6] != "UND"}
    header = (Path(standalone.__code__.co_filename).parents[1] / "runtime" / "horq.h").read_text()
    assert defined == set(re.findall(r"^HORQ_API .*?(horq_\w+)\(", header, re.MULTILINE))


def test_nothing_is_writable_and_executable(library: Path) -> None:
    flags = re.findall(r"^\s+(?:LOAD|GNU_STACK) .* ([RWE ]{3}) ", tool("readelf", "-lW", str(library)), re.MULTILINE)
    assert len(flags) >= 3
    assert not [flag for flag in flags if "W" in flag and "E" in flag]


def test_weights_are_read_only(library: Path) -> None:
    (row,) = re.findall(r"\.horq\.weights +PROGBITS +.*", tool("readelf", "-SW", str(library)))
    assert row.split()[6] == "A"
    assert row.split()[-1] == "64"


def test_the_same_build_gives_the_same_bytes(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "another scratch folder"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.chdir(tmp_path)
    emit(Path("other name.so"), module(network, *INPUTS))
    assert (tmp_path / "other name.so").read_bytes() == library.read_bytes()


def test_the_manifest_says_where_the_bytes_are(tmp_path: Path) -> None:
    mod = module(network, *INPUTS)
    layers = (LayerRecord("conv1", "conv2d", 2, "sample"), LayerRecord("head", "dense", reason="reaches an output"))
    target = targets.resolve("x86-64")
    returned = standalone(mod, target, replace(manifest_of(mod), layers=layers), tmp_path / "m.so")
    assert read_manifest(tmp_path / "m.so") == returned
    assert returned.layers == layers
    assert returned.target == "x86-64"
    assert returned.cpu_features == target.features
    sizes = {}
    for line in tool("readelf", "-SW", str(tmp_path / "m.so")).splitlines():
        if found := re.match(r"\s*\[ *\d+\] (\.\S+) +\S+ +\S+ +\S+ (\S+) \S+ +(\w*) ", line):
            sizes[found[1]] = (int(found[2], 16), found[3])
    code = sum(size for size, flags in sizes.values() if "X" in flags)
    assert returned.bytes == ByteCounts(code, BITS.nbytes, WEIGHT.nbytes, sizes[".horq.manifest"][0])


def test_a_model_without_kernels(tmp_path: Path) -> None:
    def body(builder: relax.BlockBuilder, x: relax.Var) -> list[relax.Expr]:
        return [builder.emit(relax.op.reshape(x, (4,))), relax.const(np.float32(7))]

    emit(tmp_path / "m.so", module(body, spec("x", 2, 2)))
    x = np.arange(4, dtype="float32").reshape(2, 2)
    result = load(tmp_path / "m.so")(x)
    np.testing.assert_array_equal(result["out0"], x.reshape(4))
    assert result["out1"].shape == ()
    assert result["out1"] == 7


def test_names_that_are_not_identifiers(tmp_path: Path) -> None:
    name = 'a/b "quoted" \\ ??= ünï\n'
    mod = module(lambda builder, x: [builder.emit_te(topi.nn.relu, x)], spec("x", 3))
    found = manifest_of(mod)
    found = replace(found, inputs=(replace(found.inputs[0], name=name),))
    standalone(mod, targets.resolve("x86-64"), found, tmp_path / "m.so", {"relu": name})
    model = load(tmp_path / "m.so")
    x = np.array([-1, 0, 2], "float32")
    np.testing.assert_array_equal(model(**{name: x})["out0"], [0, 0, 2])
    assert [step.name for step in model.profile(x, runs=1)] == [name]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_parallel_loops_split_the_work(tmp_path: Path, threads: int) -> None:
    def body(builder: relax.BlockBuilder, x: relax.Var) -> list[relax.Expr]:
        for _ in range(4):
            x = builder.emit_te(topi.add, x, relax.const(np.float32(1)))
        return [x]

    emit(tmp_path / "m.so", parallel_rows(module(body, spec("x", 37, 11)), "add"))
    model = load(tmp_path / "m.so", threads=threads)
    for _ in range(200):
        x = RNG.standard_normal((37, 11)).astype("float32")
        np.testing.assert_array_equal(
            model(x)["out0"], x + np.float32(1) + np.float32(1) + np.float32(1) + np.float32(1)
        )


def test_a_workspace_is_refused_by_the_kernels_name(tmp_path: Path) -> None:
    def hungry(x: te.Tensor) -> te.Tensor:
        held = te.compute(x.shape, lambda i: x[i] * 2.0, name="held")
        axis = te.reduce_axis((0, 4096))
        return te.compute((4096,), lambda i: te.sum(held[axis] * x[i], axis=axis), name="hungry")

    mod = module(lambda builder, x: [builder.emit_te(hungry, x)], spec("x", 4096))
    with pytest.raises(HorqError, match="kernel hungry allocates a workspace"):
        emit(tmp_path / "m.so", mod)
    assert not list(tmp_path.iterdir())


def relu_module() -> tvm.IRModule:
    return module(lambda builder, x: [builder.emit_te(topi.nn.relu, x)], spec("x", 8))


def test_a_failed_build_leaves_the_old_library(tmp_path: Path) -> None:
    (tmp_path / "m.so").write_text("old")
    target = replace(targets.resolve("x86-64"), compiler=("false",))
    with pytest.raises(HorqError, match="false failed"):
        emit(tmp_path / "m.so", relu_module(), target)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.so"]
    assert (tmp_path / "m.so").read_text() == "old"


@pytest.mark.parametrize(
    ("out", "reason"),
    [("missing/m.so", "there is no folder"), ("folder", "it is a folder"), ("file/m.so", "there is no folder")],
)
def test_an_unwritable_path(tmp_path: Path, out: str, reason: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(HorqError, match=f"cannot write .*{out}: {reason}"):
        emit(tmp_path / out, relu_module())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]


def test_the_library_has_the_permissions_of_a_new_file(tmp_path: Path) -> None:
    emit(tmp_path / "m.so", relu_module())
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "m.so").stat().st_mode & 0o444 == 0o444 & ~mask


def test_a_missing_compiler_and_what_to_install(tmp_path: Path) -> None:
    target = replace(targets.resolve("x86-64"), compiler=("aarch64-elsewhere-gcc",))
    with pytest.raises(HorqError, match="'aarch64-elsewhere-gcc' is not on PATH.*apt install gcc-aarch64-elsewhere"):
        emit(tmp_path / "m.so", relu_module(), target)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("preset", "package"),
    [
        ("rpi4", "gcc-aarch64-linux-gnu libc6-dev-arm64-cross"),
        ("rpi2", "gcc-arm-linux-gnueabihf libc6-dev-armhf-cross"),
    ],
)
def test_the_package_of_a_cross_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str, package: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HorqError, match=rf"not on PATH.*apt install {package}\)"):
        emit(tmp_path / "m.so", relu_module(), targets.resolve(preset))


def test_a_feature_that_the_library_could_not_check(tmp_path: Path) -> None:
    target = replace(targets.resolve("x86-64"), features=("sse2", "avx1024"))
    with pytest.raises(HorqError, match="'avx1024'.*popcnt"):
        emit(tmp_path / "m.so", relu_module(), target)


def test_a_manifest_of_other_tensors_is_refused(tmp_path: Path) -> None:
    mod = relu_module()
    wrong = replace(manifest_of(mod), outputs=(spec("y", 9),))
    with pytest.raises(HorqError, match="main has the outputs"):
        standalone(mod, targets.resolve("x86-64"), wrong, tmp_path / "m.so")


def test_every_feature_is_asked_for_as_the_kernel_of_this_machine_does(tmp_path: Path) -> None:
    flags = set(re.findall(r"^flags\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0].split())
    lacking = [feature for feature in X86 if feature not in flags]
    emit(tmp_path / "m.so", relu_module(), replace(targets.resolve("x86-64"), features=tuple(X86)))
    if not lacking:
        load(tmp_path / "m.so")
        return
    with pytest.raises(HorqError, match="CPU features that this machine lacks: " + ", ".join(lacking) + ";"):
        load(tmp_path / "m.so")


def test_emitting_many_kernels_is_quick_enough_to_be_unnoticed(tmp_path: Path) -> None:
    def body(builder: relax.BlockBuilder, x: relax.Var) -> list[relax.Expr]:
        for index in range(60):
            scale = float(index + 2)
            x = builder.emit_te(lambda v, scale=scale: topi.minimum(topi.add(v, scale), 1.0), x)
        return [x]

    emit(tmp_path / "m.so", module(body, spec("x", 64)))
    model = load(tmp_path / "m.so")
    assert len(model.profile(np.zeros(64, "float32"), runs=1)) == 60
    assert model.arena_bytes == 2 * 256
