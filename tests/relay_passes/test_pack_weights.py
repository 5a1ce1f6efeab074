"""PackWeights: the packed form means what the dialect meant, by border class, and has the documented layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from horq_tvm import ops
from horq_tvm.errors import HorqError
from horq_tvm.relay_passes.pack_weights import PackWeights, pack_bits
from horq_tvm.straightline import array_of, constant, op_name, read_main
from tests.relay_passes.program import Array, module, names, run

NO_PADDING = (0, 0, 0, 0)
G = ops.Geometry
SAME = G((3, 3), padding=(1, 1, 1, 1))


def lanes(filters: int, _groups: int) -> int:
    """Small enough that most layers need several blocks and lanes beyond the last filter."""
    return 4 if filters >= 4 else 2


@dataclass(frozen=True)
class Case:
    """A bitserial layer and the input it reads."""

    image: tuple[int, int, int] = (6, 5, 8)
    filters: int = 6
    geometry: ops.Geometry = SAME
    order: int = 2
    scale: str = "static"
    first: int = 0
    plain: bool = False  # β = 1, α = 1, bias 0: the output is ΣS_i

    def weight(self) -> Array:
        shape = (self.filters, *self.geometry.kernel, self.image[2] // self.geometry.groups)
        return np.random.default_rng(1).choice(np.array([-1, 1], "int8"), shape)

    def input(self) -> Array:
        x = np.random.default_rng(2).standard_normal((2, *self.image)).astype("float32")
        return np.abs(x) if self.first else x

    def module(self) -> tvm.IRModule:
        rng = np.random.default_rng(3)
        alpha = np.ones(self.filters) if self.plain else rng.uniform(0.5, 2, self.filters).astype("float32")
        bias = np.zeros(self.filters) if self.plain else rng.standard_normal(self.filters)
        betas = np.float32([[1.0] * self.order if self.plain else [0.7, 0.4, 0.2][: self.order]])
        how: dict[str, Any] = {"order": self.order, "scale": self.scale, "geometry": self.geometry}

        def body(emit: Any, x: relax.Expr) -> relax.Expr:
            beta = constant(betas) if self.scale == "static" else emit(ops.scales(x, **how))
            planes = emit(ops.binarize(x, beta, first=self.first, **how))
            constants = [constant(self.weight()), constant(alpha.astype("float64")), constant(bias.astype("float64"))]
            return emit(ops.bitserial(planes, *constants, beta, name="layer", first=self.first, **how))

        return module([(2, *self.image)], body)


CASES = {
    "plain 3x3": Case(),
    "odd channels give odd sums": Case(image=(6, 5, 3)),
    "odd channels, even taps": Case(image=(6, 5, 3), geometry=G((2, 2))),
    "no padding": Case(geometry=G((3, 3))),
    "asymmetric, strided, dilated": Case(geometry=G((3, 2), (2, 1), (2, 0, 1, 3), (2, 1))),
    "padding wider than the window": Case(image=(3, 3, 4), geometry=G((2, 2), padding=(3, 0, 4, 2))),
    "no output sees every tap": Case(image=(2, 2, 4), geometry=G((5, 5), padding=(2, 2, 2, 2))),
    "groups": Case(image=(4, 4, 12), geometry=G((3, 3), padding=(1, 1, 1, 1), groups=3)),
    "two words and a bit": Case(image=(3, 4, 65), filters=5),
    "pointwise": Case(geometry=G((1, 1))),
}


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("scale", ["static", "sample", "patch"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_means_the_same(case: Case, scale: str, first: int) -> None:
    before = replace(case, scale=scale, first=first).module()
    after = PackWeights(lanes)(before)
    x = replace(case, first=first).input()
    (expected,), (found,) = run(before, x), run(after, x)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_sums_are_exact_integers(case: Case, first: int) -> None:
    plain = replace(case, plain=True, first=first)
    (expected,), (found,) = (run(mod, plain.input()) for mod in (plain.module(), PackWeights(lanes)(plain.module())))
    np.testing.assert_array_equal(found, expected)


def packed_call(case: Case) -> relax.Call:
    values = [value for _, value in read_main(PackWeights(lanes)(case.module())).bindings]
    return next(value for value in values if op_name(value) == "horq.packed_bitserial")


@pytest.mark.parametrize(
    ("case", "halved"),
    [
        ("plain 3x3", 1),
        ("odd channels give odd sums", 0),
        ("odd channels, even taps", 1),
        ("groups", 1),
        ("two words and a bit", 0),
    ],
)
def test_halved_exactly_where_every_sum_is_even(case: str, halved: int) -> None:
    assert int(packed_call(CASES[case]).attrs["halved"]) == halved


def test_layout_of_weights_and_start() -> None:
    case = CASES["groups"]  # 6 filters in 3 groups of 2, 4 channels each
    weight, start = (array_of(arg) for arg in packed_call(case).args[1:3])
    assert weight is not None
    assert start is not None
    assert (weight.shape, weight.dtype) == ((3, 1, 3, 3, 1, 2), np.uint32)
    assert weight[1, 0, 2, 0, 0, 1] == pack_bits(case.weight()[3, 2, 0])[0]
    assert (start.shape, start.dtype) == ((3, 3, 3, 2), np.int32)
    ones = (case.weight()[5] > 0).sum(2)
    padded_ones = ones[0].sum() + ones[1:, 0].sum()  # the window at the top left corner
    assert start[0, 0, 2, 1] == -(4 * 4 + 2 * padded_ones) // 2
    assert start[1, 1, 2, 1] == -(9 * 4) // 2


def test_static_factors_carry_alpha_beta_and_the_factor_of_halved_sums() -> None:
    scale, addend = (array_of(arg) for arg in packed_call(Case(first=1)).args[3:])
    assert scale is not None
    assert addend is not None
    assert (scale.shape, addend.shape) == ((1, 6), (3, 3, 6))
    unfolded = [array_of(arg) for arg in packed_call(Case(first=0)).args[3:]]
    assert [a.shape for a in unfolded if a is not None] == [(2, 6), (1, 1, 6)]
    assert (scale < 0).all()


def test_pads_planes_once_for_two_layers_and_not_at_all_without_padding() -> None:
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 8)).astype("float32")

    def body(emit: Any, x: relax.Expr) -> Any:
        beta = constant(np.float32([[1.0]]))
        planes = emit(ops.binarize(x, beta, order=1, scale="static", geometry=G((1, 1))))
        constants = [constant(np.sign(weight).astype("int8")), constant(np.ones(4)), constant(np.zeros(4)), beta]

        def layer(name: str, window: ops.Geometry) -> relax.Expr:
            return emit(ops.bitserial(planes, *constants, name=name, order=1, scale="static", geometry=window))

        return layer("a", SAME), layer("b", SAME), layer("c", replace(SAME, padding=NO_PADDING))

    after = names(PackWeights(lanes)(module([(1, 5, 5, 8)], body)))
    assert after == ["horq.binarize", "horq.pad_planes", *["horq.packed_bitserial"] * 3]


@pytest.mark.parametrize(
    ("channels", "filters", "groups", "op"),
    [
        (6, 5, 1, "horq.packed_conv2d"),
        (6, 8, 2, "horq.packed_conv2d"),
        (6, 6, 6, "horq.packed_depthwise"),
        (3, 6, 3, "horq.packed_conv2d"),  # depthwise with a multiplier
    ],
)
def test_float_convolutions(channels: int, filters: int, groups: int, op: str) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((filters, 3, 2, channels // groups)).astype("float32")
    how: dict[str, Any] = {"strides": (2, 1), "padding": (1, 0, 2, 1), "groups": groups}
    shape = (2, 6, 5, channels)
    before = module([shape], lambda emit, x: emit(ops.conv2d(x, constant(weight), name="f", **how)))
    after = PackWeights(lanes)(before)
    assert names(after) == ["relax.nn.pad", op]
    x = rng.standard_normal(shape).astype("float32")
    np.testing.assert_allclose(run(after, x), run(before, x), rtol=1e-12)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8)])
def test_float_dense_is_a_pointwise_convolution(shape: tuple[int, ...]) -> None:
    weight = np.random.default_rng(0).standard_normal((5, 8)).astype("float32")
    before = module([shape], lambda emit, x: emit(ops.dense(x, constant(weight), name="d")))
    after = PackWeights(lanes)(before)
    assert names(after) == ["relax.reshape", "horq.packed_conv2d", "relax.reshape"]
    x = np.random.default_rng(1).standard_normal(shape).astype("float32")
    np.testing.assert_allclose(run(after, x), run(before, x), rtol=1e-12)


def test_leaves_everything_else_alone() -> None:
    before = module([(1, 4, 4, 8)], lambda emit, x: emit(relax.op.nn.relu(x)))
    tvm.ir.assert_structural_equal(PackWeights(lanes)(before), before)


def test_weights_that_are_not_constant_are_refused() -> None:
    with pytest.raises(HorqError, match="layer d: weights have to be constant"):
        PackWeights(lanes)(module([(3, 8), (5, 8)], lambda emit, x, w: emit(ops.dense(x, w, name="d"))))
