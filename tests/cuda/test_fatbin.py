"""Machine code of several architectures, what it takes of a card, and which instructions it has."""

from __future__ import annotations

from pathlib import Path

import pytest

from horq_tvm.cuda import disassembly, fatbin, toolkit
from horq_tvm.cuda.architectures import ARCHITECTURES, occupancy
from horq_tvm.errors import HorqError
from horq_tvm.target_schema import CUDA_ARCHS
from tests.cuda import nvcc

COUNT = """
extern "C" __global__ void __launch_bounds__(32) count(int* out, const unsigned* a, const unsigned* b) {
  int c[4] = {0, 0, 0, 0};
  horq_mma(c, a + 4 * threadIdx.x, b + 2 * threadIdx.x);
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = c[i];
}
"""
TOO_LARGE = """
extern "C" __global__ void __launch_bounds__(64) greedy(float* x) {
  __shared__ float tile[%d];
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = tile[63 - threadIdx.x] + tile[(threadIdx.x * 977) %% %d];
}
"""


def test_one_fatbin_of_all_architectures_with_the_tensor_cores_instruction() -> None:
    found = nvcc.found()
    made = fatbin.compile_source(COUNT + nvcc.ADD_ONE, CUDA_ARCHS, found, nvcc.SHARED)
    assert made.data[:4] == fatbin.MAGIC
    assert [(use.kernel, use.arch) for use in made.uses] == [(k, a) for a in CUDA_ARCHS for k in ("add_one", "count")]
    assert all(use.registers > 0 and use.spilled_bytes == 0 and 0 < use.occupancy <= 1 for use in made.uses)
    assert {use.threads for use in made.uses} == {32, 64}
    if not found.program("cuobjdump") or not found.program("nvdisasm"):
        pytest.skip("no cuobjdump and nvdisasm here (make cuda)")
    listing = disassembly.instructions(made.data, found)
    assert [disassembly.counting(listing["count", arch]) for arch in CUDA_ARCHS] == ["BMMA"] * len(CUDA_ARCHS)
    assert listing["count", 75]["BMMA"] == 4  # m8n8k128
    assert listing["count", 80]["BMMA"] == 1
    assert listing["count", 90]["BMMA"] == 2  # AND alone: XOR is two of them
    assert disassembly.counting(listing["add_one", 86]) == ""


def test_the_same_source_gives_the_same_bytes() -> None:
    first, second = (fatbin.compile_source(nvcc.ADD_ONE, [80, 86], nvcc.found(), nvcc.SHARED) for _ in range(2))
    assert first == second


def test_what_a_spill_looks_like() -> None:
    """So that "no spills" is a finding: a kernel that must spill is told as one."""
    values = "".join(f"  float v{i} = x[{i} * n + threadIdx.x];\n" for i in range(64))
    uses = "".join(f"  x[{i} * n + threadIdx.x] = v{i} * v{(i * 7 + 3) % 64};\n" for i in range(64))
    kernel = (
        'extern "C" __global__ void __launch_bounds__(1024, 2) wide(float* x, int n) {\n%s  __syncthreads();\n%s}\n'
    )
    made = fatbin.compile_source(kernel % (values, uses), [80], nvcc.found(), nvcc.SHARED)
    assert made.uses[0].spilled_bytes > 0


@pytest.mark.parametrize(("floats", "bytes_"), [(13000, 52000), (12289, 49156)])
def test_a_kernel_too_large_for_shared_memory(floats: int, bytes_: int) -> None:
    with pytest.raises(
        HorqError, match=f"kernel greedy takes {bytes_} bytes of shared memory a block; accepted: 49152"
    ):
        fatbin.compile_source(TOO_LARGE % (floats, floats), [75], nvcc.found(), nvcc.SHARED)


def test_a_target_may_allow_less() -> None:
    fatbin.compile_source(TOO_LARGE % (4096, 4096), [75], nvcc.found(), 16 * 1024)
    with pytest.raises(HorqError, match="kernel greedy takes 16384 bytes of shared memory a block; accepted: 8192"):
        fatbin.compile_source(TOO_LARGE % (4096, 4096), [75], nvcc.found(), 8 * 1024)


def test_what_nvcc_cannot_compile_is_one_line() -> None:
    with pytest.raises(HorqError, match=r"nvcc failed: kernels.cu\(\d+\): error: .*\"oops\" is undefined") as caught:
        fatbin.compile_source('extern "C" __global__ void f(int* x) { *x = oops; }', [75], nvcc.found(), nvcc.SHARED)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("does", "message"),
    [
        (
            "echo \"gcc: fatal error: cannot execute 'cc1plus': No such file\" >&2; exit 1",
            r"needs a C\+\+ compiler .*g\+\+",
        ),
        ("echo text > kernels.fatbin", "wrote no fatbin but a file that starts with b'text'"),
        ("exit 3", "failed: no message"),
    ],
)
def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, message: str) -> None:
    nvcc.pretend(tmp_path, compile_=does)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(HorqError, match=message):
        fatbin.compile_source(nvcc.ADD_ONE, [75], toolkit.find(), nvcc.SHARED)


LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'k_kernel' for 'sm_75'
ptxas info    : Function properties for k_kernel
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes stack, 4096 bytes smem, 376 bytes cmem[0]
ptxas info    : Compile time = 5.528 ms
"""


def test_reading_ptxas() -> None:
    assert fatbin.read_uses(LOG, {"k_kernel": 128}) == (fatbin.Use("k_kernel", 75, 128, 40, 4096, 16, 20),)


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "expected"),
    [
        (80, 256, 32, 0, 1.0),  # 8 blocks of 8 warps are the 64 there are
        (86, 1024, 32, 0, 32 / 48),  # a second block of 32 warps does not fit
        (80, 256, 64, 0, 0.5),  # 32 warps of 64 registers take all 65536
        (80, 256, 65, 0, 24 / 64),  # 72 a thread: 28 warps, three blocks of 8
        (75, 128, 32, 32 * 1024, 8 / 32),  # two blocks' shared memory
        (86, 128, 32, 48 * 1024, 8 / 48),  # 1 KiB besides with each block
        (86, 32, 16, 0, 16 / 48),  # 16 blocks at most
        (80, 1024, 255, 0, 0.0),  # not one block has the registers
    ],
)
def test_occupancy(arch: int, threads: int, registers: int, shared: int, expected: float) -> None:
    assert occupancy(arch, threads, registers, shared) == pytest.approx(expected)


def test_every_architecture_is_described() -> None:
    assert tuple(ARCHITECTURES) == CUDA_ARCHS
    assert set(toolkit.SINCE) == set(CUDA_ARCHS)
