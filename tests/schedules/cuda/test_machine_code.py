"""What ptxas makes of planes, scales and rows on every architecture: votes of a warp, and nothing spilled."""

from __future__ import annotations

import pytest

pytest.importorskip("tvm")

import tvm
from tvm import s_tir

from horq_tvm import targets
from horq_tvm.cuda import fatbin
from horq_tvm.ops import Geometry
from horq_tvm.schedules import blocks
from horq_tvm.schedules.binarize import Binarization
from horq_tvm.schedules.cuda import patch
from horq_tvm.schedules.cuda.pack import binarize
from horq_tvm.schedules.cuda.planes import ballots
from horq_tvm.schedules.cuda.scales import Sample, sample_scales
from horq_tvm.schedules.cuda.threads import written
from horq_tvm.schedules.patch import Patch
from horq_tvm.target_schema import CUDA_ARCHS
from tests.cuda import nvcc
from tests.cuda.source import source_of

CUDA = targets.resolve("cuda")
AROUND = Geometry((3, 3), padding=(1, 1, 1, 1))


def scheduled() -> dict[str, s_tir.Schedule | None]:
    """Kernels of ResNet-18's first and last stage; their names say whether they vote."""
    found = {"means": written(sample_scales(Sample(1, 56 * 56 * 64, 2, channels=64)), CUDA)}
    for order in (2, 4):
        first = Binarization((1, 56, 56, 64), (1, order), order, 0, "static", 1, affine=True)
        found[f"votes_planes{order}"] = ballots(binarize(first), CUDA)
        for size, channels in ((56, 64), (7, 512)):
            spec = Patch((1, size, size, channels), order, 0, AROUND)
            found[f"votes_rows{order}_{channels}"] = written(patch.rows(spec, affine=True), CUDA)
    return found


def test_machine_code() -> None:
    toolkit = nvcc.found()
    kernels = {}
    for name, schedule in scheduled().items():
        assert schedule is not None
        kernels[name] = blocks.function(schedule).with_attr("global_symbol", name)
    source = source_of(tvm.IRModule(kernels), CUDA)
    made = fatbin.compile_source(source, CUDA_ARCHS, toolkit, CUDA.shared_bytes)
    launches = len(kernels) + 2  # a mean of two planes takes three
    nvcc.check_uses(made, launches * len(CUDA_ARCHS), 0.25)
    for (kernel, arch), found in nvcc.instructions(made).items():
        votes = any(name.startswith("VOTE") for name in found)
        assert votes == kernel.startswith("votes"), (kernel, arch)
