"""Planes by ballots, as a launch of their own: every bit is the reference's."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tvm")

from horq_tvm import reference, targets
from horq_tvm.schedules import blocks
from horq_tvm.schedules.binarize import Binarization
from horq_tvm.schedules.cuda.pack import binarize
from horq_tvm.schedules.cuda.planes import ballots
from tests.schedules.cuda import pocl

TABLE = [
    Binarization(shape, (shape[0] if scale == "sample" else 1, order), order, first, scale, groups, affine)
    for shape, order, first, scale, groups, affine in (
        ((1, 3, 5, 64), 1, 0, "static", 1, False),
        ((2, 3, 3, 64), 2, 0, "sample", 1, False),
        ((2, 2, 5, 33), 3, 0, "static", 1, True),
        ((3, 3, 3, 66), 4, 1, "sample", 2, True),
        ((1, 2, 2, 1), 2, 0, "static", 1, False),
        ((1, 1, 7, 96), 2, 1, "static", 3, False),
        ((2, 1, 1, 300), 8, 0, "sample", 1, False),
        ((1, 4, 4, 40), 2, 0, "sample", 8, False),
    )
]


@pytest.mark.parametrize("spec", TABLE, ids=str)
def test_planes_are_the_references(spec: Binarization) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(spec.input_shape).astype("float32")
    x[rng.random(spec.input_shape) < 0.1] = -0.0
    beta = np.sort(np.abs(rng.standard_normal(spec.beta_shape)).astype("float32"))[:, ::-1]
    line = []
    if spec.affine:
        # A product with a power of two is exact, so there is one rounding, contracted or not.
        channels = spec.input_shape[3]
        line = [2.0 ** rng.integers(-2, 3, channels), rng.standard_normal(channels)]
        line = [np.float32(operand) for operand in line]
    if spec.first:
        x = np.abs(x)
        line = [np.abs(operand) for operand in line]
    value = x * line[0] + line[1] if line else x
    scheduled = ballots(binarize(spec), targets.resolve("cuda"))
    assert scheduled is not None
    (found,) = pocl.run(blocks.function(scheduled), x, np.ascontiguousarray(beta), *line)
    chain = beta.T.reshape(spec.order, -1, 1, 1, 1)
    planes, _ = reference.residual_binarize(np.moveaxis(value, 3, 1), spec.order, chain)
    np.testing.assert_array_equal(found, reference.pack_images(planes[spec.first :], spec.groups))
