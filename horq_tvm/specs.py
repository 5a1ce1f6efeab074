"""The small facts about a model that every stage hands on: its tensors and what is wanted of each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scale = Literal["patch", "sample", "static"]
SCALES: tuple[Scale, ...] = ("patch", "sample", "static")
MAX_ORDER = 8

Rest = Literal["float32", "int8"]
RESTS: tuple[Rest, ...] = ("float32", "int8")

Emit = Literal["standalone", "tvm"]
EMITS: tuple[Emit, ...] = ("standalone", "tvm")


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and numpy dtype name of a model's input or output."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class LayerConfig:
    """How one conv or dense layer is binarised. `betas` are K constants, for `static` alone."""

    order: int
    scale: Scale
    betas: tuple[float, ...] | None = None
