"""The semantics of HORQ layers in plain NumPy: what kernels, PyTorch layers and ONNX functions are held against.

Written from the formulas and for no speed but that of whole arrays. With sign(v) = +1 where v >= 0, else −1
(High-Order Residual Quantization, Li et al., ICCV 2017, arXiv 1708.08687):

    weights       B = sign(W)       α_f = mean|W_f|
    activations   R_0 = X           β_i = mean|R_{i−1}|      H_i = sign(R_{i−1})      R_i = R_{i−1} − β_i·H_i
    layer         Y = α_f · Σ_i β_i · S_i + bias             S_i = Σ H_i·B_f over the window, an exact integer

The **scale** of a layer says where β lives: `patch`, on each im2col row, in which a padded position is an element of
value 0; `sample`, on each image over its whole tensor; `static`, K constants of the layer. With the latter two a padded
position contributes nothing.

Arithmetic: means are taken in float64 and rounded once to float32; R is float32, rounded after each subtraction; Y is
float32, the planes summed in order, then times α, then plus the bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray

from .errors import UsageError
from .specs import MAX_ORDER, SCALES, Scale

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int8 = NDArray[np.int8]
Int32 = NDArray[np.int32]
Bool = NDArray[np.bool_]

DOUBT = 1e-6
"""A mean may be off by this share of β_1, so the sign of a residual this close to zero may fall either way."""


@dataclass(frozen=True, eq=False)
class HorqResult:
    """A layer's output and everything on the way to it. K planes; `...` are the leading axes of a dense layer's input.

    Attributes:
        output: float32 [N,F,HO,WO]; dense [...,F].
        sums: int32 [K,N,F,HO,WO], the S_i; dense [K,...,F].
        beta: float32, `static` [K], `sample` [N,K], `patch` [N,HO,WO,G,K]; dense with `patch` [...,K].
        planes: int8 ±1, the H_i: [K,N,C,H,W], with `patch` [K,N,HO,WO,G,L]; dense [K,...,L].
        doubtful_signs: bool, of the planes' shape without K: where another engine's mean may flip a sign.
        doubtful: bool, of the output's shape: the outputs whose window holds a doubtful sign.
        tolerance: float32, of the output's shape: how far other roundings of the same sum may lie from `output`.
    """

    output: Float32
    sums: Int32
    beta: Float32
    planes: Int8
    doubtful_signs: Bool
    doubtful: Bool
    tolerance: Float32


# --- Binarisation -----------------------------------------------------------------------------------------------------


def sign(x: ArrayLike) -> Int8:
    """+1 where x >= 0, so for both zeros, else −1."""
    return np.where(np.asarray(x) >= 0, np.int8(1), np.int8(-1))


def binarize_weights(w: ArrayLike) -> tuple[Int8, Float32]:
    """Float weights [F,...] → (B = sign(W), int8 of the same shape; α = mean|W_f|, float32 [F])."""
    w = np.asarray(w)
    if w.ndim < 2 or 0 in w.shape[1:]:
        raise UsageError(f"weight: found shape {list(w.shape)}; accepted are [F,...] with at least one value a filter")
    return sign(w), np.abs(w, dtype=np.float64).reshape(w.shape[0], -1).mean(axis=1).astype(np.float32)


def residual_binarize(x: ArrayLike, order: int, beta: ArrayLike) -> tuple[Int8, Float32]:
    """The planes of x and what they leave: (H int8 ±1 [K,*x.shape], R_K float32 of x's shape).

    x is float32, β float32 [K,...], each β_i broadcast against x. Raises UsageError unless β holds `order` scales.
    """
    x, beta = _float32(x), _float32(beta)
    _check_order(order)
    if beta.ndim == 0 or beta.shape[0] != order:
        raise UsageError(f"beta: found shape {list(beta.shape)}; accepted are {order} scales along the first axis")
    planes = np.empty((order, *x.shape), np.int8)
    *residuals, last = _residuals(x, beta)
    for i, residual in enumerate(residuals):
        planes[i] = sign(residual)
    return planes, last


def sample_scales(x: ArrayLike, order: int) -> Float32:
    """The scales of `sample`: x [N,...] → float32 [N,K], each mean taken over all of an image."""
    x = _float32(x)
    if x.ndim < 2:
        raise UsageError(f"x: found shape {list(x.shape)}; accepted are [N,...] with at least two axes")
    return _mean_scales(x.reshape(x.shape[0], -1), order)


def patch_scales(
    x: ArrayLike,
    order: int,
    kernel: Sequence[int],
    strides: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Float32:
    """The scales of `patch`: x [N,C,H,W] → float32 [N,HO,WO,G,K], each mean taken over a row of `patches`."""
    return _mean_scales(patches(_float32(x), kernel, strides, padding, dilation, groups), order)


def fit_static_scales(x: ArrayLike, order: int, max_steps: int = 100) -> Float64:
    """Constants β of the scale `static` for calibration values x of any shape → float64 [K], each exact in float32.

    Looks for the least ‖X − Σ β_i·H_i‖², starting from the means. Two steps alternate: the planes H that the residual
    chain gives with β, and the β that is the least-squares solution for those H. The chain is greedy and may not choose
    the nearest of the 2^K values, so a step can make the error larger: the best β seen is kept, and the search ends
    when β stands still or turns negative. The error is therefore never above that of the means.
    """
    flat = np.sort(_float32(x), axis=None)
    _check_order(order)
    if flat.size == 0 or not np.isfinite(flat[[0, -1]]).all():
        raise UsageError(f"x: found {flat.size} values, or some not finite; accepted are one or more finite values")
    sums = np.concatenate([[0.0], np.cumsum(flat, dtype=np.float64)])
    signs = _corners(order)
    beta = _mean_scales(flat, order)
    best, least = beta, np.inf
    for _ in range(max_steps):
        edges = _cell_edges(flat, beta)
        counts, totals = np.diff(edges), np.diff(sums[edges])
        gram, moments = signs.T @ (counts[:, None] * signs), signs.T @ totals  # HᵀH and Hᵀx
        error = float(beta @ gram @ beta - 2 * moments @ beta)  # ‖X − Σ β_i·H_i‖² less the constant ‖X‖²
        if error < least:
            best, least = beta, error
        fitted = np.linalg.lstsq(gram, moments, rcond=None)[0].astype(np.float32)
        if np.array_equal(fitted, beta) or (fitted < 0).any():
            break
        beta = fitted
    return best.astype(np.float64)


def _corners(order: int) -> Float32:
    """All 2^K sign vectors ±1 [2^K,K], in lexical order."""
    bits = np.arange(2**order)[:, None] >> np.arange(order)[::-1] & 1
    return np.where(bits, np.float32(1), np.float32(-1))


def _cell_edges(x: Float32, beta: Float32) -> NDArray[np.intp]:
    """Where the sign vectors of `_corners` begin and end in sorted x [M], with β [K] → [2^K + 1] indices.

    Among values whose first signs are equal R_i grows with x, rounding included. So every sign vector belongs to one
    interval of x, each plane cuts every interval in two, and a bisection finds the cut: the chain need not be run over
    all of x for every β that is tried.
    """
    edges = np.array([0, x.size])
    for i in range(len(beta)):
        signs = _corners(i)
        low, high = edges[:-1].copy(), edges[1:].copy()
        while (active := low < high).any():
            middle = (low + high) // 2
            residual = x[np.minimum(middle, x.size - 1)]
            for scale, column in zip(beta[:i], signs.T, strict=True):
                residual = residual - scale * column
            high = np.where(active & (residual >= 0), middle, high)
            low = np.where(active & (residual < 0), middle + 1, low)
        edges = np.append(np.stack([edges[:-1], low], axis=1).reshape(-1), x.size)
    return edges


def _residuals(x: Float32, beta: Float32) -> Iterator[Float32]:
    """R_0, ..., R_K for β [K,...], each rounded to float32."""
    residual = x
    yield residual
    for scale in beta:
        residual = residual - np.where(residual >= 0, scale, -scale)
        yield residual


def _mean_scales(x: Float32, order: int) -> Float32:
    """β_i = mean|R_{i−1}| over the last axis of x [...,L] → float32 [...,K]."""
    _check_order(order)
    beta = np.empty((*x.shape[:-1], order), np.float32)
    residual = x
    for i in range(order):
        beta[..., i] = np.abs(residual).mean(axis=-1, dtype=np.float64)
        scale = beta[..., i, None]
        residual = residual - np.where(residual >= 0, scale, -scale)
    return beta


def _doubtful_signs(x: Float32, beta: Float32) -> Bool:
    """Where |R_{i−1}| <= DOUBT·max(|x|, β_1) for some i of 2..K; β [K,...] broadcast against x → bool of x's shape.

    Not for i = 1, as H_1 is the sign of the input itself, nor where β_1 = 0: a mean of zeros, exact everywhere.
    """
    bound = DOUBT * np.maximum(np.abs(x), beta[0], dtype=np.float64)
    doubtful = np.zeros(x.shape, np.bool_)
    for residual in list(_residuals(x, beta))[1:-1]:
        doubtful |= np.abs(residual) <= bound
    return doubtful & (beta[0] > 0)


# --- Layers -----------------------------------------------------------------------------------------------------------


def patches(
    x: NDArray[np.generic],
    kernel: Sequence[int],
    strides: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> NDArray:
    """The im2col rows of x [N,C,H,W] → [N,HO,WO,G,L] of x's dtype, L = kh·kw·(C/g) in this order.

    `kernel` is (kh, kw), `padding` (top, left, bottom, right), and a padded position is 0. Raises UsageError where the
    channels do not divide into groups or no window fits.
    """
    _check_geometry(x.shape, kernel, strides, padding, dilation, groups)
    top, left, bottom, right = padding
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    n, c, *extents = padded.shape
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    if any(span > extent for span, extent in zip(spans, extents, strict=True)):
        raise UsageError(
            f"kernel: found a span of {spans} over a padded image of {extents}; accepted are windows that fit"
        )
    windows = sliding_window_view(padded, tuple(spans), axis=(2, 3))
    windows = windows[:, :, :: strides[0], :: strides[1], :: dilation[0], :: dilation[1]]
    ho, wo, kh, kw = windows.shape[2:]
    rows = windows.reshape(n, groups, c // groups, ho, wo, kh, kw).transpose(0, 3, 4, 1, 5, 6, 2)
    return rows.reshape(n, ho, wo, groups, -1)


def row_sums(rows: Int8, weight: Int8) -> Int32:
    """Integer sums of rows [...,G,L], of 0 and ±1, with ±1 weights [F,C/g,kh,kw] → int32 [...,F]."""
    *lead, groups, length = rows.shape
    filters = weight.transpose(0, 2, 3, 1).reshape(groups, -1, length)
    # A sum of L terms of 0 and ±1 is exact in float32 in any order while L <= 2^24, and float matrix products are fast.
    exact = np.float32 if length <= 2**24 else np.float64
    by_group = rows.reshape(-1, groups, length).transpose(1, 0, 2).astype(exact)
    sums = by_group @ filters.transpose(0, 2, 1).astype(exact)
    return sums.transpose(1, 0, 2).reshape(*lead, -1).astype(np.int32)


def conv2d_sums(
    planes: Int8,
    weight: ArrayLike,
    *,
    strides: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Int32:
    """The S_i of `sample` and `static`: planes ±1 [K,N,C,H,W], weight ±1 [F,C/g,kh,kw] → int32 [K,N,F,HO,WO].

    A padded position contributes 0: S_i = valid − 2·popcount(H_i XOR B) over the `valid` elements of the window.
    """
    signs = _signs(weight, planes.shape[2], groups)
    rows = (patches(plane, signs.shape[2:], strides, padding, dilation, groups) for plane in planes)
    return np.stack([np.moveaxis(row_sums(r, signs), -1, 1) for r in rows])


def conv2d(
    x: ArrayLike,
    weight: ArrayLike,
    alpha: ArrayLike,
    beta: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    order: int,
    scale: Scale,
    strides: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> HorqResult:
    """A HORQ convolution: x [N,C,H,W], weight ±1 [F,C/g,kh,kw], alpha [F], bias [F] or None.

    `padding` is (top, left, bottom, right). `beta` must be given for `static`; given for another scale, in the shape
    of `HorqResult.beta`, it takes the place of the means. No sign is then doubtful: equal input and β, equal planes.
    Raises UsageError for shapes that do not fit, a weight that is not ±1, an unknown scale or order.
    """
    x = _float32(x)
    _check_layer(x, 4, order, scale)
    signs = _signs(weight, x.shape[1], groups)
    geometry = (signs.shape[2:], strides, padding, dilation, groups)
    n, f = x.shape[0], signs.shape[0]
    if scale == "patch":
        rows = patches(x, *geometry)
        given = _given_beta(beta, (*rows.shape[:-1], order), scale)
        scales = _mean_scales(rows, order) if given is None else given
        along_rows = np.moveaxis(scales, -1, 0)[..., None]
        planes, _ = residual_binarize(rows, order, along_rows)
        doubtful_signs = _doubts(rows, along_rows, given)
        sums = np.stack([np.moveaxis(row_sums(plane, signs), -1, 1) for plane in planes])
        doubtful_rows = doubtful_signs.any(axis=-1)
        factors = np.moveaxis(np.repeat(along_rows[..., 0], f // groups, axis=-1), -1, 2)
    else:
        given = _given_beta(beta, (order,) if scale == "static" else (n, order), scale)
        scales = sample_scales(x, order) if given is None else given
        factors = scales.T.reshape(order, -1, 1, 1, 1)
        planes, _ = residual_binarize(x, order, factors)
        doubtful_signs = _doubts(x, factors, given)
        sums = conv2d_sums(planes, signs, strides=strides, padding=padding, dilation=dilation, groups=groups)
        doubtful_rows = patches(doubtful_signs, *geometry).any(axis=-1)
    doubtful = np.moveaxis(np.repeat(doubtful_rows, f // groups, axis=-1), -1, 1)
    output, tolerance = _combine(
        sums, factors, _per_filter("alpha", alpha, f)[:, None, None], _optional_bias(bias, f)[:, None, None]
    )
    return HorqResult(output, sums, scales, planes, doubtful_signs, doubtful, tolerance)


def dense(
    x: ArrayLike,
    weight: ArrayLike,
    alpha: ArrayLike,
    beta: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    order: int,
    scale: Scale,
) -> HorqResult:
    """A HORQ dense layer: x [...,L], weight ±1 [F,L], alpha [F], bias [F] or None; see `conv2d` for `beta` and errors.

    `patch` takes its means over each row of the last axis, `sample` over each image of the first axis; a vector is one
    image.
    """
    x = _float32(x)
    _check_layer(x, None, order, scale)
    signs = _signs(np.asarray(weight)[..., None, None], x.shape[-1], 1)
    n = x.shape[0] if x.ndim > 1 else 1
    inner = (1,) * (x.ndim - 1)
    if scale == "patch":
        given = _given_beta(beta, (*x.shape[:-1], order), scale)
        scales = _mean_scales(x, order) if given is None else given
        factors = np.moveaxis(scales, -1, 0)[..., None]
    else:
        given = _given_beta(beta, (order,) if scale == "static" else (n, order), scale)
        scales = sample_scales(x.reshape(n, -1), order) if given is None else given
        factors = scales.T.reshape(order, -1, *inner)
    planes, _ = residual_binarize(x, order, factors)
    doubtful_signs = _doubts(x, factors, given)
    sums = row_sums(planes[..., None, :], signs)
    f = signs.shape[0]
    output, tolerance = _combine(sums, factors, _per_filter("alpha", alpha, f), _optional_bias(bias, f))
    doubtful = np.repeat(doubtful_signs.any(axis=-1, keepdims=True), f, axis=-1)
    return HorqResult(output, sums, scales, planes, doubtful_signs, doubtful, tolerance)


def _doubts(x: Float32, beta: Float32, given: Float32 | None) -> Bool:
    """The doubtful signs of means that were computed here; with a given β there is nothing to doubt."""
    return _doubtful_signs(x, beta) if given is None else np.zeros(x.shape, np.bool_)


def _combine(sums: Int32, beta: Float32, alpha: Float32, bias: Float32) -> tuple[Float32, Float32]:
    """α · Σ β_i·S_i + bias in the contract's order, and its tolerance; S [K,...], the others broadcast against S_i.

    The tolerance is (K+2)·2⁻²³·(Σ|α·β_i·S_i| + |bias|), for engines that fold factors or contract to FMA; its second
    term is what a rounding costs where results are subnormal, which no relative bound covers.
    """
    total = beta[0] * sums[0].astype(np.float32)
    for scale, plane in zip(beta[1:], sums[1:], strict=True):
        total = total + scale * plane.astype(np.float32)
    magnitude = np.abs(alpha.astype(np.float64)) * (np.abs(sums) * beta.astype(np.float64)).sum(axis=0) + np.abs(bias)
    tolerance = (len(sums) + 2) * (2.0**-23 * magnitude + 2.0**-149)
    return total * alpha + bias, tolerance.astype(np.float32)


# --- Packed planes ----------------------------------------------------------------------------------------------------


def pack_planes(planes: Int8, word_bits: int = 32) -> NDArray[np.unsignedinteger]:
    """±1 planes [...,C], channels last → unsigned words [...,⌈C/w⌉] of w = 8, 16, 32 or 64 bits.

    Bit i of word j is channel w·j+i; 1 means +1; the bits that pad the last word are 0.
    """
    if word_bits not in (8, 16, 32, 64):
        raise UsageError(f"word_bits: found {word_bits}; accepted are 8, 16, 32, 64")
    planes = np.asarray(planes)
    width = [(0, 0)] * (planes.ndim - 1) + [(0, -planes.shape[-1] % word_bits)]
    octets = np.packbits(np.pad(planes > 0, width), axis=-1, bitorder="little")
    little = octets.view(np.dtype(f"<u{word_bits // 8}"))
    return little.astype(little.dtype.newbyteorder("="))


def pack_images(planes: Int8, groups: int = 1, word_bits: int = 32) -> NDArray[np.unsignedinteger]:
    """Planes of `sample` or `static` [K,N,C,H,W] → words [N,H,W,G,K,⌈(C/g)/w⌉], as `horq.binarize` stores them."""
    k, n, c, h, w = planes.shape
    return pack_planes(planes.reshape(k, n, groups, c // groups, h, w).transpose(1, 4, 5, 2, 0, 3), word_bits)


def pack_rows(planes: Int8, taps: int, word_bits: int = 32) -> NDArray[np.unsignedinteger]:
    """Planes of `patch` [K,N,HO,WO,G,L] → words [N,HO,WO,G,K,taps·⌈(C/g)/w⌉].

    `taps` is kh·kw; the channels of each are packed into words of their own.
    """
    rows = np.moveaxis(planes, 0, -2)
    words = pack_planes(rows.reshape(*rows.shape[:-1], taps, -1), word_bits)
    return words.reshape(*rows.shape[:-1], -1)


# --- What a call must look like ---------------------------------------------------------------------------------------


def _float32(x: ArrayLike) -> Float32:
    return np.asarray(x, np.float32)


def _signs(weight: ArrayLike, channels: int, groups: int) -> Int8:
    """The weight as int8 [F,C/g,kh,kw], checked."""
    weight = np.asarray(weight)
    if weight.ndim != 4 or weight.shape[1] * groups != channels or weight.shape[0] % groups:
        raise UsageError(
            f"weight: found shape {list(weight.shape)} for {channels} input channels in {groups} groups; accepted are "
            f"[F,{channels // groups},kh,kw] (dense: [F,{channels}]) with F a multiple of {groups}"
        )
    if not (np.abs(weight) == 1).all():
        raise UsageError("weight: found values other than ±1; accepted are ±1, see binarize_weights")
    return weight.astype(np.int8)


def _check_order(order: int) -> None:
    if not 1 <= order <= MAX_ORDER:
        raise UsageError(f"order: found {order}; accepted are 1 to {MAX_ORDER}")


def _check_layer(x: Float32, rank: int | None, order: int, scale: str) -> None:
    _check_order(order)
    if scale not in SCALES:
        raise UsageError(f"scale: found {scale!r}; accepted are {', '.join(SCALES)}")
    if (rank is not None and x.ndim != rank) or x.ndim == 0 or 0 in x.shape:
        accepted = "[N,C,H,W]" if rank else "[...,L]"
        raise UsageError(f"x: found shape {list(x.shape)}; accepted are {accepted}, none of them 0")


def _check_geometry(
    shape: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    if len(shape) != 4 or groups < 1 or shape[1] % groups:
        raise UsageError(
            f"x: found shape {list(shape)} in {groups} groups; accepted are [N,C,H,W] with C a multiple of them"
        )
    for name, found, count, least in (
        ("kernel", kernel, 2, 1),
        ("strides", strides, 2, 1),
        ("padding", padding, 4, 0),
        ("dilation", dilation, 2, 1),
    ):
        if len(found) != count or min(found) < least:
            raise UsageError(f"{name}: found {list(found)}; accepted are {count} integers of {least} or more")


def _given_beta(beta: ArrayLike | None, shape: tuple[int, ...], scale: Scale) -> Float32 | None:
    if beta is None:
        if scale == "static":
            raise UsageError(f"beta: found none; accepted with scale 'static' are {shape[-1]} constants")
        return None
    beta = _float32(beta)
    if beta.shape != shape:
        raise UsageError(f"beta: found shape {list(beta.shape)}; accepted with scale {scale!r} is {list(shape)}")
    return beta


def _per_filter(name: str, vector: ArrayLike, filters: int) -> Float32:
    vector = _float32(vector)
    if vector.shape != (filters,):
        raise UsageError(f"{name}: found shape {list(vector.shape)}; accepted is [{filters}], one value a filter")
    return vector


def _optional_bias(bias: ArrayLike | None, filters: int) -> Float32:
    """The bias as float32 [F]; zeros where there is none, which changes no value that is added to."""
    return np.zeros(filters, np.float32) if bias is None else _per_filter("bias", bias, filters)
