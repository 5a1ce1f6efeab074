"""The int8 oracle, held against what can be said of it without it."""

from __future__ import annotations

import numpy as np
import pytest

from horq_tvm import reference_int8 as int8


def test_by_hand() -> None:
    """s = 0.5, z = 3; the filter's largest weight is 127 steps of 0.25."""
    x = np.array([[[[1.0, -0.7], [0.25, 200.0]]]], "float32")  # 2, −1.4, 0.5 and 400 steps
    np.testing.assert_array_equal(int8.quantize(x, 0.5, 3), [[[[5, 2], [3, 255]]]])
    weight = np.array([[[[31.75, 0.25], [-0.5, 0.3]]]], "float32")
    integers, scale = int8.quantize_weights(weight)
    np.testing.assert_array_equal(integers, [[[[127, 1], [-2, 1]]]])
    np.testing.assert_array_equal(scale, [0.25])
    sums, output = int8.conv2d(x, weight, 0.5, 3)
    assert sums.item() == 2 * 127 - 1 * 1 + 0 * -2 + 252 * 1
    assert output.item() == sums.item() * 0.125


def test_halves_go_to_the_even_step_and_the_zero_point_comes_afterwards() -> None:
    halves = np.array([-1.5, -0.5, 0.5, 1.5, 2.5], "float32")
    for zero in (3, 4):
        np.testing.assert_array_equal(int8.quantize(halves, 1.0, zero), np.array([-2, 0, 0, 2, 2]) + zero)


def test_values_beyond_the_range_are_clipped() -> None:
    x = np.array([-np.inf, -1e30, 1e30, np.inf], "float32")
    np.testing.assert_array_equal(int8.quantize(x, 0.1, 7), [0, 0, 255, 255])


@pytest.mark.parametrize(
    ("low", "high", "zero"), [(0.0, 5.1, 0), (0.5, 5.1, 0), (-2.55, 2.55, 128), (-1.0, -0.5, 255), (-1.0, 3.0, 64)]
)
def test_the_range_holds_its_ends_and_zero(low: float, high: float, zero: int) -> None:
    scale, found = int8.activation_scale(low, high)
    assert found == zero
    ends = np.array([min(low, 0), 0.0, max(high, 0)], "float32")
    steps = int8.quantize(ends, scale, found).astype("float64") - found
    assert steps[1] == 0
    np.testing.assert_allclose(steps * scale, ends, atol=scale / 2 * 1.001)


@pytest.mark.parametrize("edge", [0.0, 1e-40])
def test_a_range_of_nothing_is_a_scale_of_one(edge: float) -> None:
    assert int8.activation_scale(-edge, edge) == (1.0, 0)


def test_a_range_that_is_not_finite_is_an_error() -> None:
    for edges in ((np.nan, 1.0), (0.0, np.inf)):
        with pytest.raises(ValueError, match="not finite"):
            int8.activation_scale(*edges)


def test_weights_are_within_half_a_step_and_a_filter_of_zeros_stays_zero() -> None:
    weight = np.random.default_rng(0).standard_normal((5, 7)).astype("float32")
    weight[2] = 0
    integers, scale = int8.quantize_weights(weight)
    assert np.abs(integers).max(axis=1).tolist() == [127, 127, 0, 127, 127]
    assert np.all(np.abs(integers * scale[:, None] - weight) <= scale[:, None] / 2 * (1 + 1e-12))


def test_padding_contributes_nothing() -> None:
    x = np.full((1, 2, 1, 1), 0.8, "float32")
    weight = np.random.default_rng(1).standard_normal((3, 2, 3, 3)).astype("float32")
    sums, _ = int8.conv2d(x, weight, 0.01, 100, padding=(1, 1, 1, 1))
    integers, _ = int8.quantize_weights(weight)
    np.testing.assert_array_equal(sums[0, :, 0, 0], 80 * integers[:, :, 1, 1].astype(int).sum(1))


def test_a_float_layer_is_as_close_as_its_steps_say() -> None:
    """|error| ≤ Σ (s/2·|W| + s_f/2·|x|) and the product of both halves, for every output."""
    rng = np.random.default_rng(2)
    x, weight = rng.standard_normal((4, 6)).astype("float32"), rng.standard_normal((3, 6)).astype("float32")
    scale, zero = int8.activation_scale(x.min(), x.max())
    _, output = int8.dense(x, weight, scale, zero)
    _, weight_scale = int8.quantize_weights(weight)
    half, weight_half = scale / 2, weight_scale[:, None] / 2
    bound = half * np.abs(weight).sum(1) + (np.abs(x) @ np.ones((6, 3))) * weight_half.T + 6 * half * weight_half.T
    assert np.all(np.abs(output - x.astype("float64") @ weight.T.astype("float64")) <= bound * (1 + 1e-5))
