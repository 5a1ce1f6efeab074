"""What a library built with taps says of a layer, held against the reference on the same input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from horq_tvm import reference
from horq_tvm.specs import Scale

Array = NDArray[Any]
MEAN_ERROR = 1e-6
"""design.md: a kernel's mean is off by at most this share of β_1."""


@dataclass(frozen=True)
class Tap:
    """A conv layer's tapped tensors.

    Input [N,H,W,C] and output [N,HO,WO,F], β [N,K] ([1,K] if static), planes [N,H,W,G,K,words]; with `patch` β
    [N,HO,WO,G,K] and planes [N,HO,WO,G,K,kh·kw·words].
    """

    input: Array
    beta: Array
    planes: Array
    output: Array

    @classmethod
    def of(cls, outputs: Mapping[str, Array], name: str) -> Tap:
        """The tap of the layer `name` among a library's outputs."""
        return cls(*(outputs[f"tap.{name}.{part}"] for part in ("input", "beta", "planes", "output")))

    @property
    def image(self) -> Array:
        """The input [N,C,H,W], as the reference and ONNX have it."""
        return np.ascontiguousarray(np.moveaxis(self.input, 3, 1))

    @property
    def features(self) -> Array:
        """The output [N,F,HO,WO]."""
        return np.moveaxis(self.output, 3, 1)


@dataclass(frozen=True)
class Comparison:
    """`signs` and `doubtful` count values of the input; `worst` is the greatest error in units of the tolerance."""

    signs: int
    doubtful: int
    worst: float


def compare(
    tap: Tap, weight: Array, alpha: Array, bias: Array | None = None, *, scale: Scale, **geometry: Any
) -> Comparison:
    """Asserts that planes and output follow from the tapped input.

    With the tapped β nothing is in doubt: planes are equal, outputs within the tolerance. With the reference's means,
    the planes are equal but for doubtful signs. `weight` is ±1 [F,C/g,kh,kw], `alpha` and `bias` are [F], `geometry` is
    as in `reference.conv2d`.
    """
    order = tap.beta.shape[-1]
    beta = tap.beta[0] if scale == "static" else tap.beta
    given = reference.conv2d(tap.image, weight, alpha, beta, bias, order=order, scale=scale, **geometry)

    def packed(planes: Array) -> Array:
        if scale == "patch":
            return reference.pack_rows(planes, weight.shape[2] * weight.shape[3])
        return reference.pack_images(planes, geometry.get("groups", 1))

    np.testing.assert_array_equal(tap.planes, packed(given.planes))
    worst = assert_within(tap.features, given.output, given.tolerance)
    if scale == "static":
        return Comparison(tap.input.size, 0, worst)
    own = reference.conv2d(tap.image, weight, alpha, order=order, scale=scale, **geometry)
    assert (np.abs(beta.astype("float64") - own.beta) <= MEAN_ERROR * own.beta[..., :1]).all()
    trusted = np.where(own.doubtful_signs, given.planes, own.planes)
    np.testing.assert_array_equal(tap.planes, packed(trusted))
    return Comparison(tap.input.size, int(own.doubtful_signs.sum()), worst)


def assert_within(found: Array, expected: Array, tolerance: Array) -> float:
    """|found − expected| <= tolerance everywhere; returns the greatest error in units of the tolerance."""
    error = np.abs(found.astype("float64") - expected)
    assert (error <= tolerance).all(), f"off by {np.nanmax(error - tolerance)} more than the tolerance"
    return float((error / np.maximum(tolerance, np.finfo("float32").tiny)).max())
