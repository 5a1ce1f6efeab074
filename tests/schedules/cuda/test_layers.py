"""HORQ layers lowered for CUDA, executed by PoCL, against the reference: integers equal, floats within tolerance."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given

pytest.importorskip("tvm")

from horq_tvm.specs import MAX_ORDER
from tests.end_to_end.drawn import Drawn, rewritten_with_given_scales, rewritten_with_own_scales
from tests.end_to_end.test_oracle import EDGE_INPUTS, SWEEP, check_general, draws, exact_results
from tests.schedules.cuda import pocl
from tests.schedules.cuda.card import OnPocl

LAYERS = [
    Drawn(64, 64, 2, "static", size=(1, 7, 9), kernel=(3, 3), padding=(1, 1, 1, 1), seed=1),
    Drawn(64, 32, 1, "sample", size=(2, 6, 5), kernel=(3, 3), padding=(1, 0, 2, 1), strides=(2, 1), seed=2),
    Drawn(33, 17, 3, "static", size=(3, 5, 6), kernel=(2, 3), dilation=(2, 1), seed=3),
    Drawn(40, 20, 2, "sample", size=(1, 6, 6), kernel=(3, 3), groups=2, padding=(1, 1, 1, 1), relu=True, seed=4),
    Drawn(96, 5, 4, "static", size=(2, 4, 4), kernel=(1, 1), groups=3, relu=True, seed=5),
    Drawn(3, 16, 2, "patch", size=(2, 7, 6), kernel=(3, 3), padding=(1, 1, 1, 1), seed=6),
    Drawn(64, 24, 2, "patch", size=(1, 5, 6), kernel=(3, 3), padding=(1, 1, 1, 1), seed=7),
    Drawn(40, 16, 3, "patch", size=(1, 5, 6), kernel=(3, 2), groups=2, dilation=(1, 2), relu=True, seed=8),
    Drawn(300, 16, 2, "static", lead=(2, 17), seed=9),
    Drawn(130, 40, 2, "sample", lead=(3,), relu=True, seed=10),
    Drawn(65, 9, 4, "patch", lead=(2, 3), seed=11),
    Drawn(608, 64, 1, "static", size=(1, 3, 3), kernel=(3, 3), padding=(1, 1, 1, 1), seed=12),
    Drawn(63, 16, MAX_ORDER, "static", size=(2, 5, 4), kernel=(3, 2), padding=(1, 0, 1, 1), seed=13),
    Drawn(63, 16, MAX_ORDER, "patch", size=(2, 5, 4), kernel=(3, 2), padding=(1, 0, 1, 1), seed=14),
]


@pytest.fixture(scope="module", autouse=True)
def _device() -> None:
    pocl.device()


@pytest.fixture(scope="module")
def own_scales() -> OnPocl:
    return OnPocl(*rewritten_with_own_scales(LAYERS))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_with_unit_scales_the_output_is_the_sum_of_integers(asynchronous: bool) -> None:
    mod, fed = rewritten_with_given_scales(LAYERS)
    model = OnPocl(mod, asynchronous=asynchronous)
    for layer, y, result in exact_results(LAYERS, [layer.image() for layer in LAYERS], model, fed, given_beta=1.0):
        np.testing.assert_array_equal(y, result.sums.sum(axis=0), err_msg=str(layer))


IMAGES: dict[str, Callable[[Drawn], np.ndarray]] = {"drawn": Drawn.image, **EDGE_INPUTS}


@pytest.mark.parametrize("kind", IMAGES)
def test_outputs_agree_within_the_tolerance(kind: str, own_scales: OnPocl) -> None:
    check_general(LAYERS, own_scales, [IMAGES[kind](layer) for layer in LAYERS])


@pytest.mark.slow
@SWEEP
@given(draws(least_row=9))
def test_a_sweep_of_layers(drawn: list[Drawn]) -> None:
    images = [layer.image() for layer in drawn]
    mod, fed = rewritten_with_given_scales(drawn)
    for layer, y, result in exact_results(drawn, images, OnPocl(mod), fed, given_beta=1.0):
        np.testing.assert_array_equal(y, result.sums.sum(axis=0), err_msg=str(layer))
    check_general(drawn, OnPocl(*rewritten_with_own_scales(drawn)), images)
