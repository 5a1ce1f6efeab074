"""`python -m benchmarks.speedup`: the HORQ talk's own figure, theory beside measurement.

How many times as fast a layer becomes, against the order K, the input channels, the kernel's size and the outputs. Of
an output pixel, with L = C·k² and F filters, a float convolution is F·L multiply-accumulates. Order K is K·F·L binary
ones, which a 64-bit processor does 64 at a time (Rastegari et al. 2016, "XNOR-Net", section 4.1: 64 binary operations a
clock), K·F products with the scales α·β, and, spread over the pixels of the input, K operations an input element to
take the residuals; with as many output pixels as input pixels that is K·C:

    speed-up(K) = F·L / (K·(F·L/64 + F + C))

Measured is what a layer costs in a network with `static` scales: binarise and pack, pad, convolve, scale. It stands
against two float layers: the count of the theory, one multiply-accumulate a cycle (cycles of this core, by a chain of
dependent additions in the same run), and ONNX Runtime as users would have it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from horq_tvm import peers, targets
from horq_tvm.cli import options
from horq_tvm.cli.show import progress, table
from horq_tvm.runtime.loader import load

from . import arguments, fragments, onnx_layers, peak
from .command import deliver, execute, target_that_runs_here
from .fragments import Conv, Fragment
from .measure import Probe, alternate, call_probe, kernel_probe, pinned, ratio

Record = dict[str, Any]

MIDDLE = Conv(14, 256, 256)
MIDDLE_ORDER = 2
SWEEPS: dict[str, Sequence[int]] = {
    "order": (1, 2, 3, 4, 5, 6, 7, 8),
    "channels": (16, 32, 64, 128, 256, 512),
    "kernel": (1, 3, 5, 7),
    "outputs": (16, 32, 64, 128, 256, 512),
}
WORD = 64


@dataclass(frozen=True)
class Point:
    """A layer and its order: one value of one sweep, all else as in the middle."""

    sweep: str
    value: int
    conv: Conv
    order: int


def points(sweeps: Sequence[str]) -> Iterator[Point]:
    """Each value of each sweep."""
    field = {"channels": "channels", "kernel": "kernel", "outputs": "filters"}
    for sweep in sweeps:
        for value in SWEEPS[sweep]:
            if sweep == "order":
                yield Point(sweep, value, MIDDLE, value)
            else:
                yield Point(sweep, value, replace(MIDDLE, **{field[sweep]: value}), MIDDLE_ORDER)


def theory(conv: Conv, order: int) -> float:
    """The speed-up as this module's head counts it."""
    row = conv.channels * conv.kernel**2
    macs = conv.filters * row
    return macs / (order * (macs / WORD + conv.filters + conv.channels))


def measure(
    target: targets.Target, sweeps: Sequence[str], seconds: float, folder: Path, say: Callable[[str], None]
) -> Iterator[Record]:
    """A record a point. Ours, the peer and the clock take turns."""
    clock = peak.build(peak.clock_way(), target)
    for point in points(sweeps):
        say(f"{point.sweep} {point.value}")
        probes = [clock.probe("clock"), *_ours(point, target, folder), _peer(point.conv, folder)]
        samples = alternate(probes, seconds * len(probes))
        cycles_per_ns = clock.way.macs_per_call / statistics.median(samples["clock"])
        ours = [sum(parts) for parts in zip(samples["pack"], samples["conv"], strict=True)]
        plain = point.conv.macs(batch=1) / cycles_per_ns
        yield {
            "sweep": point.sweep,
            "value": point.value,
            "order": point.order,
            "layer": point.conv.layer,
            "kernel": point.conv.kernel,
            "filters": point.conv.filters,
            "target": target.name,
            "median_ms": statistics.median(ours) / 1e6,
            "onnxruntime_ms": statistics.median(samples[peers.FLOAT32]) / 1e6,
            "plain_ms": plain / 1e6,
            "ghz": cycles_per_ns,
            "theory": theory(point.conv, point.order),
            "over_plain": plain / statistics.median(ours),
            "over_onnxruntime": ratio(samples[peers.FLOAT32], ours),
        }


def _ours(point: Point, target: targets.Target, folder: Path) -> list[Probe]:
    """Binarise and pack; pad and convolve, α·β included."""
    parts: dict[str, Fragment] = {
        "pack": fragments.pack(point.conv, point.order, batch=1),
        "conv": fragments.bare_conv(point.conv, point.order, batch=1, integer=False),
    }
    probes = []
    for name, fragment in parts.items():
        library = folder / f"{point.sweep}-{point.value}-{name}.so"
        fragment.compile(target, library)
        probes.append(kernel_probe(load(library), fragment.feeds, {name: ""}))
    return probes


def _peer(conv: Conv, folder: Path) -> Probe:
    rng = np.random.default_rng(fragments.SEED)
    weight = rng.standard_normal((conv.filters, conv.kernel, conv.kernel, conv.channels), "float32")
    model = onnx_layers.conv_model(folder / "layer.onnx", conv, 1, weight, np.zeros(conv.filters, "float32"))
    feeds = {"x": rng.standard_normal((1, conv.channels, conv.size, conv.size), "float32")}
    return call_probe(peers.FLOAT32, peers.float32(model, feeds).call)


def describe(records: Sequence[Record]) -> str:
    """One table: speed-ups of theory and measurement."""
    rows = [
        (
            r["sweep"],
            r["value"],
            *(round(r[key] * 1e3, 1) for key in ("median_ms", "onnxruntime_ms", "plain_ms")),
            *(round(r[key], 1) for key in ("theory", "over_plain", "over_onnxruntime")),
        )
        for r in records
    ]
    columns = ("sweep", "value", "ours us", "ort fp32 us", "1 MAC/cycle us", "theory", "vs 1 MAC/cycle", "vs ort fp32")
    middle = f"{MIDDLE.layer}, {MIDDLE.kernel}x{MIDDLE.kernel} to {MIDDLE.filters}, K={MIDDLE_ORDER}"
    return f"speed-ups around {middle}; {records[0]['target']} at {records[0]['ghz']:.2f} GHz\n{table(columns, rows)}"


def parser() -> options.Parser:
    """Which sweeps, for how long, and where the records go."""
    top = options.Parser(prog="python -m benchmarks.speedup", description=(__doc__ or "").split("\n\n")[0])
    top.add_argument(
        "--sweeps",
        type=arguments.listed(tuple(SWEEPS)),
        default=tuple(SWEEPS),
        metavar=",".join(SWEEPS),
        help="what to vary (default: all)",
    )
    top.add_argument("--target", default=targets.NATIVE, metavar="NAME", help="what to compile for (default: native)")
    top.add_argument(
        "--seconds", type=arguments.seconds, default=0.1, metavar="S", help="how long to time each (default: 0.1)"
    )
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options.add_json_option(top)
    return top


def run(given: argparse.Namespace) -> None:
    """Measure, print the table, write the records."""
    target = target_that_runs_here(given.target)
    with progress() as say, tempfile.TemporaryDirectory(prefix="horq-speedup-") as scratch, pinned(1):
        records = list(measure(target, given.sweeps, given.seconds, Path(scratch), say))
    deliver(records, given.json, describe)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 the work failed, 2 the call was mistaken."""
    return execute("speedup", parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
