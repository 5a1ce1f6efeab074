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
    """A layer's arithmetic: N·HO·WO·F·L multiply-accumulates a plane, of a kind that `Rates` knows.

    Of a binary layer `planes` are those computed: one that is known at compile time to be all +1 is not counted.
    """

    layer: str
    macs: int
    kind: str = FLOAT32
    planes: int = 1

    @property
    def binary(self) -> bool:
        """Whether it is a HORQ layer."""
        return self.kind == BINARY

    def floor_ms(self, rates: Rates) -> float:
        """The least time that its multiply-accumulates take."""
        return self.macs * self.planes / rates[self.kind] / 1e6


def layer_work(subject: Subject, order: int, scale: Scale, rests: Mapping[str, str | None]) -> dict[str, Work]:
    """The layers of the network by name, in topological order, counted in the compiler's own form of it.

    `rests` is the arithmetic of the layers that are not binary, as a manifest says; float32 where it does not.
    """
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
            work[name] = Work(name, prod(ops.shape_of(var)) * row, rests.get(name) or FLOAT32)
    for _, value in read_main(pipeline.rewrite(configs)(canonical)).bindings:
        if op_name(value) in BITSERIAL_OPS:
            name = str(value.attrs["name"])
            planes = int(value.attrs["order"]) - int(value.attrs["first"])
            work[name] = replace(work[name], kind=BINARY, planes=planes)
    return work


def _with_betas(config: LayerConfig) -> LayerConfig:
    """Any β do where nothing is computed."""
    if config.scale != "static" or config.betas is not None:
        return config
    return replace(config, betas=tuple(0.8 * 0.45**i for i in range(config.order)))


def floors_ms(work: Iterable[Work], rates: Rates) -> dict[str, float]:
    """Σ multiply-accumulates of each kind over that kind's rate, kinds without any left out."""
    totals: dict[str, float] = {}
    for layer in work:
        totals[layer.kind] = totals.get(layer.kind, 0.0) + layer.floor_ms(rates)
    return totals
