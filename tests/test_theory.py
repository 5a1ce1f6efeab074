"""The facts of docs/theory.md as properties of the oracle, and the page's own examples."""

from __future__ import annotations

import doctest
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from horq_tvm import reference

F32 = np.float32
ORDER = 4
SUBNORMAL = 2.0**-149
VALUES = st.floats(-1000, 1000, width=32, allow_subnormal=True)
IMAGES = hnp.arrays(
    F32, st.tuples(st.integers(1, 2), st.just(4), st.integers(3, 4), st.integers(2, 4)), elements=VALUES
)


def _images(x):
    """What `sample` takes its means over: rows [N,L] and their scales [N,K]."""
    return x.reshape(len(x), -1), reference.sample_scales(x, ORDER)


def _patches(x):
    """What `patch` takes its means over: padded rows of two groups."""
    geometry = ((3, 2), (1, 2), (1, 0, 2, 1), (1, 1), 2)
    scales = reference.patch_scales(x, ORDER, *geometry)
    rows = reference.patches(x, *geometry)
    return rows.reshape(-1, rows.shape[-1]), scales.reshape(-1, ORDER)


def _steps(x, scales):
    """(R_{i−1}, β_i, H_i, R_i) for each order, in float64, β with an axis for L."""
    planes, _ = reference.residual_binarize(x, ORDER, scales.T[..., None])
    before = x
    for i in range(ORDER):
        _, after = reference.residual_binarize(x, i + 1, scales.T[: i + 1, :, None])
        yield tuple(v.astype(np.float64) for v in (before, scales[:, i, None], planes[i], after))
        before = after


@pytest.mark.parametrize("rows_of", [_patches, _images], ids=["patch", "sample"])
@settings(max_examples=150, deadline=None)
@given(x=IMAGES)
def test_a_residual_is_orthogonal_to_its_plane(rows_of, x):
    for before, beta, plane, after in _steps(*rows_of(x)):
        # The subtraction and β are rounded, each by half a unit in the last place.
        rounding = (2.0**-24 * (np.abs(after) + beta) + SUBNORMAL).sum(axis=1)
        assert (np.abs((after * plane).sum(axis=1)) <= rounding).all()
        assert ((before >= 0) == (plane > 0)).all()


@pytest.mark.parametrize("rows_of", [_patches, _images], ids=["patch", "sample"])
@settings(max_examples=150, deadline=None)
@given(x=IMAGES)
def test_a_plane_takes_l_beta_squared_off_the_squared_norm(rows_of, x):
    for before, beta, _, after in _steps(*rows_of(x)):
        left = np.square(before).sum(axis=1) - before.shape[1] * np.square(beta[:, 0])
        rounding = 2.0**-21 * np.square(before).sum(axis=1) + 4 * SUBNORMAL * (np.abs(before) + beta).sum(axis=1)
        assert (np.abs(np.square(after).sum(axis=1) - left) <= rounding).all()


@pytest.mark.parametrize("rows_of", [_patches, _images], ids=["patch", "sample"])
@settings(max_examples=150, deadline=None)
@given(x=IMAGES)
def test_the_error_falls_with_every_order_and_at_least_geometrically(rows_of, x):
    for before, _, _, after in _steps(*rows_of(x)):
        norm, length = np.square(before).sum(axis=1), before.shape[1]
        clear = np.abs(before).max(axis=1) > 2.0**-100  # above the reach of subnormal rounding
        least = (1 - 1 / length + 2.0**-21) * norm
        assert (np.square(after).sum(axis=1) <= least)[clear].all()
        assert not after[norm == 0].any()


@settings(max_examples=100, deadline=None)
@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6))
def test_two_numbers_have_at_most_two_orders(a, b):
    """Exactly: integers of this size and their halves are float32."""
    x = np.array([[a, b]], F32)
    _, residual = reference.residual_binarize(x, 2, reference.sample_scales(x, 2).T[..., None])
    assert not residual.any()


def _exact_residuals(x: list[int], orders: int) -> list[list[Fraction]]:
    """R_1, ..., R_orders without rounding."""
    residual, found = [Fraction(v) for v in x], []
    for _ in range(orders):
        beta = sum(map(abs, residual), Fraction(0)) / len(residual)
        residual = [r - beta if r >= 0 else r + beta for r in residual]
        found.append(residual)
    return found


def test_three_numbers_may_have_infinitely_many_orders():
    """(3, 0, 0): R_3 = R_1/9, so a third of the residual is left at every order, and none is the last."""
    exact = _exact_residuals([3, 0, 0], 8)
    assert exact[:2] == [[2, -1, -1], [Fraction(2, 3), Fraction(1, 3), Fraction(1, 3)]]
    for earlier, later in zip(exact, exact[2:], strict=False):
        assert later == [r / 9 for r in earlier]
    x = np.array([[3, 0, 0]], F32)
    for order in range(1, 9):
        _, residual = reference.residual_binarize(x, order, reference.sample_scales(x, order).T[..., None])
        np.testing.assert_allclose(residual[0], [float(r) for r in exact[order - 1]], atol=1e-6)
        assert residual.all(), f"nothing is left at order {order}"


def test_the_talk_s_example():
    """0.76 estimated by 1.27875 at order 1 and by about 0.81 at order 3; four orders leave nothing of this vector."""
    x, w = np.array([1.1, 0.9, -0.8, 0.5]), np.array([-0.8, 0.7, -0.7, 0.9])
    assert x @ w == pytest.approx(0.76)
    weight, alpha = reference.binarize_weights(w[None])
    estimates = [reference.dense(x, weight, alpha, order=k, scale="patch").output.item() for k in (1, 2, 3, 4)]
    assert estimates == pytest.approx([1.27875, 1.0075, 0.81375, 0.8525], abs=1e-6)
    assert not any(_exact_residuals([11, 9, -8, 5], 4)[-1])


def test_a_constant_beta_may_enlarge_the_error():
    x = np.full(8, 0.1, F32)
    _, residual = reference.residual_binarize(x, 1, [1.0])
    assert np.linalg.norm(residual) > np.linalg.norm(x)
    assert residual @ np.ones(8) == pytest.approx(8 * (0.1 - 1.0))


def test_order_one_of_patch_is_xnor_net_where_nothing_is_padded():
    """(sign(X) ⊛ B) ⊙ K·α, K the box mean of mean|X| over channels: Rastegari et al., ECCV 2016, section 3.2."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 6, 5)).astype(F32)
    weight, alpha = reference.binarize_weights(rng.standard_normal((4, 3, 3, 2)))
    got = reference.conv2d(x, weight, alpha, order=1, scale="patch", strides=(2, 1))
    sums = reference.conv2d_sums(reference.sign(x)[None], weight, strides=(2, 1))[0]
    A = np.abs(x).mean(axis=1, keepdims=True, dtype=np.float64)
    K = reference.patches(A, (3, 2), (2, 1)).mean(axis=(-1, -2))[:, None]
    np.testing.assert_allclose(got.output, sums * K * alpha[:, None, None], rtol=1e-6)


def test_the_page_s_examples_are_what_the_code_prints():
    page = Path(__file__).parents[1] / "docs" / "theory.md"
    result = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert result.attempted >= 10
    assert result.failed == 0
