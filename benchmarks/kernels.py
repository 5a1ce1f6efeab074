"""`python -m benchmarks.kernels`: each kernel against the core's own limit, and float layers against ONNX Runtime.

Times are taken inside the libraries by their own clock. Everything that is compared is timed in turn in one process:
the kernels of a layer and the register-only peak, a float layer and its peer; a ratio is the median of the rounds'.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from horq_tvm import peers, targets
from horq_tvm.cli import options
from horq_tvm.cli.show import progress, table
from horq_tvm.runtime.loader import load

from . import fragments, onnx_layers, peak
from .arguments import count, listed, orders, seconds
from .command import deliver, execute, target_that_runs_here
from .fragments import Conv, Fragment
from .measure import Probe, alternate, call_probe, kernel_probe, pinned, ratio

Record = dict[str, Any]
Samples = Mapping[str, list[float]]

ENGINE = "horq-tvm"
BITSERIAL = "bitserial"
ALL_STEPS = ""
ACTIVATIONS = ("signed", "relu")

STAGES = (Conv(56, 64, 64), Conv(28, 128, 128), Conv(14, 256, 256), Conv(7, 512, 512))
"""The 3×3 convolutions of the four stages of ResNet-18."""

FLOAT_CONVS: Mapping[str, Conv] = {
    "7x7 s2": Conv(224, 3, 64, kernel=7, stride=2),
    "1x1": Conv(56, 256, 64, kernel=1),
    "3x3": Conv(56, 64, 64),
    "3x3 deep": Conv(14, 256, 256),
    "3x3 depthwise": Conv(112, 32, 32, groups=32),
}
MAX_POOL = Conv(112, 64, 64, stride=2)
DENSE = (512, 1000)


@dataclass(frozen=True)
class Setting:
    """What all kernels of a run share. `folder` is where their libraries go."""

    target: targets.Target
    threads: int
    batch: int
    seconds: float  # a kernel
    folder: Path
    say: Callable[[str], None] = lambda _doing: None

    def record(self, conv_layer: str, kernel: str, **more: Any) -> Record:
        """What every record says."""
        common = {"layer": conv_layer, "kernel": kernel, "engine": ENGINE, "order": None, "scale": None}
        setting = {"rest": "float32", "threads": self.threads, "batch": self.batch, "target": self.target.name}
        return {**common, **setting, "activation": None, **more}

    def probe(self, name: str, fragment: Fragment, steps: Mapping[str, str]) -> Probe:
        """The fragment's library, loaded and ready to be timed."""
        self.say(f"compiling {name}")
        library = self.folder / f"{name.replace(' ', '-')}.so"
        fragment.compile(self.target, library)
        return kernel_probe(load(library, self.threads), fragment.feeds, steps)


def bit_records(
    setting: Setting, conv: Conv, order: int, activation: str, limit: peak.Peak, clock: peak.Peak
) -> list[Record]:
    """Records of the bare convolution, the convolution with its epilogue in both forms, and packing by itself."""
    relu = activation == "relu"
    label = f"{conv.layer} K{order} {activation}"
    batch = setting.batch

    def fused(shortcut: bool) -> Fragment:
        return fragments.conv_with_epilogue(conv, order, batch, relu=relu, shortcut=shortcut)

    def bare(integer: bool) -> Fragment:
        return fragments.bare_conv(conv, order, batch, int(relu), integer=integer)

    probes = [
        limit.probe("peak"),
        clock.probe("clock"),
        setting.probe(f"{label} conv", bare(integer=True), {"conv": BITSERIAL, "pad": "pad"}),
        setting.probe(f"{label} affine", bare(integer=False), {"affine": BITSERIAL}),
        setting.probe(f"{label} planes", fused(shortcut=False), {"planes": BITSERIAL}),
        setting.probe(f"{label} planes+float", fused(shortcut=True), {"planes+float": BITSERIAL}),
    ]
    if not relu:
        probes.append(setting.probe(f"{label} pack", fragments.pack(conv, order, batch), {"pack": ALL_STEPS}))
    setting.say(f"timing {label}")
    samples = alternate(probes, setting.seconds * len(probes))
    cycles = ratio(samples["conv"], samples["clock"]) * clock.way.macs_per_call
    ghz = _rate(clock.way.macs_per_call, samples["clock"])
    return _bit_records(setting, conv, order, activation, samples, limit, {"ghz": ghz, "cycles": cycles})


def _bit_records(
    setting: Setting, conv: Conv, order: int, activation: str, samples: Samples, limit: peak.Peak, clock: Record
) -> list[Record]:
    macs = conv.macs(setting.batch, order)
    shared = {"order": order, "scale": "static", "activation": activation}
    peak_gmacs = _rate(limit.way.macs_per_call, samples["peak"])
    # Of the peak of as many cores as threads; a plane dropped behind a ReLU is not computed, so it is no part of it.
    computed = conv.macs(setting.batch, order - int(activation == "relu"))
    part = computed / limit.way.macs_per_call / setting.threads / ratio(samples["conv"], samples["peak"])
    records = [
        setting.record(
            conv.layer,
            "conv",
            **shared,
            **_times(samples["conv"], macs),
            fraction_of_peak=part,
            peak_gmacs=peak_gmacs,
            peak_loop=limit.way.name,
            pad_ms=statistics.median(samples["pad"]) / 1e6,
            affine_ms=statistics.median(samples["affine"]) / 1e6,
            ghz=clock["ghz"],
            macs_per_cycle=computed / clock["cycles"] / setting.threads,
        )
    ]
    for outputs in ("planes", "planes+float"):
        over = ratio(samples[outputs], samples["conv"]) - 1
        times = _times(samples[outputs], macs)
        records.append(setting.record(conv.layer, "conv+epilogue", **shared, **times, outputs=outputs, over_conv=over))
    if "pack" in samples:
        part = ratio(samples["pack"], samples["conv"])
        records.append(setting.record(conv.layer, "pack", **shared, **_times(samples["pack"], None), of_conv=part))
    return records


@dataclass(frozen=True)
class FloatLayer:
    """A float layer in our form and, as an ONNX file, in the peer's. `macs` is None where there are none."""

    name: str
    layer: str
    fragment: Fragment
    model: Path
    macs: int | None


def float_layers(folder: Path, batch: int) -> Iterator[FloatLayer]:
    """The layers that usually stay float."""
    rng = np.random.default_rng(fragments.SEED)
    for name, conv in FLOAT_CONVS.items():
        shape = (conv.filters, conv.kernel, conv.kernel, conv.channels // conv.groups)
        weight, bias = rng.standard_normal(shape, "float32"), rng.standard_normal(conv.filters, "float32")
        model = onnx_layers.conv_model(folder / f"{name}.onnx", conv, batch, weight, bias)
        fragment = fragments.float_conv(conv, batch, weight, bias)
        yield FloatLayer(f"{name} to {conv.filters}", conv.layer, fragment, model, conv.macs(batch))
    length, filters = DENSE
    weight, bias = rng.standard_normal((filters, length), "float32"), rng.standard_normal(filters, "float32")
    model = onnx_layers.dense_model(folder / "dense.onnx", batch, weight, bias)
    fragment = fragments.float_dense(length, batch, weight, bias)
    yield FloatLayer(f"dense to {filters}", f"1x1x{length}", fragment, model, batch * length * filters)
    model = onnx_layers.pool_model(folder / "pool.onnx", MAX_POOL, batch)
    yield FloatLayer("3x3 s2 max-pool", MAX_POOL.layer, fragments.max_pool(MAX_POOL, batch), model, None)


def float_records(setting: Setting, layer: FloatLayer, limit: peak.Peak) -> list[Record]:
    """One record for us, padding included, and one for ONNX Runtime, its whole call."""
    feeds = {"x": _nchw(layer.fragment.feeds["x"])}
    peer = peers.float32(layer.model, feeds, setting.threads)
    probes = [
        limit.probe("peak"),
        setting.probe(layer.name, layer.fragment, {ENGINE: ALL_STEPS}),
        call_probe(peers.FLOAT32, peer.call),
    ]
    setting.say(f"timing {layer.name}")
    samples = alternate(probes, setting.seconds * len(probes))
    more: Record = {}
    if layer.macs is not None:
        relative = layer.macs / limit.way.macs_per_call / setting.threads / ratio(samples[ENGINE], samples["peak"])
        more = {"peak_gmacs": _rate(limit.way.macs_per_call, samples["peak"]), "of_fma_peak": relative}
    speedup = ratio(samples[peers.FLOAT32], samples[ENGINE])
    ours = setting.record(layer.layer, "float_conv", **_times(samples[ENGINE], layer.macs), name=layer.name, **more)
    theirs = {**_times(samples[peers.FLOAT32], layer.macs), "engine": peers.FLOAT32, "name": layer.name}
    return [
        {**ours, "speedup": speedup},
        {**setting.record(layer.layer, "float_conv"), **theirs},
    ]


def _nchw(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(x, -1, 1)) if x.ndim == 4 else x


def _times(nanoseconds: Sequence[float], macs: int | None) -> Record:
    """`median_ms` and `min_ms` over the rounds, each round being the median of its block of runs."""
    return {
        "median_ms": statistics.median(nanoseconds) / 1e6,
        "min_ms": min(nanoseconds) / 1e6,
        "gmacs": None if macs is None else _rate(macs, nanoseconds),
    }


def _rate(macs: int, nanoseconds: Sequence[float]) -> float:
    return macs / statistics.median(nanoseconds)


def measure(setting: Setting, orders: Sequence[int], activations: Sequence[str], kinds: Sequence[str]) -> list[Record]:
    """All records, in the order of the table."""
    records: list[Record] = []
    with pinned(setting.threads):
        if "bits" in kinds:
            setting.say("finding the peak of bits")
            limit = peak.best(setting.target)
            clock = peak.build(peak.clock_way(), setting.target)
            for activation in activations:
                for order in orders:
                    if activation == "relu" and order == 1:
                        continue  # every sign is +1: nothing to compute
                    for conv in STAGES:
                        records += bit_records(setting, conv, order, activation, limit, clock)
        if "float" in kinds:
            fma = peak.build(peak.float_way(setting.target), setting.target)
            for layer in float_layers(setting.folder, setting.batch):
                records += float_records(setting, layer, fma)
    return records


def describe(records: Sequence[Record]) -> str:
    """Two tables: binary kernels against the peak, float layers against the peak and the peer."""
    lines: list[str] = []
    bits = [record for record in records if record["kernel"] != "float_conv"]
    if bits:
        loop = next((f", peak {r['peak_gmacs']:.0f} ({r['peak_loop']})" for r in bits if r["kernel"] == "conv"), "")
        lines += [f"binary kernels, {_where(bits[0])}{loop}", _bit_table(bits)]
    floats = [record for record in records if record["kernel"] == "float_conv"]
    if floats:
        lines += [f"float layers, {_where(floats[0])}", _float_table(floats)]
    return "\n".join(lines)


def _where(record: Record) -> str:
    return f"{record['target']}, {record['threads']} thread(s), batch {record['batch']}; GMAC/s"


def _bit_table(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        relation = {
            "conv": lambda r: (
                f"{r['fraction_of_peak']:.1%} of peak, {r['macs_per_cycle']:.0f} a cycle;"
                f" pad {r['pad_ms'] / r['median_ms']:.1%}, α·β in float {r['affine_ms'] / r['median_ms'] - 1:+.1%}"
            ),
            "conv+epilogue": lambda r: f"conv {r['over_conv']:+.1%}",
            "pack": lambda r: f"{r['of_conv']:.1%} of conv",
        }[record["kernel"]](record)
        kernel = " -> ".join(filter(None, (record["kernel"], record.get("outputs"))))
        rows.append((record["layer"], record["order"], record["activation"], kernel, *_columns(record), relation))
    return table(("layer", "K", "input", "kernel", "median us", "min us", "GMAC/s", ""), rows)


def _float_table(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        relations = []
        if "of_fma_peak" in record:
            relations.append(f"{record['of_fma_peak']:.1%} of peak {record['peak_gmacs']:.0f}")
        if "speedup" in record:
            relations.append(f"{record['speedup']:.2f}x as fast as {peers.FLOAT32}")
        rows.append((record["layer"], record["name"], record["engine"], *_columns(record), ", ".join(relations)))
    return table(("layer", "kernel", "engine", "median us", "min us", "GMAC/s", ""), rows)


def _columns(record: Record) -> tuple[float, float, int | None]:
    gmacs = None if record["gmacs"] is None else round(record["gmacs"])
    return round(record["median_ms"] * 1e3, 1), round(record["min_ms"] * 1e3, 1), gmacs


def parser() -> options.Parser:
    """The command line of the shared interface, and what helps in looking at one kernel."""
    top = options.Parser(prog="python -m benchmarks.kernels", description=(__doc__ or "").split("\n\n")[0])
    top.add_argument("--orders", type=orders, default=(1, 2), metavar="1,2", help="planes K (default: 1,2)")
    top.add_argument(
        "--activations",
        type=listed(ACTIVATIONS),
        default=("signed",),
        metavar=",".join(ACTIVATIONS),
        help="what a conv binarises: with relu the first plane is known and dropped (default: signed)",
    )
    top.add_argument(
        "--kinds",
        type=listed(("bits", "float")),
        default=("bits", "float"),
        metavar="bits,float",
        help="which kernels (default: both)",
    )
    options.add_threads_option(top)
    top.add_argument("--batch", type=count, default=1, metavar="N", help="images a call (default: 1)")
    top.add_argument("--target", default=targets.NATIVE, metavar="NAME", help="what to compile for (default: native)")
    top.add_argument(
        "--seconds", type=seconds, default=0.4, metavar="S", help="how long to time each kernel (default: 0.4)"
    )
    top.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the libraries there, to be disassembled")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options.add_json_option(top)
    return top


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the tables, write the records."""
    target = target_that_runs_here(arguments.target)
    if arguments.keep is not None:
        arguments.keep.mkdir(parents=True, exist_ok=True)
    with progress() as say, tempfile.TemporaryDirectory(prefix="horq-kernels-") as scratch:
        folder = arguments.keep or Path(scratch)
        setting = Setting(target, arguments.threads, arguments.batch, arguments.seconds, folder, say)
        records = measure(setting, arguments.orders, arguments.activations, arguments.kinds)
    deliver(records, arguments.json, describe)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 the work failed, 2 the call was mistaken."""
    return execute("kernels", parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
