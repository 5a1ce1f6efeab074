"""What a network has to compute: multiply-accumulates by layer and kind, and the least time they take on this core."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod

from horq_tvm import layers, ops, pipeline
from horq_tvm.frontend.onnx import import_onnx
from horq_tvm.specs import LayerConfig, Scale
from horq_tvm.straightline import op_name, read_main

from .subjects import Subject

BINARY, FLOAT32, INT8 = "binary", "float32", "int8"
BITSERIAL_OPS = ("horq.bitserial_conv2d", "horq.bitserial_dense")

Rates = Mapping[str, float]
"""Multiply-accumulates a nanosecond of one core that touches nothing but registers, by kind."""


@dataclass(frozen=True)
class Work:
    """A layer's arithmetic: N·HO·WO·F·L multiply-accumulates a plane. `planes` are those computed, 0 of a float layer.

    A plane that is known at compile time to be all +1 is not computed and not counted.
    """

    layer: str
    macs: int
    planes: int = 0

    def of_kind(self, rest: str) -> tuple[str, int]:
        """The kind of its multiply-accumulates where float layers are `rest`, and their number."""
        return (BINARY, self.macs * self.planes) if self.planes else (rest, self.macs)

    def floor_ms(self, rest: str, rates: Rates) -> float:
        """The least time that they take."""
        kind, macs = self.of_kind(rest)
        return macs / rates[kind] / 1e6


def layer_work(subject: Subject, order: int, scale: Scale) -> dict[str, Work]:
    """The layers of the network by name, in topological order, counted in the compiler's own form of it."""
    imported = import_onnx(subject.horq(order, scale), subject.shapes)
    canonical = pipeline.canonicalise()(imported.mod)
    found = layers.enumerate_layers(canonical)
    choices = layers.choose(found, trained=imported.trained, **subject.arguments(order, scale))
    configs = {name: _with_betas(choice.config) for name, choice in choices.items() if choice.config is not None}
    work = {}
    for var, value in read_main(canonical).bindings:
        if op_name(value) in layers.LAYER_OPS:
            name = str(value.attrs["name"])
            row = prod(ops.shape_of(value.args[1])[1:])
            work[name] = Work(name, prod(ops.shape_of(var)) * row)
    for _, value in read_main(pipeline.rewrite(configs)(canonical)).bindings:
        if op_name(value) in BITSERIAL_OPS:
            name = str(value.attrs["name"])
            work[name] = replace(work[name], planes=int(value.attrs["order"]) - int(value.attrs["first"]))
    return work


def _with_betas(config: LayerConfig) -> LayerConfig:
    """Any β do where nothing is computed."""
    if config.scale != "static" or config.betas is not None:
        return config
    return replace(config, betas=tuple(0.8 * 0.45**i for i in range(config.order)))


def floors_ms(work: Iterable[Work], rest: str, rates: Rates) -> dict[str, float]:
    """Σ multiply-accumulates of each kind over that kind's rate, kinds without any left out."""
    totals: dict[str, float] = {}
    for layer in work:
        kind, _ = layer.of_kind(rest)
        totals[kind] = totals.get(kind, 0.0) + layer.floor_ms(rest, rates)
    return totals
