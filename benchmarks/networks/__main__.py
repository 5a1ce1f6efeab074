"""The command: networks, orders, scales and rests against the peers, as tables and as records."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from horq_tvm import peers, targets
from horq_tvm.cli import options
from horq_tvm.cli.show import progress
from horq_tvm.specs import RESTS, SCALES

from .. import arguments
from ..command import deliver, execute, target_that_runs_here
from ..measure import pinned
from . import engines, report, subjects
from .engines import Engine, Peaks, Setting
from .report import Record
from .subjects import Subject

NOBODY = "none"


def measure(given: argparse.Namespace, setting: Setting, folder: Path) -> Iterator[Record]:
    """The records, network by network and batch by batch; all engines of one take turns, whatever their setting."""
    with pinned(1):
        peaks = Peaks.find(setting.target)
    for name in given.network:
        for batch in given.batch:
            yield from _measured(given, replace(setting, batch=batch), name, peaks, folder)


def _measured(given: argparse.Namespace, setting: Setting, name: str, peaks: Peaks, folder: Path) -> Iterator[Record]:
    """The records of a network and batch."""
    variants = subjects.find(name, setting.batch, given.activations, given.twin, folder)
    feeds = subjects.feeds(variants[0])
    found = [engine for variant in variants for engine in _ours(given, setting, variant)]
    for threads in setting.threads:
        found += engines.rivals(setting, variants[0], given.peers, feeds, threads)
    setting.say(f"{variants[0].name}: timing {len(found)} engines")
    samples = engines.time_in_turn(setting, found, peaks, feeds)
    kept = engines.fastest(found, samples)
    for engine in kept:
        yield report.record(setting, variants[0].name, engine, kept, samples, peaks)


def _ours(given: argparse.Namespace, setting: Setting, subject: Subject) -> Iterator[Engine]:
    """Every order, scale and rest, but for order 1 behind ReLUs: every sign is +1 there, and nothing to compute."""
    feeds = subjects.feeds(subject)
    for order in given.orders:
        for scale in given.scales:
            for rest in given.rest:
                if order > 1 or subject.activation != "relu":
                    yield from engines.ours(setting, subject, order, scale, rest, feeds)


def parser() -> options.Parser:
    """The command line of the shared interface, and which peers, inputs and float twin."""
    summary = "Time whole networks against ONNX Runtime in turn, and say where the time goes."
    top = options.Parser(prog="python -m benchmarks.networks", description=summary)

    def listed(option: str, accepted: Sequence[str], default: Sequence[str], text: str) -> None:
        kind = arguments.listed(accepted)
        joined = ",".join(default)
        top.add_argument(
            option, type=kind, default=tuple(default), metavar=",".join(accepted), help=f"{text} (default: {joined})"
        )

    top.add_argument(
        "--network",
        type=lambda text: tuple(dict.fromkeys(text.split(","))),
        default=("resnet18",),
        metavar="NAME,...",
        help=f"{', '.join(subjects.NAMES)}, or a float .onnx file (default: resnet18)",
    )
    top.add_argument("--orders", type=arguments.orders, default=(1, 2), metavar="1,2", help="planes K (default: 1,2)")
    listed("--scales", SCALES, ("static",), "where a plane's scale is taken")
    listed("--rest", RESTS, ("float32",), "what layers are that are not binary")
    listed(
        "--activations",
        subjects.ACTIVATIONS,
        ("signed",),
        "what layers binarise; behind a ReLU the first plane is dropped, and order 1 left out",
    )
    listed("--peers", (*engines.PEERS, NOBODY), peers.NAMES, "engines to time in turn with ours")
    top.add_argument(
        "--twin",
        choices=subjects.TWINS,
        default="deployed",
        help="the peers' network: as one deploys it in float (BN folded, ReLUs), or with our BNs and PReLUs",
    )
    for option, text in (("--threads", "threads of a run, timed in turn"), ("--batch", "images a call")):
        top.add_argument(option, type=arguments.counts, default=(1,), metavar="1,2", help=f"{text} (default: 1)")
    top.add_argument("--target", default=targets.NATIVE, metavar="NAME", help="what to compile for (default: native)")
    top.add_argument(
        "--seconds", type=arguments.seconds, default=2.0, metavar="S", help="how long to time each engine (default: 2)"
    )
    top.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the ONNX files there")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options.add_json_option(top)
    return top


def run(given: argparse.Namespace) -> None:
    """Measure, print the tables, write the records."""
    target = target_that_runs_here(given.target)
    if given.keep is not None:
        given.keep.mkdir(parents=True, exist_ok=True)
    with progress() as say, tempfile.TemporaryDirectory(prefix="horq-networks-") as scratch:
        setting = Setting(target, given.threads, given.batch[0], given.seconds, say)
        records = list(measure(given, setting, given.keep or Path(scratch)))
    deliver(records, given.json, report.describe)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 the work failed, 2 the call was mistaken."""
    return execute("networks", parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
