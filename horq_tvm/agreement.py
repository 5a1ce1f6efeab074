"""What a rewrite costs: the compiled model against the float one, in two numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from . import peers
from .errors import UsageError
from .runtime.loader import LoadedModel
from .specs import TensorSpec

RANDOM_INPUTS = 8


@dataclass(frozen=True)
class Agreement:
    """Of the first output: `agreement`, the share with the same arg max over classes; `cosine`, the mean over inputs.

    `cosine` is None where an output holds NaN or infinity, of which there is no cosine.
    """

    agreement: float
    cosine: float | None
    inputs: str


def compare(model: LoadedModel, reference: LoadedModel, data: Mapping[str, np.ndarray] | None) -> Agreement:
    """Both models on the calibration data, or else on 8 seeded random inputs."""
    same: list[float] = []
    cosines: list[float] = []
    count = 0
    for feed in batches(reference.inputs, data):
        name = reference.outputs[0].name
        a, b = (np.asarray(m(**feed)[name], "float64") for m in (model, reference))
        same.append(float((_top(a) == _top(b)).mean()))
        with np.errstate(invalid="ignore"):
            norm = float(np.linalg.norm(a) * np.linalg.norm(b))
            cosines.append(float((a * b).sum()) / norm if norm else float(not np.any(a - b)))
        count += 1
    what = f"{count} random inputs" if data is None else f"the calibration data ({count} batches)"
    cosine = float(np.mean(cosines))
    return Agreement(float(np.mean(same)), cosine if np.isfinite(cosine) else None, what)


def _top(scores: np.ndarray) -> np.ndarray:
    """The arg max over the classes: of an image [N,C,H,W], as segmentation gives it, axis 1; else the last axis."""
    return np.atleast_1d(scores).argmax(1 if scores.ndim == 4 else -1)


def batches(inputs: tuple[TensorSpec, ...], data: Mapping[str, np.ndarray] | None) -> Iterator[dict[str, np.ndarray]]:
    """The data in pieces of the model's own batch, the last one filled up with its first samples.

    An input whose first axis is not the batch (a scalar, one factor a channel) takes its rows as they come: as many a
    piece as it has.

    Raises UsageError where an input is missing, its samples have another shape, or inputs do not last equally long.
    """
    if data is None:
        for seed in range(RANDOM_INPUTS):
            yield peers.random_feeds(inputs, seed)
        return
    counts = {spec.name: _pieces(spec, data) for spec in inputs}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name!r} for {count}" for name, count in counts.items())
        raise UsageError(f"calibration: samples for calls of the model: {found}; accepted: for as many of each input")
    for index in range(max(counts.values(), default=0)):
        yield {spec.name: _piece(spec, np.asarray(data[spec.name]), index) for spec in inputs}


def _pieces(spec: TensorSpec, data: Mapping[str, np.ndarray]) -> int:
    """How many calls of the model the samples of an input are enough for, the last one filled up."""
    if spec.name not in data:
        raise UsageError(f"calibration: no array {spec.name!r}; found: {', '.join(data) or 'none'}")
    found, sample = np.shape(data[spec.name]), spec.shape[1:]
    if len(found) != len(sample) + 1 or found[1:] != sample or not found[0]:
        accepted = ", ".join(("samples", *map(str, sample)))
        raise UsageError(f"calibration: {spec.name!r} has shape {found}; accepted: ({accepted})")
    samples = np.asarray(data[spec.name])
    if np.dtype(spec.dtype).kind in "iu" and not np.array_equal(samples, samples.astype(spec.dtype)):
        raise UsageError(
            f"calibration: {spec.name!r} has dtype {samples.dtype} and values that {spec.dtype} cannot hold; accepted:"
            f" what the model reads, {spec.dtype}"
        )
    return -(-found[0] // _rows(spec))


def _piece(spec: TensorSpec, samples: np.ndarray, index: int) -> np.ndarray:
    rows = np.arange(index * _rows(spec), (index + 1) * _rows(spec)) % len(samples)
    return np.array(samples[rows].reshape(spec.shape), dtype=spec.dtype, order="C")


def _rows(spec: TensorSpec) -> int:
    return spec.shape[0] if spec.shape else 1
