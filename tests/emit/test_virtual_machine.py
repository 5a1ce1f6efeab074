"""Libraries for TVM's own runtime: of a CPU they compute what a standalone one does, of a card they hold its code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from torch import nn

import horq_tvm
from horq_tvm import targets
from horq_tvm.cli import main
from horq_tvm.cuda.fatbin import MAGIC
from horq_tvm.emit import tails
from horq_tvm.errors import HorqError, UsageError
from horq_tvm.runtime.elf import Elf
from horq_tvm.runtime.loader import LoadedModel, read_manifest
from horq_tvm.runtime.virtual_machine import VirtualMachineModel
from tests.cuda import nvcc

virtual_machine = sys.modules["horq_tvm.emit.virtual_machine"]  # the package has a function of this name
pytestmark = pytest.mark.filterwarnings("ignore:.*not trained for HORQ")
ORDER = {"order": 2, "scale": "sample"}


def module() -> nn.Module:
    """Two float layers with a binary one between, whose 40 channels end in half a word."""
    torch.manual_seed(3)
    layers = nn.Sequential(
        nn.Conv2d(3, 40, 3, padding=1), nn.BatchNorm2d(40), nn.Conv2d(40, 24, 3, 2, 1), nn.ReLU(), nn.Flatten()
    )
    return nn.Sequential(*layers, nn.Linear(24 * 5 * 5, 10)).eval()


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(1, 3, 9, 9)).astype("float32")


def build(target: str, **options: object) -> horq_tvm.CompiledModel:
    given = {"example_inputs": (torch.from_numpy(image()),), **ORDER, **options}
    return horq_tvm.build(module(), target, **given)


@pytest.fixture(scope="module")
def on_cpu() -> horq_tvm.CompiledModel:
    return build("native", emit="tvm")


def test_on_a_cpu_it_computes_what_a_standalone_library_does(on_cpu: horq_tvm.CompiledModel) -> None:
    model, other = on_cpu.load(), build("native").load()
    assert isinstance(model, VirtualMachineModel)
    assert not isinstance(other, VirtualMachineModel)
    assert (model.inputs, model.outputs) == (other.inputs, other.outputs)
    for seed in range(3):
        [(name, found)], [(_, expected)] = model(image(seed)).items(), other(image(seed)).items()
        assert name == model.outputs[0].name
        np.testing.assert_array_equal(found, expected)


def test_tails_of_vectors_are_masked_here_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head has 10 outputs, which vectors of 8 do not divide."""
    masked: list[str] = []

    def spy(mod: tvm.IRModule) -> tvm.IRModule:
        made = tails.mask_tails(mod)
        masked.extend(gvar.name_hint for gvar, func in made.functions_items() if "llvm.masked" in func.script())
        return made

    monkeypatch.setattr(virtual_machine, "mask_tails", spy)
    build("x86-64-v3", emit="tvm")
    assert masked


def test_the_interface_is_the_same(on_cpu: horq_tvm.CompiledModel) -> None:
    model: LoadedModel = horq_tvm.load(on_cpu.library, threads=2)
    name = model.inputs[0].name
    np.testing.assert_array_equal(*model(**{name: image()}).values(), *model(image()[:, :, ::-1][:, :, ::-1]).values())
    with pytest.raises(UsageError, match=r"has shape \[1, 3, 9\]; accepted is \[1, 3, 9, 9\]"):
        model(image()[..., 0])
    with pytest.raises(UsageError, match="has dtype float64; accepted is float32"):
        model(image().astype("float64"))
    with pytest.raises(UsageError, match=f"input '{name}' is missing"):
        model()
    with pytest.raises(UsageError, match="runs is 0"):
        model.profile(image(), runs=0)


def test_profile_names_kernels_and_layers(on_cpu: horq_tvm.CompiledModel) -> None:
    model = on_cpu.load()
    steps = model.profile(image(), runs=2)
    assert [name.partition(" ")[2] for name, _ in steps if " " in name] == ["0", "2", "5"]
    assert all(median > 0 for _, median in steps)
    assert isinstance(model, VirtualMachineModel)
    assert model.timer(image())(2) > 0


def test_the_manifest_is_read_without_loading(on_cpu: horq_tvm.CompiledModel) -> None:
    manifest = read_manifest(on_cpu.library)
    assert manifest.runtime == "tvm"
    assert manifest.archs == ()
    assert manifest.bytes.weights_packed > 0
    assert json.loads(manifest.to_json())["runtime"] == "tvm"
    assert "runtime" not in json.loads(read_manifest(build("native").library).to_json())


def test_the_command_line_inspects_and_runs_it(
    on_cpu: horq_tvm.CompiledModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(on_cpu.library)]) == 0
    assert "runtime   TVM's\n" in capsys.readouterr().out
    np.save(tmp_path / "x.npy", image())
    assert main(["run", str(on_cpu.library), str(tmp_path / "x.npy"), "-o", str(tmp_path / "y.npy")]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), *on_cpu(image()).values())


def test_a_card_has_no_standalone_library() -> None:
    with pytest.raises(UsageError, match=r"cannot hold kernels for a card \(cuda-sm86\); accepted: tvm"):
        build("cuda-sm86", emit="standalone")
    with pytest.raises(UsageError, match="emit: found 'elf'; accepted: standalone, tvm"):
        build("native", emit="elf")


@pytest.fixture(scope="module")
def on_cards() -> horq_tvm.CompiledModel:
    nvcc.found()
    return build("cuda")


def test_one_library_holds_machine_code_of_every_architecture(on_cards: horq_tvm.CompiledModel) -> None:
    data = on_cards.library.read_bytes()
    assert data.count(MAGIC) >= 1
    assert b"__global__" not in data
    kernels = on_cards.report["kernels"]
    assert {use["arch"] for use in kernels} == {75, 80, 86, 87, 89, 90} == set(read_manifest(on_cards.library).archs)
    assert len({use["kernel"] for use in kernels}) * 6 == len(kernels)
    assert sum(use["spilled_bytes"] for use in kernels) == 0
    assert on_cards.report["bytes"]["code"] > len(data) / 2
    assert str(Path.home()).encode() not in data


def test_inspect_names_the_cards(on_cards: horq_tvm.CompiledModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(on_cards.library)]) == 0
    assert "runtime   TVM's, a card of sm_75, sm_80, sm_86, sm_87, sm_89, sm_90\n" in capsys.readouterr().out


def test_without_a_card_it_does_not_load(on_cards: horq_tvm.CompiledModel) -> None:
    try:
        on_cards.load()
    except HorqError as error:
        assert "no CUDA device" in str(error)  # noqa: PT017
    else:
        np.testing.assert_allclose(
            *on_cards(image()).values(), *build("native")(image()).values(), rtol=1e-3, atol=1e-3
        )


@pytest.mark.slow
def test_the_same_build_gives_the_same_bytes() -> None:
    nvcc.found()
    first, second = build("cuda-sm86"), build("cuda-sm86")
    assert first.library.read_bytes() == second.library.read_bytes()


def test_an_arm_host_is_linked_by_its_compiler() -> None:
    nvcc.found()
    if shutil.which("aarch64-linux-gnu-gcc") is None:
        pytest.skip("no aarch64-linux-gnu-gcc here (make cross)")
    compiled = build("cuda-sm87")
    assert Elf.read(compiled.library).machine == "aarch64"
    assert read_manifest(compiled.library).archs == (87,)
    if targets.this_host().machine != "aarch64":
        with pytest.raises(HorqError, match="is built for aarch64; this machine is"):
            compiled.load()


@pytest.mark.slow
def test_a_library_with_source_in_it_is_never_written(tmp_path: Path) -> None:
    """What TVM does where its CUDA runtime is missing, in a process that does not load it."""
    nvcc.found()
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from horq_tvm.cuda import driver
driver.ensure_runtime = lambda: None
import tvm_ffi
if tvm_ffi.get_global_func(driver.CREATE, allow_missing=True):
    sys.exit("a driver is there")
from tests.emit.test_virtual_machine import build
build("cuda-sm86").export({str(tmp_path / "out.so")!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if "a driver is there" in done.stderr:
        pytest.skip("TVM's CUDA runtime loads by itself here")
    assert "the library holds CUDA source in place of machine code; accepted: a fatbin" in done.stderr
    assert not (tmp_path / "out.so").exists()


def test_what_does_not_fit_a_block_fails_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc.found()
    monkeypatch.setattr("horq_tvm.cuda.fatbin.PRELUDE", tmp_path / "prelude.cuh")
    (tmp_path / "prelude.cuh").write_text(
        """
extern "C" __global__ void __launch_bounds__(32) greedy(float* x) {
  __shared__ float tile[20000];
  tile[threadIdx.x] = x[0];
  __syncthreads();
  x[threadIdx.x] = tile[31 - threadIdx.x];
}
"""
    )
    with pytest.raises(HorqError, match=r"takes 80000 bytes of shared memory a block; accepted: 49152"):
        build("cuda-sm86", order="float", scale=None)


def test_rest_int8_is_a_clear_error() -> None:
    with pytest.raises(UsageError, match=r"rest: int8 has no kernels for the family 'cuda' of cuda; accepted: float32"):
        build("cuda", rest="int8")


def test_tune_is_a_clear_error() -> None:
    with pytest.raises(
        UsageError, match="target cuda: kernels for a card are not tuned; accepted: a target that is a CPU"
    ):
        horq_tvm.tune(module(), "cuda", trials=1, database="unused", example_inputs=(torch.from_numpy(image()),))
