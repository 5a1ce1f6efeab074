"""`python -m benchmarks.roofline`: on paper, what a network's HORQ layers take on a card, by vendors' figures.

Nothing is measured. A layer takes at least its multiply-accumulates over the tensor cores' peak, and at least the bytes
that have to cross the device's memory over its bandwidth: every tensor once, the weights once a batch, the epilogue,
the residual sum and the next layer's planes fused in. What a launch takes and how well a small layer fills a large card
is not in it, so these are bounds from below.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from horq_tvm import layers, ops, pipeline
from horq_tvm.cli.show import table
from horq_tvm.frontend.onnx import import_onnx
from horq_tvm.ops import Geometry
from horq_tvm.straightline import op_name, read_main

from .arguments import count, orders
from .command import deliver, execute
from .networks import subjects

BINARY, INT8, FLOAT16 = "horq", "int8", "float16"
HORQ_ORDERS = range(1, 9)


@dataclass(frozen=True)
class Card:
    """Dense tensor-core peaks in 10¹² operations a second (a multiply-accumulate is two) and memory in GB/s.

    `binary` is that of XOR and population count as our kernels use them; `source` says where the figures are from.
    """

    name: str
    binary: float
    int8: float
    float16: float
    memory: float
    source: str

    def macs_per_us(self, kind: str) -> float:
        """Multiply-accumulates a microsecond."""
        return {BINARY: self.binary, INT8: self.int8, FLOAT16: self.float16}[kind] * 1e6 / 2

    def bytes_per_us(self) -> float:
        return self.memory * 1e3


# NVIDIA states b1 for the A100 alone, 8 times its int8. RTX 3090 and Orin, of the same generation, are taken to have
# that factor too. Hopper's b1 is not documented beyond its instruction, AND: taken is the A100's rate a multiprocessor
# and clock (16384 of 108 at 1.41 GHz, here 132 at 1.83), halved, since XOR is two of them.
CARDS = (
    Card("A100 40 GB", 4992, 624, 312, 1555, "NVIDIA A100 Tensor Core GPU Architecture, v1.0, table 1 and 3"),
    Card("RTX 3090", 8 * 284, 284, 142, 936, "NVIDIA Ampere GA102 GPU Architecture, v2.1, table 9; b1 = 8 int8"),
    Card("Orin 64 GB", 8 * 85, 85, 42.5, 204.8, "NVIDIA Jetson AGX Orin Technical Brief, v1.2; b1 = 8 int8"),
    Card(
        "H100 SXM", 7915 / 2, 1979, 989.4, 3350, "NVIDIA H100 Tensor Core GPU Architecture, v1.04, table 2; b1 see text"
    ),
)


@dataclass(frozen=True)
class Shape:
    """A layer of a batch: elements in, out, and of its weights, and multiply-accumulates a plane."""

    label: str
    inputs: int
    outputs: int
    weights: int
    macs: int

    def bytes(self, kind: str, order: int, shortcut: bool) -> float:
        """Read: activations, weights, and the shortcut's value. Written: the sum, which the next layer reads.

        HORQ's activations are K bits, and a sum that goes into the next shortcut is written in float32 beside them;
        int8 and float16 networks have one tensor for both.
        """
        if kind == BINARY:
            floats = 2 * 4 * self.outputs if shortcut else 0
            return order * (self.inputs + self.outputs) / 8 + self.weights / 8 + floats
        width = {INT8: 1, FLOAT16: 2}[kind]
        return width * (self.inputs + self.weights + (2 if shortcut else 1) * self.outputs)


@dataclass(frozen=True)
class Bound:
    """Microseconds of a layer's arithmetic and of its memory; it takes the longer one at least."""

    tensor_us: float
    memory_us: float

    @classmethod
    def of(cls, shape: Shape, card: Card, kind: str, order: int, shortcut: bool) -> Bound:
        """The bound of `order` planes; int8 and float16 have one."""
        moved = shape.bytes(kind, order, shortcut)
        return cls(order * shape.macs / card.macs_per_us(kind), moved / card.bytes_per_us())

    @property
    def us(self) -> float:
        return max(self.tensor_us, self.memory_us)


def horq_shapes(network: str, batch: int, folder: Path) -> list[Shape]:
    """The HORQ layers of a network of the zoo, in topological order."""
    (subject,) = subjects.find(network, batch, ("signed",), "deployed", folder)[:1]
    imported = import_onnx(subject.horq(1, "sample"), subject.shapes)
    canonical = pipeline.canonicalise()(imported.mod)
    found = []
    for var, value in read_main(canonical).bindings:
        if op_name(value) in layers.LAYER_OPS and str(value.attrs["name"]) in imported.trained:
            found.append(_shape(value, ops.shape_of(var)))
    return found


def _shape(layer: Any, output: tuple[int, ...]) -> Shape:
    source, weight = (ops.shape_of(operand) for operand in layer.args[:2])
    label = f"{weight[-1]}→{weight[0]}"
    if op_name(layer) == "horq.conv2d":
        geometry = Geometry.of(layer.attrs)
        stride = f"/{geometry.strides[0]}" if max(geometry.strides) > 1 else ""
        label = f"{weight[1]}×{weight[2]}{stride} {weight[-1]}→{weight[0]}, {output[1]}×{output[2]}"
    return Shape(label, prod(source), prod(output), prod(weight), prod(output) * prod(weight[1:]))


def bounds(network: str, batch: int, given: Sequence[int], folder: Path) -> list[dict[str, Any]]:
    """A record for each card, distinct layer and engine; those of the layers' sum have the layer `all`.

    With and without a shortcut around every layer: the network's own ones are not looked at.
    """
    shapes = horq_shapes(network, batch, folder)
    engines = [(BINARY, order) for order in sorted({*given, *HORQ_ORDERS})] + [(INT8, 1), (FLOAT16, 1)]
    records = []
    for card, (kind, order), shortcut in product(CARDS, engines, (True, False)):
        head = {"network": network, "batch": batch, "card": card.name, "source": card.source}
        head |= {"engine": kind, "order": order, "shortcut": shortcut}
        for label in dict.fromkeys(shape.label for shape in shapes):
            alike = [shape for shape in shapes if shape.label == label]
            bound = Bound.of(alike[0], card, kind, order, shortcut)
            records.append({**head, "layer": label, "layers": len(alike), **asdict(bound), "us": bound.us})
        total = sum(Bound.of(shape, card, kind, order, shortcut).us for shape in shapes)
        records.append({**head, "layer": "all", "layers": len(shapes), "us": total})
    return records


def describe(records: Sequence[dict[str, Any]], given: Sequence[int]) -> str:
    """Markdown: the layers by card and order, and the sums beside the largest K that is not slower than int8."""
    parts = []
    for network, batch in dict.fromkeys((r["network"], r["batch"]) for r in records):
        own = [r for r in records if (r["network"], r["batch"]) == (network, batch)]
        parts += [f"{network}, batch {batch}, a shortcut a layer, µs: tensor cores / memory", _layers(own, given)]
        parts += [f"{network}, batch {batch}, all of these layers, µs", _totals(own, given)]
    return "\n\n".join(parts)


def _layers(records: Iterable[dict[str, Any]], given: Sequence[int]) -> str:
    cells = {
        (r["layer"], r["layers"], r["order"], r["card"]): f"{r['tensor_us']:.2g} / {r['memory_us']:.2g}"
        for r in records
        if r["engine"] == BINARY and r["layer"] != "all" and r["shortcut"]
    }
    rows = [
        (layer, number, order, *(cells[layer, number, order, card.name] for card in CARDS))
        for layer, number in dict.fromkeys((key[0], key[1]) for key in cells)
        for order in given
    ]
    return table(("layer", "times", "K", *(card.name for card in CARDS)), rows)


def _totals(records: Sequence[dict[str, Any]], given: Sequence[int]) -> str:
    rows = []
    for card, shortcut in product(CARDS, (True, False)):
        own = [r for r in records if (r["card"], r["shortcut"], r["layer"]) == (card.name, shortcut, "all")]
        us = {(r["engine"], r["order"]): r["us"] for r in own}
        int8, float16 = us[INT8, 1], us[FLOAT16, 1]
        largest = max((k for k in HORQ_ORDERS if us[BINARY, k] <= int8), default=None)
        most = "none" if largest is None else f"{largest}" if largest < max(HORQ_ORDERS) else f"≥ {largest}"
        sums = (f"{value:.3g}" for value in (*(us[BINARY, order] for order in given), int8, float16))
        rows.append((card.name, "yes" if shortcut else "no", *sums, most))
    columns = ("card", "shortcuts", *(f"K={order}" for order in given), "int8", "float16", "largest K not above int8")
    return table(columns, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("--network", choices=subjects.ZOO, default="resnet18")
    parser.add_argument("--orders", type=orders, default=(1, 2), metavar="K,...")
    parser.add_argument("--batch", type=count, nargs="+", default=(1, 64), metavar="N")
    parser.add_argument("--json", metavar="FILE", help="the records; - prints them alone")
    parser.add_argument("--debug", action="store_true", help="with the traceback of an error")

    def run(given: argparse.Namespace) -> None:
        with tempfile.TemporaryDirectory() as folder:
            found = [
                record for batch in given.batch for record in bounds(given.network, batch, given.orders, Path(folder))
            ]
        deliver(found, given.json, lambda records: describe(records, given.orders))

    return execute("roofline", parser, run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
