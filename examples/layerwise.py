"""A HORQ layer as PyTorch has it, on another engine's input to it: equal planes but for doubtful signs, equal sums.

Two engines part from layer to layer, as a sign that flips changes all that follows. So each layer is asked by itself:
fed what the other engine fed its own, do its means give the same planes, and its planes the same output? A plane that
differs in one sign changes S_i of every filter by 2, and so the output by 2·α·β_i, thousands of times the tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from horq_tvm.nn import HorqConv2d, HorqLayer
from horq_tvm.reference import DOUBT
from horq_tvm.torch_ops import im2col, linear_mean_axes, pad_zeros, planes_of, residual_scales

# In place of a zero that is divided by.
_LEAST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Fed:
    """What an engine fed a layer and what came out, as the layer's module has them; β in the engine's own shape.

    Input [N,C,H,W] or [N,L], output [N,F,HO,WO] or [N,F]. β [K,...] broadcasts against `values_of`, None where the
    engine does not show it.
    """

    input: Tensor
    beta: Tensor | None
    output: Tensor


@dataclass(frozen=True)
class LayerCheck:
    """All layers of an engine over all images.

    Of `signs` compared, `doubtful` lie so near 0 that a mean's last bits decide, `differing` differ, and `wrong` differ
    without being doubtful. Of `outputs`, `outside` lie outside the tolerance; `worst` is the greatest error in units of
    it. `means` is the greatest error of a β as a share of β_1.
    """

    engine: str
    images: int
    signs: int
    doubtful: int
    differing: int
    wrong: int
    outputs: int
    outside: int
    worst: float
    means: float

    @property
    def holds(self) -> bool:
        """Planes are equal but for doubtful signs, all outputs follow from them, and means are as near as they must."""
        return self.wrong == self.outside == 0 and self.means <= DOUBT


@dataclass(frozen=True)
class Seen:
    """A layer's input as it is quantised, with its own scales: see `values_of` and `scales_of`; planes ±1 [K,...]."""

    values: Tensor
    scales: Tensor
    planes: tuple[Tensor, ...]

    @classmethod
    def of(cls, layer: HorqLayer, x: Tensor) -> Seen:
        values, axes = values_of(layer, x)
        scales = scales_of(layer, values, axes)
        return cls(values, scales, tuple(planes_of(values, scales)))

    def flipped(self, other: Seen) -> Tensor:
        """bool [N]: the images on which a sign differs."""
        differ = [(a != b).flatten(1).any(1) for a, b in zip(self.planes, other.planes, strict=True)]
        return torch.stack(differ).any(0)


def values_of(layer: HorqLayer, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """What the layer quantises of its input x, and the axes of a mean: with `patch`, the windows [N,G,L,HO·WO]."""
    if not isinstance(layer, HorqConv2d):
        return x, linear_mean_axes(x.dim(), layer.scale)
    if layer.scale == "patch":
        return im2col(x, layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups), (2,)
    return x, (1, 2, 3)


def scales_of(layer: HorqLayer, values: Tensor, axes: tuple[int, ...]) -> Tensor:
    """β [K,...] of what `values_of` gives, broadcasting against it."""
    if layer.beta is None:
        return residual_scales(values, layer.order, axes)
    return layer.beta.detach().reshape(-1, *[1] * values.dim())


def library_scales(layer: HorqLayer, beta: Tensor) -> Tensor:
    """A library's β, [N,K], [1,K] or [N,HO,WO,G,K], in the shape of `scales_of`."""
    if not isinstance(layer, HorqConv2d):
        return beta.reshape(-1, layer.order).T[..., None]
    if layer.scale == "patch":
        return beta.permute(4, 0, 3, 1, 2).flatten(3)[:, :, :, None]
    return beta.T[:, :, None, None, None]


def output_of(layer: HorqLayer, scales: Tensor, planes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The output that follows from these scales and planes, and its tolerance (design: `reference.conv2d`)."""
    total = magnitude = torch.zeros(())
    for scale, plane in zip(scales, planes, strict=True):
        term = scale * _sums(layer, plane)
        total, magnitude = total + term, magnitude + term.abs()
    alpha, bias = (_per_filter(layer, given) for given in (layer.alpha, layer.bias))
    tolerance = (layer.order + 2) * 2.0**-23 * (alpha * magnitude + bias.abs())
    return total * alpha + bias, tolerance


def _sums(layer: HorqLayer, plane: Tensor) -> Tensor:
    """S_i, exact: [N,F,HO,WO], with `patch` [N,G,F/G,HO·WO], dense [N,F]."""
    weight = layer.weight_sign
    if not isinstance(layer, HorqConv2d):
        return F.linear(plane, weight).round_()
    if layer.scale == "patch":
        return (weight.flatten(1).unflatten(0, (layer.groups, -1)) @ plane).round_()
    padded = pad_zeros(plane, layer.padding)
    return F.conv2d(padded, weight, None, layer.stride, 0, layer.dilation, layer.groups).round_()


def _per_filter(layer: HorqLayer, given: Tensor | None) -> Tensor:
    """α or a bias as it broadcasts against `_sums`; 0 for no bias."""
    if given is None:
        return torch.zeros(())
    if not isinstance(layer, HorqConv2d):
        return given.detach()
    if layer.scale == "patch":
        return given.detach().reshape(layer.groups, -1, 1)
    return given.detach().reshape(-1, 1, 1)


def doubtful_signs(values: Tensor, scales: Tensor) -> Tensor:
    """bool, of the values' shape: |R_{i−1}| <= 1e-6·max(|x|, β_1) for some i from 2."""
    bound = DOUBT * torch.maximum(values.abs(), scales[0])
    residual, doubtful = values, torch.zeros(values.shape, dtype=torch.bool)
    for scale, plane in zip(scales[:-1], planes_of(values, scales), strict=False):
        residual = residual - scale * plane
        doubtful |= residual.abs() <= bound
    return doubtful & (scales[0] > 0)


class LayerTally:
    """Counts, batch by batch, what becomes the LayerCheck of an engine."""

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._signs = self._doubtful = self._differing = self._wrong = 0
        self._outputs = self._outside = 0
        self._worst = self._means = 0.0

    @torch.no_grad()
    def add(self, layer: HorqLayer, seen: Seen, fed: Fed) -> None:
        """A layer's share of a batch; `seen` is what PyTorch makes of the input that it was fed."""
        own, theirs, planes = seen.scales, seen.scales, seen.planes
        if fed.beta is not None and not torch.equal(own, fed.beta):
            theirs, planes = fed.beta, tuple(planes_of(seen.values, fed.beta))
            differing = torch.zeros(seen.values.shape, dtype=torch.bool)
            for one, other in zip(seen.planes, planes, strict=True):
                differing |= one != other
            doubtful = doubtful_signs(seen.values, own)
            self._doubtful += int(doubtful.sum())
            self._differing += int(differing.sum())
            self._wrong += int((differing & ~doubtful).sum())
            apart = (theirs.double() - own).abs() / own[0].clamp(min=_LEAST)
            self._means = max(self._means, float(apart.max()))
        output, tolerance = output_of(layer, theirs, planes)
        error = (fed.output.reshape(output.shape) - output).abs()
        self._signs += seen.values.numel() * layer.order
        self._outputs += output.numel()
        self._outside += int((error > tolerance).sum())
        self._worst = max(self._worst, float((error / tolerance.clamp(min=_LEAST)).max()))

    def check(self, images: int) -> LayerCheck:
        """What was counted, over so many images."""
        counts = (images, self._signs, self._doubtful, self._differing, self._wrong, self._outputs, self._outside)
        return LayerCheck(self._engine, *counts, self._worst, self._means)
