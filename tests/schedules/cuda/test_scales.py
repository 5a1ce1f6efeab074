"""Scales and im2col rows, computed while a model runs: means as exact as design.md asks, planes to the bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("tvm")

from horq_tvm import reference, targets
from horq_tvm.ops import Geometry
from horq_tvm.schedules import blocks
from horq_tvm.schedules.cuda import patch
from horq_tvm.schedules.cuda.scales import Sample, sample_scales
from horq_tvm.schedules.cuda.threads import written
from horq_tvm.schedules.patch import Patch
from tests.schedules.cuda import pocl
from tests.schedules.cuda.fragments import Array

MEAN_ERROR = 1e-6


def program(func: object) -> pocl.Program:
    scheduled = written(func, targets.resolve("cuda"))
    assert scheduled is not None
    return pocl.Program.of(blocks.function(scheduled))


def outputs(compiled: pocl.Program, *inputs: Array) -> list[Array]:
    (name,) = compiled.functions
    return compiled.run(name, *inputs)


def assert_means(found: Array, values: Array) -> None:
    """found [...,K] are the means of what the ones before leave of values [...,L]."""
    order = found.shape[-1]
    least = MEAN_ERROR * np.abs(values).mean(-1, dtype="float64")
    assert (found >= 0).all()
    for k in range(order):
        left = reference.residual_binarize(values, k, np.moveaxis(found[..., :k], -1, 0)[..., None])[1] if k else values
        error = np.abs(found[..., k] - np.abs(left).mean(-1, dtype="float64"))
        assert (error <= least).all(), f"mean {k} is off by {error.max()}"


def normal(shape: tuple[int, ...]) -> Array:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype("float32")


def equal(shape: tuple[int, ...]) -> Array:
    """±0.1: what a sum is off by goes one way."""
    return np.copysign(np.float32(0.1), normal(shape))


def huge(shape: tuple[int, ...]) -> Array:
    return np.float32(1e37) * np.tanh(normal(shape))


def affine(channels: int) -> tuple[Array, Array]:
    """Factors, powers of two, so that nothing is rounded but the sum, and addends above 0."""
    return np.ldexp(np.float32(1), np.arange(channels) % 3 - 1), np.abs(normal((channels,)))


VALUES: dict[str, Callable[[tuple[int, ...]], Array]] = {"normal": normal, "equal": equal, "huge": huge}

# --- Scale `sample` ---------------------------------------------------------------------------------------------------

SAMPLES = [
    Sample(1, 1, 1),
    Sample(2, 257, 3),
    Sample(3, 7 * 7 * 33, 8, channels=33),
    Sample(2, 14 * 14 * 256, 4),
    Sample(1, 56 * 56 * 64, 2, channels=64),
]


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("spec", SAMPLES, ids=str)
def test_means_of_an_image(spec: Sample, kind: str) -> None:
    x = VALUES[kind]((spec.batch, spec.size))
    factor, addend = affine(max(spec.channels, 1))
    line = [factor, addend] if spec.channels else []
    value = (x.reshape(spec.batch, -1, spec.channels) * factor + addend).reshape(x.shape) if line else x
    beta, _ = outputs(program(sample_scales(spec)), x, *line)
    assert_means(beta, value)


def test_a_mean_does_not_depend_on_the_batch() -> None:
    x = normal((3, 14 * 14 * 256))
    together, _ = outputs(program(sample_scales(Sample(3, x.shape[1], 2))), x)
    for image, found in zip(x, together, strict=True):
        alone, _ = outputs(program(sample_scales(Sample(1, x.shape[1], 2))), image[None])
        np.testing.assert_array_equal(alone[0], found)


def test_a_mean_needs_its_barriers() -> None:
    x, spec = normal((2, 14 * 14 * 256)), Sample(2, 14 * 14 * 256, 2)
    expected = reference.sample_scales(x, 2)
    beta, _ = outputs(program(sample_scales(spec)).without_barriers(), x)
    assert (np.abs(beta - expected) > 0.1 * expected).all()


# --- Scale `patch` ----------------------------------------------------------------------------------------------------

PATCHES = [
    Patch((2, 5, 6, 64), 2, 0, Geometry((3, 3), padding=(1, 1, 1, 1))),
    Patch((1, 5, 6, 33), 3, 0, Geometry((2, 3), strides=(2, 1))),
    Patch((2, 5, 6, 6), 4, 1, Geometry((3, 3), padding=(1, 0, 2, 1), dilation=(1, 2), groups=3)),
    Patch((1, 3, 3, 512), 2, 0, Geometry((3, 3), padding=(1, 1, 1, 1))),
    Patch((1, 2, 3, 130), 1, 0, Geometry((1, 1), groups=2)),
    Patch((1, 1, 5, 800), 2, 0, Geometry((1, 1))),
    Patch((1, 1, 2, 32 * 800), 2, 0, Geometry((1, 1))),  # more words than one for each of 24 values in 32 warps
    Patch((1, 4, 4, 96), 8, 0, Geometry((3, 3), padding=(3, 3, 3, 3))),
]


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("spec", PATCHES, ids=str)
def test_rows(spec: Patch, kind: str) -> None:
    x = VALUES[kind](spec.image)
    x = np.abs(x) if spec.first else x
    beta, planes = outputs(program(patch.rows(spec, affine=False)), x)
    rows, bits = of_rows(spec, x, beta)
    assert_means(beta, rows)
    np.testing.assert_array_equal(planes, bits)


@pytest.mark.parametrize("spec", PATCHES[:3], ids=str)
def test_rows_of_a_line(spec: Patch) -> None:
    x = normal(spec.image)
    factor, addend = affine(spec.image[3])
    x = np.abs(x) if spec.first else x
    beta, planes = outputs(program(patch.rows(spec, affine=True)), x, factor, addend)
    rows, bits = of_rows(spec, x * factor + addend, beta)
    assert_means(beta, rows)
    np.testing.assert_array_equal(planes, bits)


@pytest.mark.parametrize("spec", PATCHES[:3], ids=str)
def test_rows_of_given_scales(spec: Patch) -> None:
    x = np.abs(normal(spec.image)) if spec.first else normal(spec.image)
    beta = np.full(spec.beta_shape, 0.5, "float32")
    (planes,) = outputs(program(patch.rows_of_given(spec, affine=False)), x, beta)
    np.testing.assert_array_equal(planes, of_rows(spec, x, beta)[1])


def test_rows_need_their_barriers() -> None:
    spec = PATCHES[3]
    x = normal(spec.image)
    beta, _ = outputs(program(patch.rows(spec, affine=False)).without_barriers(), x)
    expected = np.abs(of_rows(spec, x, beta)[0]).mean(-1)
    assert (np.abs(beta[..., 0] - expected) > 0.1 * expected).any()


def of_rows(spec: Patch, x: Array, beta: Array) -> tuple[Array, Array]:
    """The rows [N,HO,WO,G,L], and their planes with `beta`, packed."""
    geometry, image = spec.geometry, np.moveaxis(x, 3, 1)
    where = (geometry.kernel, geometry.strides, geometry.padding, geometry.dilation, geometry.groups)
    rows = reference.patches(image, *where)
    planes, _ = reference.residual_binarize(rows, spec.order, np.moveaxis(beta, -1, 0)[..., None])
    taps = geometry.kernel[0] * geometry.kernel[1]
    return rows, reference.pack_rows(planes[spec.first :], taps)
