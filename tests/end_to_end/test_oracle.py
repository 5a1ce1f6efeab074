"""Compiled layers against the reference, over drawn geometries: integers equal, floats within the contract's tolerance.

Two sweeps of DRAWS × LAYERS layers each, a library per draw:

exact    |W| = 1, no bias and β = 1 handed in, so that an output is the integer ΣS_i, and must be equal.
general  any weights, biases and inputs, β computed by the library. With the library's own β nothing is in doubt, and
         every output is within `HorqResult.tolerance`. With the reference's β, outputs whose window holds a doubtful
         sign are counted (under 1 %), and all others agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from horq_tvm import reference
from horq_tvm.errors import HorqError
from horq_tvm.runtime.loader import LoadedModel

pytest.importorskip("tvm")

from tests.end_to_end.drawn import Drawn, Float32, layers, with_given_scales, with_own_scales
from tests.end_to_end.emulator import EmulatedModel
from tests.end_to_end.taps import MEAN_ERROR

DRAWS, LAYERS = 3, 40
Model = LoadedModel | EmulatedModel

# Shrinking would compile some hundred libraries; the layer that failed is named by its assertion instead.
SWEEP = settings(
    max_examples=DRAWS,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def draws(**kinds: Any) -> Any:
    """Lists of layers that differ in more than their values: without that the first draw is the simplest layer only."""
    return st.lists(
        layers(**kinds), min_size=LAYERS, max_size=LAYERS, unique_by=lambda layer: replace(layer, seed=0, relu=False)
    )


# --- Exact ------------------------------------------------------------------------------------------------------------


@SWEEP
@given(draws())
def test_with_unit_scales_the_output_is_the_sum_of_integers(drawn: list[Drawn]) -> None:
    compiled, fed = with_given_scales(drawn)
    model, images = compiled.load(), [layer.image() for layer in drawn]
    for layer, y, result in exact_results(drawn, images, model, fed, given_beta=1.0):
        np.testing.assert_array_equal(y, result.sums.sum(axis=0), err_msg=str(layer))


def exact_results(
    drawn: Sequence[Drawn],
    images: Sequence[Float32],
    model: Model,
    fed: Sequence[Sequence[int]],
    given_beta: float,
) -> Iterator[tuple[Drawn, Float32, reference.HorqResult]]:
    """Each layer of a model of `with_given_scales`, with its output and the reference's, every β being `given_beta`."""
    betas = [np.full(spec.shape, given_beta, "float32") for spec in model.inputs[len(drawn) :]]
    outputs = model(*images, *betas)
    beta_of = {index: beta for group, beta in zip(fed, betas, strict=True) for index in group}
    for index, (layer, x) in enumerate(zip(drawn, images, strict=True)):
        y = layer.in_reference_layout(outputs[f"y{index}"])
        yield layer, y, layer.expected(x, unit=True, beta=beta_of.get(index))


# --- General ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def share(request: pytest.FixtureRequest) -> Iterator[Callable[[int, int], None]]:
    """Counts doubtful outputs over the sweep; prints their share at the end."""
    counted = [0, 0]

    def count(doubtful: int, outputs: int) -> None:
        counted[0] += doubtful
        counted[1] += outputs

    yield count
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else nullcontext():
        print(f"\noutputs with a doubtful sign in their window: {counted[0]} of {counted[1]}, {share_of(*counted):.3%}")


def share_of(doubtful: int, outputs: int) -> float:
    return doubtful / max(outputs, 1)


@SWEEP
@given(drawn=draws(least_row=9))
def test_outputs_agree_within_the_tolerance(drawn: list[Drawn], share: Callable[[int, int], None]) -> None:
    doubtful, outputs = check_general(drawn, with_own_scales(drawn).load(), [layer.image() for layer in drawn])
    share(doubtful, outputs)
    assert share_of(doubtful, outputs) < 0.01


def check_general(drawn: Sequence[Drawn], model: Model, images: Sequence[Float32]) -> tuple[int, int]:
    """Compares a model of `with_own_scales`; returns how many outputs are doubtful, and how many there are."""
    outputs = model(*images)
    doubtful = total = 0
    for index, (layer, x) in enumerate(zip(drawn, images, strict=True)):
        y, beta = layer.in_reference_layout(outputs[f"y{index}"]), outputs.get(f"beta_{index}")
        own = layer.expected(x, unit=False)
        shared = own if beta is None else layer.expected(x, unit=False, beta=beta)
        assert_means(shared.beta, own.beta, layer)
        assert_within(y, shared.output, shared.tolerance, f"given the same β, {layer}")
        assert_within(y, own.output, own.tolerance + by_means(layer, own), str(layer), where=~own.doubtful)
        doubtful += int(own.doubtful.sum())
        total += own.output.size
    return doubtful, total


def test_rows_no_longer_than_the_order() -> None:
    """With at most two values in a row or image, residuals are 0 but for rounding: signs that only the β decides."""
    short = [
        Drawn(channels, 5, order, scale, lead=lead, size=(2, 3, 3), groups=1 if lead else 2, seed=channels)
        for channels, order in ((1, 2), (1, 4), (2, 3), (3, 4))
        for scale in ("patch", "sample")
        for lead in (None, (2,))
    ]
    check_general(short, with_own_scales(short).load(), [layer.image() for layer in short])


def test_batches_and_groups_that_fill_a_vector() -> None:
    """Loops that are no channels must not be taken for vectors because their extent would fit."""
    whole = [
        Drawn(5, 4, 2, scale, lead=lead, size=(batch, 3, 3), kernel=kernel, groups=groups, seed=batch + groups)
        for scale in ("patch", "sample", "static")
        for lead, batch, groups, kernel in (
            (None, 16, 1, (2, 2)),
            (None, 2, 16, (3, 1)),
            ((16,), 1, 1, (1, 1)),
            ((2, 32), 1, 1, (1, 1)),
        )
    ]
    check_general(whole, with_own_scales(whole).load(), [layer.image() for layer in whole])


def assert_within(
    found: Float32, expected: Float32, tolerance: Float32, what: str, where: np.ndarray | None = None
) -> None:
    """|found − expected| <= tolerance, computed in float64, so that neither infinities nor NaN pass."""
    error = np.abs(found.astype("float64") - expected)
    bad = ~(error <= tolerance) & (True if where is None else where)
    if bad.any():
        at = np.unravel_index(np.argmax(np.where(bad, error / np.maximum(tolerance, 1e-45), 0)), bad.shape)
        pytest.fail(
            f"{what}: {int(bad.sum())} of {bad.size} outputs, the worst at {tuple(map(int, at))}: found {found[at]!r},"
            f" expected {expected[at]!r} ± {tolerance[at]!r}"
        )


def assert_means(found: Float32, expected: Float32, layer: Drawn, least: float = 0.0) -> None:
    """β as the contract allows a kernel to compute it: within 1e-6·β_1 (or `least`) of the mean and never below 0."""
    assert (found >= 0).all(), str(layer)
    error = np.abs(found.astype("float64") - expected)
    assert (error <= np.maximum(MEAN_ERROR * expected[..., :1], least)).all(), (
        f"{layer}: a mean is off by {error.max()}"
    )


def by_means(layer: Drawn, result: reference.HorqResult) -> Float32:
    """How far an output moves when each β moves by 1e-6·β_1: α·Σ|S_i| times that."""
    if layer.scale == "static":
        return np.zeros_like(result.output)
    _, alpha = reference.binarize_weights(layer.weight(unit=False))
    first = result.beta[..., 0]
    if layer.lead is not None:
        first = first[..., None] if layer.scale == "patch" else first.reshape(-1, *(1,) * len(layer.lead))
        return MEAN_ERROR * first * alpha * np.abs(result.sums).sum(0)
    if layer.scale == "patch":
        first = np.moveaxis(np.repeat(first, layer.filters, axis=-1), -1, 1)
    else:
        first = first.reshape(-1, 1, 1, 1)
    return MEAN_ERROR * first * alpha[:, None, None] * np.abs(result.sums).sum(0)


# --- The other levels of x86 ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("target", ["x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4", "x86-64-v4-vpopcntdq"])
def test_every_level_agrees(target: str) -> None:
    """Each has kernels of its own for counting bits."""
    drawn = one_draw()
    images = [layer.image() for layer in drawn]
    compiled, fed = with_given_scales(drawn, target)
    try:
        model = compiled.load()
    except HorqError as error:
        pytest.skip(str(error))
    for layer, y, result in exact_results(drawn, images, model, fed, given_beta=1.0):
        np.testing.assert_array_equal(y, result.sums.sum(axis=0), err_msg=str(layer))
    check_general(drawn, with_own_scales(drawn, target).load(), images)


def one_draw() -> list[Drawn]:
    """The last of the sweep's draws."""
    found: list[Drawn] = []

    @SWEEP
    @given(draws(least_row=9))
    def keep(drawn: list[Drawn]) -> None:
        found[:] = drawn

    keep()
    return found


# --- Values at the edges of float32 -----------------------------------------------------------------------------------

EDGE_LAYERS = [
    Drawn(33, 20, 3, scale, size=(2, 4, 5), kernel=(3, 3), padding=(1, 1, 1, 1), groups=groups, relu=relu, seed=seed)
    for seed, (scale, groups, relu) in enumerate(
        [
            ("sample", 1, False),
            ("sample", 2, True),
            ("static", 1, False),
            ("static", 2, True),
            ("patch", 1, False),
            ("patch", 2, True),
        ]
    )
] + [Drawn(70, 20, 2, scale, lead=(2, 3), seed=9) for scale in ("patch", "sample", "static")]


def subnormals(layer: Drawn) -> Float32:
    """Multiples of the smallest subnormal, of either sign, zeros among them."""
    rng = np.random.default_rng(layer.seed)
    return (rng.integers(-(2**20), 2**20, layer.input_shape) * 2.0**-149).astype("float32")


def signed_zeros(layer: Drawn) -> Float32:
    """Normal values, and zeros of either sign in a third of the places each."""
    rng = np.random.default_rng(layer.seed)
    zeros = np.where(rng.random(layer.input_shape) < 0.5, np.float32(0), np.float32(-0.0))
    return np.where(rng.random(layer.input_shape) < 2 / 3, zeros, layer.image())


def huge(layer: Drawn) -> Float32:
    """Up to 1e34, which leaves room for α and S."""
    return (1e34 * np.tanh(layer.image())).astype("float32")


EDGE_INPUTS: dict[str, Callable[[Drawn], Float32]] = {
    "zeros of both signs among others": signed_zeros,
    "zeros": lambda layer: np.zeros(layer.input_shape, "float32"),
    "negative zeros": lambda layer: np.full(layer.input_shape, -0.0, "float32"),
    "huge": huge,
}


@pytest.fixture(scope="module")
def exact_edge_model() -> tuple[LoadedModel, list[list[int]]]:
    compiled, fed = with_given_scales(EDGE_LAYERS)
    return compiled.load(), fed


@pytest.fixture(scope="module")
def edge_model() -> LoadedModel:
    return with_own_scales(EDGE_LAYERS).load()


@pytest.mark.parametrize("kind", EDGE_INPUTS)
def test_edges_of_float32(
    kind: str, exact_edge_model: tuple[LoadedModel, list[list[int]]], edge_model: LoadedModel
) -> None:
    images = [EDGE_INPUTS[kind](layer) for layer in EDGE_LAYERS]
    for layer, y, result in exact_results(EDGE_LAYERS, images, *exact_edge_model, given_beta=1.0):
        np.testing.assert_array_equal(y, result.sums.sum(axis=0), err_msg=str(layer))
    check_general(EDGE_LAYERS, edge_model, images)


def test_subnormals(exact_edge_model: tuple[LoadedModel, list[list[int]]]) -> None:
    """No engine may take them for zero: neither inputs, nor β, nor outputs. There is no bias, which would hide them."""
    images = [subnormals(layer) for layer in EDGE_LAYERS]
    given_beta = 2.0**-131  # the magnitude of the inputs
    for layer, y, result in exact_results(EDGE_LAYERS, images, *exact_edge_model, given_beta=given_beta):
        np.testing.assert_array_equal(y, result.output, err_msg=str(layer))
        if layer.scale != "static":
            assert np.any(result.planes[0] != result.planes[-1]), str(layer)
            np.testing.assert_array_equal(y, result.sums.sum(axis=0) * given_beta, err_msg=str(layer))
    unbiased = [replace(layer, biased=False) for layer in EDGE_LAYERS]
    outputs = with_own_scales(unbiased).load()(*images)
    for index, (layer, x) in enumerate(zip(unbiased, images, strict=True)):
        beta = outputs.get(f"beta_{index}")
        y, shared = layer.in_reference_layout(outputs[f"y{index}"]), layer.expected(x, unit=False, beta=beta)
        assert_within(y, shared.output, shared.tolerance, str(layer))
        if beta is not None:
            assert 0 < beta[..., 0].min() <= beta[..., 0].max() < np.finfo("float32").smallest_normal
            assert_means(shared.beta, layer.expected(x, unit=False).beta, layer, least=2.0**-149)
