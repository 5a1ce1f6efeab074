"""What a rewrite costs: the compiled model against the float one, in two numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from .errors import UsageError
from .runtime.loader import LoadedModel
from .specs import TensorSpec

RANDOM_INPUTS = 8


@dataclass(frozen=True)
class Agreement:
    """`agreement`: share of rows with the same arg max; `cosine`: mean over inputs; both of the first output."""

    agreement: float
    cosine: float
    inputs: str


def compare(model: LoadedModel, reference: LoadedModel, data: Mapping[str, np.ndarray] | None) -> Agreement:
    """Both models on the calibration data, or else on 8 seeded random inputs."""
    same: list[float] = []
    cosines: list[float] = []
    count = 0
    for feed in batches(reference.inputs, data):
        name = reference.outputs[0].name
        a, b = (np.asarray(m(**feed)[name], "float64") for m in (model, reference))
        rows_a, rows_b = (v.reshape(-1, v.shape[-1] if v.ndim else 1) for v in (a, b))
        same.append(float((rows_a.argmax(1) == rows_b.argmax(1)).mean()))
        norm = float(np.linalg.norm(a) * np.linalg.norm(b))
        cosines.append(float((a * b).sum()) / norm if norm else float(not np.any(a - b)))
        count += 1
    what = f"{count} random inputs" if data is None else f"the calibration data ({count} batches)"
    return Agreement(float(np.mean(same)), float(np.mean(cosines)), what)


def batches(inputs: tuple[TensorSpec, ...], data: Mapping[str, np.ndarray] | None) -> Iterator[dict[str, np.ndarray]]:
    """The data in pieces of the model's own batch, the last one filled up with its first samples.

    Raises UsageError where an input is missing or its samples have another shape.
    """
    if data is None:
        rng = np.random.default_rng(0)
        for _ in range(RANDOM_INPUTS):
            yield {s.name: rng.standard_normal(s.shape).astype(s.dtype) for s in inputs}
        return
    for spec in inputs:
        if spec.name not in data:
            raise UsageError(f"calibration: no array {spec.name!r}; found: {', '.join(data) or 'none'}")
        found = np.shape(data[spec.name])
        if len(found) != len(spec.shape) or found[1:] != spec.shape[1:] or not found[0]:
            accepted = ", ".join(("samples", *map(str, spec.shape[1:])))
            raise UsageError(f"calibration: {spec.name!r} has shape {found}; accepted: ({accepted})")
    samples = min(len(data[spec.name]) for spec in inputs)
    batch = inputs[0].shape[0] if inputs[0].shape else 1
    for begin in range(0, samples, batch):
        rows = np.arange(begin, begin + batch) % samples
        yield {s.name: np.ascontiguousarray(data[s.name][rows], dtype=s.dtype) for s in inputs}
