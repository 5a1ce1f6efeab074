"""The oracle against loops over scalars that follow the formulas word for word, and what it says of wrong calls."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horq_tvm import reference
from horq_tvm.errors import UsageError

F32 = np.float32
SCALES = ("patch", "sample", "static")


# --- The formulas, one scalar at a time ---


def _sign(v: float) -> int:
    return 1 if v >= 0 else -1


def _mean_abs(values: list[np.float32]) -> np.float32:
    return F32(sum(abs(float(v)) for v in values) / len(values))


def _means(values: list[np.float32], order: int) -> list[np.float32]:
    """β_1..β_K of one row or image."""
    betas = []
    for _ in range(order):
        betas.append(_mean_abs(values))
        values = [F32(v - F32(betas[-1] * _sign(v))) for v in values]
    return betas


def _planes(value: np.float32, betas: list[np.float32]) -> list[int]:
    """H_1..H_K of one value."""
    planes = []
    for beta in betas:
        planes.append(_sign(value))
        value = F32(value - F32(beta * planes[-1]))
    return planes


def _conv(x, weight, alpha, static, bias, order, scale, strides, padding, dilation, groups):
    """(output, sums) of a convolution by loops."""
    n_, _, h_, w_ = x.shape
    f_, cg, kh, kw = weight.shape
    ho = (h_ + padding[0] + padding[2] - dilation[0] * (kh - 1) - 1) // strides[0] + 1
    wo = (w_ + padding[1] + padding[3] - dilation[1] * (kw - 1) - 1) // strides[1] + 1
    output = np.zeros((n_, f_, ho, wo), F32)
    sums = np.zeros((order, n_, f_, ho, wo), np.int32)
    for n, f, y, z in itertools.product(range(n_), range(f_), range(ho), range(wo)):
        row, signs = [], []
        for c, i, j in itertools.product(range(cg), range(kh), range(kw)):
            yy, zz = y * strides[0] + i * dilation[0] - padding[0], z * strides[1] + j * dilation[1] - padding[1]
            inside = 0 <= yy < h_ and 0 <= zz < w_
            if inside or scale == "patch":
                row.append(x[n, f // (f_ // groups) * cg + c, yy, zz] if inside else F32(0))
                signs.append(int(weight[f, c, i, j]))
        if scale == "patch":
            betas = _means(row, order)
        else:
            betas = _means(list(x[n].reshape(-1)), order) if scale == "sample" else list(static)
        total = F32(0)
        for k in range(order):
            sums[k, n, f, y, z] = sum(_planes(v, betas)[k] * s for v, s in zip(row, signs, strict=True))
            total = F32(total + F32(betas[k] * F32(sums[k, n, f, y, z])))
        output[n, f, y, z] = F32(F32(total * alpha[f]) + bias[f])
    return output, sums


CONVOLUTIONS: list[dict[str, Any]] = [
    {},
    {"strides": (2, 1)},
    {"padding": (1, 0, 2, 3)},
    {"dilation": (2, 1), "padding": (1, 1, 1, 1)},
    {"groups": 2, "padding": (0, 2, 1, 0)},
    {"groups": 4, "strides": (1, 2), "dilation": (1, 2), "padding": (2, 1, 0, 1)},
]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("geometry", CONVOLUTIONS, ids=str)
def test_conv2d_follows_the_formulas(scale, geometry):
    rng = np.random.default_rng(7)
    geometry = {"strides": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1), "groups": 1} | geometry
    x = rng.standard_normal((2, 4, 5, 6)).astype(F32)
    weight, alpha = reference.binarize_weights(rng.standard_normal((4, 4 // geometry["groups"], 3, 2)))
    bias = rng.standard_normal(4).astype(F32)
    static = np.array([0.8, 0.4, 0.2], F32)
    got = reference.conv2d(
        x, weight, alpha, static if scale == "static" else None, bias, order=3, scale=scale, **geometry
    )
    output, sums = _conv(x, weight, alpha, static, bias, 3, scale, **geometry)
    np.testing.assert_array_equal(got.sums, sums)
    np.testing.assert_array_equal(got.output, output)
    assert got.output.dtype == got.beta.dtype == got.tolerance.dtype == F32
    assert got.sums.dtype == np.int32
    assert got.planes.dtype == np.int8


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3)], ids=str)
def test_dense_follows_the_formulas(scale, lead):
    rng = np.random.default_rng(11)
    x = rng.standard_normal((*lead, 7)).astype(F32)
    weight, alpha = reference.binarize_weights(rng.standard_normal((5, 7)))
    bias = rng.standard_normal(5).astype(F32)
    static = np.array([0.8, 0.4], F32)
    got = reference.dense(x, weight, alpha, static if scale == "static" else None, bias, order=2, scale=scale)
    assert got.output.shape == (*lead, 5)
    assert got.sums.shape == (2, *lead, 5)
    images = x.reshape(lead[0] if lead else 1, -1, 7)
    output, sums = got.output.reshape(*images.shape[:2], 5), got.sums.reshape(2, *images.shape[:2], 5)
    for n, m in np.ndindex(images.shape[:2]):
        row = list(images[n, m])
        over = {"patch": row, "sample": list(images[n].reshape(-1))}
        betas = list(static) if scale == "static" else _means(over[scale], 2)
        planes = np.array([_planes(v, betas) for v in row])
        expected = weight.astype(int) @ planes
        np.testing.assert_array_equal(sums[:, n, m], expected.T)
        total = betas[0] * expected[:, 0].astype(F32) + betas[1] * expected[:, 1].astype(F32)
        np.testing.assert_array_equal(output[n, m], total * alpha + bias)


def test_the_scales_of_each_kind_have_the_documented_shape():
    x = np.random.default_rng(0).standard_normal((2, 6, 5, 5)).astype(F32)
    weight = np.ones((4, 3, 3, 3))
    ones = np.ones(4)
    shapes = {"patch": (2, 3, 3, 2, 3), "sample": (2, 3), "static": (3,)}
    for scale, shape in shapes.items():
        beta = [1.0, 0.5, 0.25] if scale == "static" else None
        got = reference.conv2d(x, weight, ones, beta, order=3, scale=scale, groups=2)
        assert got.beta.shape == shape
        assert got.planes.shape == ((3, 2, 3, 3, 2, 27) if scale == "patch" else (3, *x.shape))
    np.testing.assert_array_equal(
        reference.patch_scales(x, 3, (3, 3), groups=2),
        reference.conv2d(x, weight, ones, order=3, scale="patch", groups=2).beta,
    )


@pytest.mark.parametrize("scale", SCALES)
def test_a_given_beta_replaces_the_means(scale):
    x = np.random.default_rng(1).standard_normal((2, 3, 4, 4)).astype(F32)
    weight = reference.sign(np.random.default_rng(2).standard_normal((5, 3, 3, 3)))
    shape = {"patch": (2, 4, 4, 1, 2), "sample": (2, 2), "static": (2,)}[scale]
    got = reference.conv2d(x, weight, np.ones(5), np.ones(shape), order=2, scale=scale, padding=(1, 1, 1, 1))
    np.testing.assert_array_equal(got.output, got.sums.sum(axis=0))
    assert not got.doubtful.any()


def test_a_padded_position_is_a_zero_of_the_row_for_patch_and_nothing_for_the_others():
    x, weight = np.full((1, 1, 1, 1), -2, F32), np.ones((1, 1, 3, 3))
    padding = (1, 1, 1, 1)
    patch = reference.conv2d(x, weight, [1.0], order=1, scale="patch", padding=padding)
    assert patch.sums.item() == 8 - 1
    assert patch.beta.item() == F32(2 / 9)
    sample = reference.conv2d(x, weight, [1.0], order=1, scale="sample", padding=padding)
    assert sample.sums.item() == -1
    assert sample.beta.item() == 2


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_conv2d_of_the_planes_is_a_convolution_of_their_weighted_sum(data):
    """On drawn geometry: Y = α·conv(Σ β_i·H_i, B) + bias, by a float64 convolution that knows nothing of planes."""
    draw = data.draw
    groups, cg, fg = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 3))
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    geometry = {
        "strides": draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        "padding": draw(st.tuples(*[st.integers(0, 3)] * 4)),
        "dilation": draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        "groups": groups,
    }
    order, scale = draw(st.integers(1, 4)), draw(st.sampled_from(["sample", "static"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = rng.standard_normal((draw(st.integers(1, 3)), groups * cg, 5 + kernel[0], 5 + kernel[1])).astype(F32)
    weight, alpha = reference.binarize_weights(rng.standard_normal((groups * fg, cg, *kernel)))
    bias = rng.standard_normal(groups * fg).astype(F32)
    static = 0.8 * 0.5 ** np.arange(order) if scale == "static" else None
    got = reference.conv2d(x, weight, alpha, static, bias, order=order, scale=scale, **geometry)

    beta = (got.beta.T if scale == "sample" else got.beta).reshape(order, -1, 1, 1, 1).astype(np.float64)
    rows = reference.patches((beta * got.planes).sum(axis=0), kernel, **geometry)
    filters = weight.transpose(0, 2, 3, 1).reshape(groups, fg, -1)
    y = np.einsum("nyxgl,gfl->ngfyx", rows, filters).reshape(got.output.shape)
    y = y * alpha[:, None, None] + bias[:, None, None]
    assert (np.abs(y - got.output) <= got.tolerance).all()


# --- Signs, zeros, subnormals ---


def test_both_zeros_are_positive():
    np.testing.assert_array_equal(reference.sign([0.0, -0.0, 1e-45, -1e-45]), [1, 1, 1, -1])
    weight, alpha = reference.binarize_weights([[0.0, -0.0, -1.0]])
    np.testing.assert_array_equal(weight, [[1, 1, -1]])
    np.testing.assert_array_equal(alpha, [F32(1 / 3)])


@pytest.mark.parametrize("scale", ["patch", "sample"])
def test_zero_input_gives_exactly_the_bias(scale):
    weight = reference.sign(np.random.default_rng(3).standard_normal((4, 3, 3, 3)))
    got = reference.conv2d(
        np.zeros((1, 3, 4, 4)), weight, np.ones(4), None, [0, 1, -2, 3], order=4, scale=scale, padding=(1, 1, 1, 1)
    )
    assert (got.planes == 1).all()
    assert not got.beta.any()
    assert not got.doubtful.any()
    np.testing.assert_array_equal(got.output, np.broadcast_to(np.reshape([0, 1, -2, 3], (1, 4, 1, 1)), (1, 4, 4, 4)))


@pytest.mark.parametrize("scale", SCALES)
def test_subnormals_are_numbers_like_others(scale):
    """Scaled into the subnormals by a power of two where every step is exact, a layer gives the scaled result."""
    x = np.array([[3.0, 1.0, -1.0, -3.0], [6.0, 2.0, -2.0, -6.0]], F32)
    weight, tiny = np.array([[1, -1, 1, 1], [1, 1, -1, -1]]), F32(2.0**-140)
    beta = np.array([2.0, 1.0], F32)
    plain = reference.dense(x, weight, np.ones(2), beta if scale == "static" else None, order=2, scale=scale)
    small = reference.dense(
        x * tiny, weight, np.ones(2), beta * tiny if scale == "static" else None, order=2, scale=scale
    )
    np.testing.assert_array_equal(small.planes, plain.planes)
    np.testing.assert_array_equal(small.beta, plain.beta * tiny)
    np.testing.assert_array_equal(small.output, plain.output * tiny)
    assert small.output.any()
    assert (small.tolerance > 0).all()


# --- Doubt and tolerance ---


@pytest.mark.parametrize("scale", ["patch", "sample"])
def test_a_residual_near_zero_is_doubtful_and_no_other(scale):
    # Means 1.0 then 0.5: at 1 + 1e-7 and at 1 the residual R_1 is as good as zero.
    x = np.array([[0.5, 1.0 + 1.2e-7, 1.5, -1.0, 0.0, 2.0 - 1.2e-7]], F32)
    got = reference.dense(x, np.ones((1, 6)), [1.0], order=2, scale=scale)
    np.testing.assert_allclose(got.beta.reshape(-1), [1.0, 0.5], atol=1e-6)
    np.testing.assert_array_equal(got.doubtful_signs, [[False, True, False, True, False, False]])
    assert got.doubtful.all()
    once = reference.dense(x, np.ones((1, 6)), [1.0], order=1, scale=scale)
    assert not once.doubtful_signs.any(), "H_1 is the sign of the input, which is given"


def test_doubt_reaches_only_the_windows_that_hold_it():
    x = np.full((1, 2, 4, 4), 0.5, F32)
    x[0, :, 1::2] = 1.5
    x[0, 0, 0, 0] = 1.0  # the mean: R_1 = 0
    got = reference.conv2d(x, np.ones((4, 1, 2, 2)), np.ones(4), order=2, scale="sample", groups=2)
    x[0, 0, 0, 0] = 0.5
    assert got.beta[0, 0] == F32(1 + 0.5 / 32)
    assert not got.doubtful.any()
    clear = reference.conv2d(x, np.ones((4, 1, 2, 2)), np.ones(4), order=2, scale="sample", groups=2)
    assert not clear.doubtful.any()
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 1.0, 0.0
    got = reference.conv2d(x, np.ones((4, 1, 2, 2)), np.ones(4), order=2, scale="sample", groups=2)
    assert got.beta[0, 0] == 1
    expected = np.zeros((1, 4, 3, 3), bool)
    expected[0, :2, 0, 0] = True
    np.testing.assert_array_equal(got.doubtful, expected)


def test_an_engine_with_float32_means_differs_only_where_a_sign_is_doubtful():
    """Means off by a unit or two in the last place, and many values within a few units of the first of them."""
    rng = np.random.default_rng(12)
    drawn = rng.standard_normal(4096).astype(F32)
    near = np.abs(drawn).mean(dtype=np.float64) * (1 + rng.integers(-8, 9, 512) * 2.0**-23)
    x = np.concatenate([drawn, near.astype(F32)])[None]
    got = reference.dense(x, np.ones((1, x.size)), [1.0], order=4, scale="sample")
    flipped = np.zeros(x.shape, bool)
    for units in (-2, -1, 1, 2):
        beta = got.beta * F32(1 + units * 2.0**-23)
        planes, _ = reference.residual_binarize(x, 4, beta.T[..., None])
        flipped |= (planes != got.planes).any(axis=0)
    assert flipped.sum() > 100
    assert not (flipped & ~got.doubtful_signs).any()
    assert got.doubtful_signs.mean() < 0.2


def test_the_tolerance_is_the_contract_s():
    x = np.random.default_rng(5).standard_normal((3, 8)).astype(F32)
    weight, alpha = reference.binarize_weights(np.random.default_rng(6).standard_normal((2, 8)))
    bias = np.array([0.25, -4.0], F32)
    got = reference.dense(x, weight, -alpha, None, bias, order=3, scale="sample")
    terms = [np.abs(alpha * got.beta[:, i, None] * got.sums[i]) for i in range(3)]
    np.testing.assert_allclose(got.tolerance, 5 * 2.0**-23 * (sum(terms) + np.abs(bias)), rtol=1e-6)


# --- Static scales ---


@pytest.mark.parametrize(("order", "least"), [(1, 0.0), (2, 0.09), (3, 0.35), (4, 0.5)])
def test_fitted_scales_beat_the_means_on_gaussian_data(order, least):
    """At order 3 by 37%, at no cost at run time."""
    x = np.random.default_rng(0).standard_normal(200_000).astype(F32)

    def error(beta: np.ndarray) -> float:
        return float(np.square(reference.residual_binarize(x, order, beta)[1], dtype=np.float64).sum())

    fitted = reference.fit_static_scales(x, order)
    means = reference.sample_scales(x[None], order)[0]
    assert fitted.dtype == np.float64
    np.testing.assert_array_equal(fitted, fitted.astype(F32))
    gain = 1 - error(fitted) / error(means)
    assert least - 1e-6 <= gain < least + 0.1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=30), st.integers(1, 8))
def test_fitted_scales_are_never_worse_than_the_means(values, order):
    x = np.array(values, F32)

    def error(beta: np.ndarray) -> float:
        planes, _ = reference.residual_binarize(x, order, beta)
        return float(np.square(x.astype(np.float64) - beta.astype(np.float64) @ planes).sum())

    fitted = reference.fit_static_scales(x, order)
    assert (fitted >= 0).all()
    assert error(fitted) <= error(reference.sample_scales(x[None], order)[0]) + 1e-9 * (x.astype(np.float64) @ x)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=30), st.data())
def test_every_sign_vector_is_an_interval_of_sorted_values(values, data):
    """What `fit_static_scales` bisects by: the edges it finds are where the planes of the chain change."""
    order = data.draw(st.integers(1, 5))
    beta = np.array(data.draw(st.lists(st.floats(0, 2, width=32), min_size=order, max_size=order)), F32)
    x = np.sort(np.array(values, F32))
    planes, _ = reference.residual_binarize(x, order, beta)
    cells = (planes > 0).T @ (1 << np.arange(order)[::-1])
    np.testing.assert_array_equal(np.diff(reference._cell_edges(x, beta)), np.bincount(cells, minlength=2**order))


# --- Packed planes ---


@pytest.mark.parametrize("word_bits", [8, 16, 32, 64])
@pytest.mark.parametrize("channels", [1, 8, 31, 33, 64, 70])
def test_bit_i_of_word_j_is_channel_w_j_plus_i(word_bits, channels):
    planes = reference.sign(np.random.default_rng(channels).standard_normal((2, 3, channels)))
    words = reference.pack_planes(planes, word_bits)
    assert words.dtype == np.dtype(f"u{word_bits // 8}")
    assert words.shape == (2, 3, -(-channels // word_bits))
    for at in np.ndindex(2, 3):
        bits = sum(int(word) << (word_bits * j) for j, word in enumerate(words[at]))
        assert bits == sum(1 << c for c in range(channels) if planes[(*at, c)] > 0)


def test_images_are_packed_by_group_and_plane():
    planes = reference.sign(np.random.default_rng(0).standard_normal((2, 3, 80, 4, 5)))
    words = reference.pack_images(planes, groups=2)
    assert words.shape == (3, 4, 5, 2, 2, 2)
    for k, n, c, y, x in [(0, 0, 0, 0, 0), (1, 2, 79, 3, 4), (1, 0, 39, 2, 1), (0, 1, 40, 1, 3), (1, 1, 72, 0, 2)]:
        group, channel = divmod(c, 40)
        bit = words[n, y, x, group, k, channel // 32] >> np.uint32(channel % 32) & 1
        assert bit == (planes[k, n, c, y, x] > 0)


def test_rows_are_packed_tap_by_tap():
    x = np.random.default_rng(1).standard_normal((1, 6, 3, 3)).astype(F32)
    got = reference.conv2d(x, np.ones((2, 3, 2, 2)), np.ones(2), order=2, scale="patch", groups=2)
    words = reference.pack_rows(got.planes, taps=4)
    assert words.shape == (1, 2, 2, 2, 2, 4)
    for tap, channel in itertools.product(range(4), range(3)):
        bits = words[..., tap] >> np.uint32(channel) & 1
        np.testing.assert_array_equal(bits, np.moveaxis(got.planes, 0, -2)[..., tap * 3 + channel] > 0)


# --- Wrong calls ---

X, W, ONE = np.ones((1, 2, 3, 3), F32), np.ones((1, 2, 1, 1)), np.ones(1)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: reference.conv2d(X, W, ONE, order=0, scale="sample"), "order: found 0; accepted are 1 to 8"),
        (lambda: reference.conv2d(X, W, ONE, order=9, scale="sample"), "order: found 9"),
        (lambda: reference.conv2d(X, W, ONE, order=1, scale="layer"), "scale: found 'layer'"),
        (lambda: reference.conv2d(X[0], W, ONE, order=1, scale="sample"), r"x: found shape \[2, 3, 3\]"),
        (lambda: reference.conv2d(X, 2 * W, ONE, order=1, scale="sample"), "weight: found values other than ±1"),
        (lambda: reference.conv2d(X, W, ONE, order=1, scale="sample", groups=2), r"weight: found shape \[1, 2, 1, 1\]"),
        (lambda: reference.conv2d(X, W, np.ones(2), order=1, scale="sample"), r"alpha: found shape \[2\]"),
        (lambda: reference.conv2d(X, W, ONE, None, np.ones(3), order=1, scale="sample"), r"bias: found shape \[3\]"),
        (lambda: reference.conv2d(X, W, ONE, order=2, scale="static"), "beta: found none; .* 2 constants"),
        (lambda: reference.conv2d(X, W, ONE, [1.0], order=2, scale="static"), r"beta: found shape \[1\]"),
        (lambda: reference.conv2d(X, W, ONE, order=1, scale="sample", padding=(1, 1)), r"padding: found \[1, 1\]"),
        (lambda: reference.conv2d(X, W, ONE, order=1, scale="sample", strides=(0, 1)), r"strides: found \[0, 1\]"),
        (lambda: reference.conv2d(X, np.ones((1, 2, 4, 1)), ONE, order=1, scale="patch"), r"span of \[4, 1\]"),
        (lambda: reference.dense(X, np.ones((1, 4)), ONE, order=1, scale="patch"), "for 3 input channels in 1 groups"),
        (lambda: reference.residual_binarize(X, 2, np.ones((3, 1))), r"beta: found shape \[3, 1\]"),
        (lambda: reference.fit_static_scales([np.nan], 1), "not finite"),
        (lambda: reference.pack_planes(np.ones((1, 3)), 24), "word_bits: found 24"),
    ],
)  # fmt: skip
def test_a_wrong_call_says_what_was_found_and_what_is_accepted(call, says):
    with pytest.raises(UsageError, match=says):
        call()


def test_it_needs_numpy_alone():
    """The oracle must not share code, or a mistake, with what it judges."""
    code = (
        "import sys, horq_tvm.reference\n"
        "bad = {'tvm', 'torch', 'onnx', 'onnxruntime'} & {m.partition('.')[0] for m in sys.modules}\n"
        "sys.exit(', '.join(sorted(bad)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
