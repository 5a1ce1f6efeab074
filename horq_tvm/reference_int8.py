"""The int8 arithmetic of layers that stay unbinarised, in plain NumPy: the oracle of `--rest int8`.

Activations, by layer: a float32 scale s and a zero point z. With r = fl(1/s),

    q = clip(rint(fl(x·r)) + z, 0, 255)            (halves to even; 0 is exactly z)

Weights, by filter f: s_f = max|W_f| / 127, w = rint(W_f / s_f) in float64, so −127 ≤ w ≤ 127. The integer

    S[n,f,y,x] = Σ (q − z)·w

is exact: |S| ≤ L·255·128 < 2^31 is what `ops.int8.MAX_ROW` asks for. A padded position is q = z and adds nothing. The
output is fl(s·s_f)·S in float32, s·s_f computed in float64 and rounded once; then bias and the rest, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .reference import patches

Array = NDArray[Any]
LEVELS = 255
WEIGHT_LEVELS = 127
LEAST_SCALE = 1e-30


def activation_scale(low: float, high: float) -> tuple[float, int]:
    """(s, z) such that [min(low, 0), max(high, 0)] is q = 0…255, s rounded to float32. A range of nothing gives s = 1.

    ValueError where the range is not finite.
    """
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"the range {low} to {high} is not finite")
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    scale = float(np.float32((high - low) / LEVELS))
    if not LEAST_SCALE < scale < 1 / LEAST_SCALE:
        return 1.0, 0
    return scale, int(np.clip(np.rint(-low / scale), 0, LEVELS))


def reciprocal(scale: float) -> float:
    """r = fl(1/s): a kernel multiplies where the formula divides."""
    return float(np.float32(1) / np.float32(scale))


def quantize(x: Array, scale: float, zero_point: int) -> NDArray[np.uint8]:
    """x float32 → q uint8 of the same shape."""
    with np.errstate(over="ignore"):
        steps = np.clip(x.astype("float32") * np.float32(reciprocal(scale)), -zero_point, LEVELS - zero_point)
    return (np.rint(steps).astype("int32") + zero_point).astype("uint8")


def quantize_weights(weight: Array) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    """weight [F, ...] → w int8 of the same shape and s_f float64 [F]; of a filter of zeros s_f is 1."""
    flat = weight.astype("float64").reshape(len(weight), -1)
    largest = np.abs(flat).max(axis=1)
    scale = np.where(largest > 0, largest / WEIGHT_LEVELS, 1.0)
    return np.rint(flat / scale[:, None]).astype("int8").reshape(weight.shape), scale


def on_grid(weight: Array, scale: Array) -> NDArray[np.int8] | None:
    """The int8 w with weight [F, ...] = w·scale[F] but for rounding, None where there are none.

    A model that was quantised brings both; quantised anew, a filter whose largest weight is not ±127 would change.
    """
    steps = weight.astype("float64") / scale.astype("float64").reshape(-1, *[1] * (weight.ndim - 1))
    nearest = np.rint(steps)
    if not np.isfinite(steps).all() or (np.abs(steps - nearest) > 1e-3).any():
        return None
    return nearest.astype("int8") if nearest.min() >= -128 and nearest.max() <= WEIGHT_LEVELS else None


def factors(scale: float, weight_scale: Array) -> NDArray[np.float32]:
    """fl(s·s_f), float32 [F]."""
    return (float(np.float32(scale)) * weight_scale).astype("float32")


def conv2d(
    x: Array,
    weight: Array,
    scale: float,
    zero_point: int,
    *,
    strides: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """x float32 [N,C,H,W], weight float32 [F,C/g,kh,kw] → (S int32, output float32), [N,F,HO,WO]; no bias."""
    w, weight_scale = quantize_weights(weight)
    steps = quantize(x, scale, zero_point).astype("int64") - zero_point
    rows = patches(steps, w.shape[2:], strides, padding, dilation, groups)
    filters = w.astype("int64").transpose(0, 2, 3, 1).reshape(groups, len(w) // groups, -1)
    sums = np.einsum("nyxgl,gfl->ngfyx", rows, filters).reshape(len(x), len(w), *rows.shape[1:3])
    assert np.abs(sums).max(initial=0) < 2**31, "a row longer than ops.int8.MAX_ROW"
    return sums.astype("int32"), sums.astype("float32") * factors(scale, weight_scale)[:, None, None]


def image_conv2d(
    pixels: NDArray[np.uint8],
    weight: Array,
    factor: Array,
    addend: Array,
    *,
    strides: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Of x = factor_c·p + addend_c: pixels uint8 [N,C,H,W], weight float32 [F,C,kh,kw] → (S int32, output float32).

    With z_c = −addend_c / factor_c and z'_c the nearest level: S = Σ (p − z'_c)·w, w the integers of the weights
    W·factor_c, whose scale s_f rounded to float32 is the factor of the output; the addend fl(Σ W·factor_c·(z'_c − z_c))
    follows. A padded position is p = z'_c.
    """
    zeros = -np.asarray(addend, "float64") / np.asarray(factor, "float64")
    levels = np.clip(np.rint(zeros), 0, LEVELS)
    scaled = weight.astype("float64") * np.asarray(factor, "float64")[:, None, None]
    w, weight_scale = quantize_weights(scaled)
    steps = pixels.astype("int64") - levels.astype("int64")[:, None, None]
    rows = patches(steps, w.shape[2:], strides, padding, dilation, 1)
    sums = np.einsum("nyxgl,fl->nfyx", rows, w.astype("int64").transpose(0, 2, 3, 1).reshape(len(w), -1))
    rest = (scaled * (levels - zeros)[:, None, None]).sum(axis=(1, 2, 3)).astype("float32")
    output = sums.astype("float32") * weight_scale.astype("float32")[:, None, None] + rest[:, None, None]
    return sums.astype("int32"), output


def dense(x: Array, weight: Array, scale: float, zero_point: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """x float32 [...,L], weight float32 [F,L] → (S int32, output float32), [...,F]; no bias."""
    image = x.reshape(-1, x.shape[-1], 1, 1)
    sums, output = conv2d(image, weight[:, :, None, None], scale, zero_point)
    return sums.reshape(*x.shape[:-1], len(weight)), output.reshape(*x.shape[:-1], len(weight))
