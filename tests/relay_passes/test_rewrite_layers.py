"""RewriteLayers: the dialect it emits, what it shares, what it taps, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from horq_tvm import ops
from horq_tvm.errors import HorqError, UsageError
from horq_tvm.relay_passes.rewrite_layers import RewriteLayers, binary_weight
from horq_tvm.specs import LayerConfig
from horq_tvm.straightline import constant, read_main
from tests.relay_passes.program import module, names, run

SAMPLE = LayerConfig(2, "sample")
RNG = np.random.default_rng(0)
W = RNG.standard_normal((6, 3, 3, 8)).astype("float32")
V = RNG.standard_normal((5, 1, 1, 8)).astype("float32")
DENSE = RNG.standard_normal((4, 8)).astype("float32")
X = (2, 5, 7, 8)
PADDING = (1, 1, 1, 1)


def two_convs(emit: Any, x: relax.Expr) -> Any:
    first = emit(ops.conv2d(x, constant(W), name="a", padding=PADDING))
    return first, emit(ops.conv2d(x, constant(V), name="b"))


def test_weights_become_signs_with_a_positive_zero_and_alpha_rounded_once() -> None:
    weight = np.array([[0.0, -0.0, -3.0], [1e-30, -1.0, 0.1]], "float32")
    signs, alpha = binary_weight(weight)
    assert signs.dtype == np.int8
    assert signs.tolist() == [[1, 1, -1], [1, -1, 1]]
    assert alpha.dtype == np.float64
    assert alpha[0] == 1.0
    assert alpha[1] == np.float32((np.float64(np.float32(1e-30)) + 1 + np.float64(np.float32(0.1))) / 3)


def test_golden_form_with_two_layers_sharing_scales_and_planes() -> None:
    def expected(emit: Any, x: relax.Expr) -> Any:
        beta = emit(ops.scales(x, order=2, scale="sample", geometry=ops.Geometry((1, 1))))
        planes = emit(ops.binarize(x, beta, order=2, scale="sample", geometry=ops.Geometry((1, 1))))
        outputs = []
        for name, weight, geometry in (("a", W, ops.Geometry((3, 3), padding=PADDING)), ("b", V, ops.Geometry((1, 1)))):
            signs, alpha = binary_weight(weight)
            constants = [constant(signs), constant(alpha), constant(np.zeros(len(weight)))]
            how: dict[str, Any] = {"name": name, "order": 2, "scale": "sample", "geometry": geometry}
            outputs.append(emit(ops.bitserial(planes, *constants, beta, **how)))
        return tuple(outputs)

    after = RewriteLayers({"a": SAMPLE, "b": SAMPLE})(module([X], two_convs))
    tvm.ir.assert_structural_equal(after, module([X], expected))


def test_layers_without_a_config_stay_as_they_are() -> None:
    before = module([X], two_convs)
    tvm.ir.assert_structural_equal(RewriteLayers({})(before), before)
    assert names(RewriteLayers({"b": SAMPLE})(before))[0] == "horq.conv2d"


@pytest.mark.parametrize(
    ("a", "b", "binarized"),
    [
        (SAMPLE, LayerConfig(3, "sample"), 2),
        (LayerConfig(2, "patch"), LayerConfig(2, "patch"), 2),  # other windows
        (LayerConfig(1, "static", (0.5,)), LayerConfig(1, "static", (0.5,)), 1),
        (LayerConfig(1, "static", (0.5,)), LayerConfig(1, "static", (0.25,)), 2),
    ],
)
def test_sharing_asks_for_equal_order_scale_and_window(a: LayerConfig, b: LayerConfig, binarized: int) -> None:
    after = names(RewriteLayers({"a": a, "b": b})(module([X], two_convs)))
    assert after.count("horq.binarize") == binarized
    assert after.count("horq.scales") == (0 if a.scale == "static" else binarized)


def test_equal_windows_share_with_patch_and_unequal_groups_never_share() -> None:
    def same_window(emit: Any, x: relax.Expr) -> Any:
        return emit(ops.conv2d(x, constant(W), name="a")), emit(ops.conv2d(x, constant(-W), name="b"))

    def other_groups(emit: Any, x: relax.Expr) -> Any:
        grouped = emit(ops.conv2d(x, constant(W[..., :4]), name="b", groups=2))
        return emit(ops.conv2d(x, constant(W), name="a")), grouped

    patch = {"a": LayerConfig(2, "patch"), "b": LayerConfig(2, "patch")}
    assert names(RewriteLayers(patch)(module([X], same_window))).count("horq.binarize") == 1
    after = names(RewriteLayers({"a": SAMPLE, "b": SAMPLE})(module([X], other_groups)))
    assert (after.count("horq.scales"), after.count("horq.binarize")) == (1, 2)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 5, 8), (2, 3, 5, 8)])
@pytest.mark.parametrize("scale", ["patch", "sample"])
def test_dense_keeps_its_shape_and_takes_scales_by_row_or_by_image(shape: tuple[int, ...], scale: Any) -> None:
    before = module([shape], lambda emit, x: emit(ops.dense(x, constant(DENSE), name="d")))
    after = RewriteLayers({"d": LayerConfig(1, scale)})(before)
    x = RNG.standard_normal(shape).astype("float32")
    axes = (-1,) if scale == "patch" or x.ndim == 1 else tuple(range(1, x.ndim))
    beta = np.abs(x.astype("float64")).mean(axes, keepdims=True).astype("float32")
    signs, alpha = binary_weight(DENSE)
    expected = alpha * (beta.astype("float64") * (np.where(x >= 0, 1, -1) @ signs.T))
    (output,) = run(after, x)
    np.testing.assert_allclose(output, expected, rtol=1e-12)


def test_taps_return_input_beta_planes_and_output_under_recorded_names() -> None:
    def scaled(emit: Any, x: relax.Expr) -> Any:
        y = emit(ops.conv2d(x, constant(W), name="a"))
        return emit(relax.op.multiply(y, constant(np.float32([3.0]))))

    configs = {"a": LayerConfig(2, "static", (0.75, 0.25))}
    after = RewriteLayers(configs, taps=["a"])(module([X], scaled))
    assert list(after.attrs["horq.tap_names"]) == ["tap.a.input", "tap.a.beta", "tap.a.planes", "tap.a.output"]
    x = RNG.standard_normal(X).astype("float32")
    output, tap_x, beta, planes, tap_output = run(after, x)
    np.testing.assert_array_equal(tap_x, x)
    np.testing.assert_array_equal(beta, np.float32([[0.75, 0.25]]))
    assert planes.shape == (2, 5, 7, 1, 2, 1)
    np.testing.assert_array_equal(output, 3 * tap_output)


def test_a_tapped_output_is_behind_the_affines_of_its_own_node() -> None:
    """α and bias are the layer's own, what follows is not; a reshape between does not count."""
    alpha, bias, shift = (constant(RNG.standard_normal(6).astype("float32")) for _ in range(3))

    def trained(emit: Any, x: relax.Expr) -> Any:
        y = emit(ops.conv2d(x, constant(W), name="a", padding=PADDING, affines=2))
        line = emit(relax.op.reshape(y, (2, 35, 6)))
        own = emit(relax.op.add(emit(relax.op.multiply(line, alpha)), bias))
        return emit(relax.op.add(own, shift)), own

    def only_the_shift(emit: Any, x: relax.Expr) -> Any:
        return trained(emit, x)[0]

    x = RNG.standard_normal(X).astype("float32")
    config = {"a": LayerConfig(2, "static", (0.75, 0.25))}
    own = run(RewriteLayers(config)(module([X], trained)), x)[1]
    tapped = run(RewriteLayers(config, taps=["a"])(module([X], only_the_shift)), x)[-1]
    np.testing.assert_array_equal(tapped, own)


def test_one_tap_of_a_tuple_is_appended_to_it() -> None:
    after = RewriteLayers({"a": SAMPLE, "b": SAMPLE}, taps=["b"])(module([X], two_convs))
    result = read_main(after).result
    assert len(result.fields) == 6


def test_mistakes_name_the_layer_and_what_there_is() -> None:
    mod = module([X], two_convs)
    with pytest.raises(UsageError, match=r"cannot tap b: .* layers that can be tapped: a"):
        RewriteLayers({"a": SAMPLE}, taps=["b"])
    with pytest.raises(HorqError, match="no layer c to rewrite; layers in the module: a, b"):
        RewriteLayers({"c": SAMPLE})(mod)
    with pytest.raises(UsageError, match="layer a: static scale of order 2 needs 2 finite betas, found none"):
        RewriteLayers({"a": LayerConfig(2, "static")})(mod)
    with pytest.raises(UsageError, match=r"found \[1.0\]"):
        RewriteLayers({"a": LayerConfig(2, "static", (1.0,))})(mod)
