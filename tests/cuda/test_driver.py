"""TVM's CUDA runtime without a driver, and a card that is not there."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from horq_tvm.cuda import device, driver
from horq_tvm.errors import HorqError

pytest.importorskip("tvm")


def fake_driver(folder: Path, cards: list[int], status: int = 0) -> ctypes.CDLL:
    """A driver with cards of these architectures, whose first call returns `status`."""
    source, out = folder / "fake.c", folder / "fake.so"
    archs = ", ".join(map(str, [*cards, 0]))
    source.write_text(
        f"""
static const int archs[] = {{{archs}}};
int cuInit(unsigned flags) {{ return {status}; }}
int cuDeviceGetCount(int *count) {{ *count = {len(cards)}; return 0; }}
int cuDeviceGetAttribute(int *value, int attribute, int card) {{
  *value = attribute == 75 ? archs[card] / 10 : archs[card] % 10;
  return 0;
}}
"""
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", out, source], check=True)
    return ctypes.CDLL(str(out))


def test_a_stand_in_says_no_device(tmp_path: Path) -> None:
    library = ctypes.CDLL(str(driver.stand_in("libcudart.so.99", ["cudaMalloc", "cudaGetErrorString"], tmp_path)))
    assert library.cudaMalloc(None, 1) == 100
    library.cudaGetErrorString.restype = ctypes.c_char_p
    assert library.cudaGetErrorString(100) == b"no CUDA-capable device is detected"


def test_a_stand_in_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(HorqError, match=r"no libcuda.so.1 here, and no stand-in for it .*no C compiler: 'no-such-cc'"):
        driver.stand_in("libcuda.so.1", ["cuInit"], tmp_path, ["no-such-cc"])
    with pytest.raises(HorqError, match=r"no libcuda.so.1 here, and .*false cannot make a stand-in for it: no message"):
        driver.stand_in("libcuda.so.1", ["cuInit"], tmp_path, ["false"])


def test_the_runtime_loads_without_a_driver() -> None:
    """In a process of its own, as it stays loaded."""
    script = """
from horq_tvm.cuda import driver
driver.ensure_runtime()
driver.ensure_runtime()
import tvm, tvm_ffi
assert tvm_ffi.get_global_func("ffi.Module.create.cuda")
print(tvm.cuda(0).exist)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("True", "False")


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "DRIVER", "libno-such-driver.so.1")
    with pytest.raises(HorqError, match=r"no CUDA device: NVIDIA's driver, .* not on this machine; .* sm_86, sm_89"):
        device.card_for([86, 89])


@pytest.mark.parametrize(
    ("cards", "status", "message"),
    [
        ([], 100, r"no CUDA device: the driver says no CUDA-capable device is detected \(error 100\); .*card of sm_86"),
        ([], 0, "no CUDA device: the driver counts none; the library needs a card of sm_86"),
        ([61, 80], 0, "holds code for sm_86; the CUDA device of this machine is sm_61, sm_80"),
    ],
)
def test_no_card_for_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cards: list[int], status: int, message: str
) -> None:
    fake = fake_driver(tmp_path, cards, status)
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: fake)
    with pytest.raises(HorqError, match=message):
        device.card_for([86])


def test_the_first_card_that_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_driver(tmp_path, [61, 89, 86])
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: fake)
    assert device.card_for([75, 86]) == device.Card(1, 89)


@pytest.mark.parametrize(
    ("card", "arch", "runs"), [(89, 86, True), (86, 89, False), (90, 89, False), (75, 75, True), (80, 75, False)]
)
def test_which_code_a_card_runs(card: int, arch: int, runs: bool) -> None:
    assert device.Card(0, card).runs(arch) is runs
