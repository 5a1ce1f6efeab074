"""Scale `patch` where its kernels decide by a hair: values that equal their β, means of nearly equal values, odd tiles.

The reference takes the β of the library, so that no sign is in doubt: an output within the tolerance has every plane
right, as a wrong bit moves it by 2·α·β.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("tvm")

from tests.end_to_end.drawn import Drawn, Float32, with_own_scales
from tests.end_to_end.test_oracle import check_general

SQUARE = {"kernel": (3, 3), "size": (2, 5, 6)}
LAYERS = [
    Drawn(64, 16, 2, "patch", **SQUARE, seed=1),
    Drawn(41, 7, 2, "patch", **SQUARE, groups=2, strides=(2, 1), seed=2),
    Drawn(40, 16, 2, "patch", **SQUARE, dilation=(1, 2), relu=True, seed=3),
    Drawn(64, 16, 3, "patch", **SQUARE, seed=4),
    Drawn(3, 16, 4, "patch", **SQUARE, groups=3, seed=5),
    Drawn(300, 16, 2, "patch", lead=(2, 17), seed=6),
    Drawn(608, 5, 2, "patch", kernel=(1, 2), size=(1, 3, 20), seed=7),
    Drawn(64, 16, 1, "patch", kernel=(3, 3), size=(1, 4, 25), padding=(1, 1, 1, 1), seed=8),
    Drawn(33, 16, 2, "patch", kernel=(5, 5), size=(1, 6, 9), padding=(2, 2, 2, 2), seed=9),
]


def around_one(layer: Drawn) -> Float32:
    """0, ±1 and ±2, as many 0 as ±2 among the channels of a pixel's group, so that ±1 equal β_1."""
    rng = np.random.default_rng(layer.seed)
    third = layer.channels // 3
    channels = np.repeat(np.float32([0, 2, 1]), (third, third, layer.channels - 2 * third))
    values = rng.permuted(np.tile(channels, (*layer.input_shape[:-1], layer.groups, 1)), axis=-1)
    return (values.reshape(layer.input_shape) * rng.choice((-1, 1), layer.input_shape)).astype("float32")


def equal(layer: Drawn) -> Float32:
    """±0.1: every residual is 0, and what a sum is off by goes one way."""
    return np.float32(0.1) * np.random.default_rng(layer.seed).choice(np.float32([-1, 1]), layer.input_shape)


def nearly_equal(layer: Drawn) -> Float32:
    """0.1 but for some units of the last place, negative for the most part."""
    rng = np.random.default_rng(layer.seed)
    return (-np.float32(0.1) * (1 + rng.integers(-4, 5, layer.input_shape) * 2.0**-23)).astype("float32")


INPUTS: dict[str, Callable[[Drawn], Float32]] = {
    "drawn": Drawn.image,
    "around one": around_one,
    "equal": equal,
    "nearly equal": nearly_equal,
}


@pytest.fixture(scope="module")
def compiled():  # type: ignore[no-untyped-def]
    return with_own_scales(LAYERS).load()


@pytest.mark.parametrize("kind", INPUTS)
def test_values_that_equal_their_scale(kind: str, compiled) -> None:  # type: ignore[no-untyped-def]
    images = [INPUTS[kind](layer) for layer in LAYERS]
    check_general(LAYERS, compiled, images)
    if kind == "around one":
        assert (compiled(*images)["beta_0"][..., 0] == 1).all()  # or nothing would equal it
