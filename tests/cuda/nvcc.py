"""The CUDA compiler for tests: those that need it are skipped, with the reason, where it is missing."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

from horq_tvm.cuda import disassembly, fatbin, toolkit
from horq_tvm.errors import HorqError

ADD_ONE = 'extern "C" __global__ void __launch_bounds__(64) add_one(float* x) { x[threadIdx.x] += 1.0f; }\n'
SHARED = 48 * 1024


@cache
def problem() -> str:
    """Why nothing can be compiled for a card here, "" where it can."""
    try:
        fatbin.compile_source(ADD_ONE, [75], toolkit.find(), SHARED)
    except HorqError as error:
        return f"{error} (make cuda)"
    return ""


def found() -> toolkit.Toolkit:
    """The toolkit of this machine; skips the test that asks where it compiles nothing."""
    if problem():
        pytest.skip(problem())
    return toolkit.find()


def check_uses(made: fatbin.Fatbin, count: int, occupancy: float) -> None:
    """So many kernels, all architectures counted, that spill nothing and leave room for `occupancy` of the warps."""
    assert len(made.uses) == count
    for use in made.uses:
        assert use.spilled_bytes == use.stack_bytes == 0, use
        assert use.occupancy >= occupancy, use


def instructions(made: fatbin.Fatbin) -> Mapping[tuple[str, int], Mapping[str, int]]:
    """What the machine code holds, by kernel and architecture; skips the test that asks where nothing can look."""
    toolkit_ = found()
    if not toolkit_.program("cuobjdump") or not toolkit_.program("nvdisasm"):
        pytest.skip("no cuobjdump and nvdisasm here (make cuda)")
    return disassembly.instructions(made.data, toolkit_)


def pretend(
    folder: Path, release: str = "13.0", archs: str = "sm_75\\nsm_80\\nsm_90", compile_: str = "exit 1"
) -> Path:
    """A toolkit in `folder` whose nvcc says what it is told to, and otherwise does `compile_`. Returns its nvcc."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        f"""#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
  --list-gpu-code) printf '{archs}\\n' ;;
  *) {compile_} ;;
esac
"""
    )
    nvcc.chmod(0o755)
    return nvcc
