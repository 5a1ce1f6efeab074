"""Engines ready to run one network, and their timing: in turn in one process, in blocks of consecutive runs."""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tvm
from tvm import relax
from tvm.relax.frontend.onnx import from_onnx

import horq_tvm
from horq_tvm import peers, targets
from horq_tvm.errors import HorqError
from horq_tvm.runtime.loader import LoadedModel
from horq_tvm.specs import Scale

from .. import peak
from ..measure import Probe, aligned_copy, alternate, pinned
from .arithmetic import BINARY, FLOAT32, INT8, Rates, Work, layer_work
from .subjects import Subject, calibration

OURS, TVM = "horq-tvm", "tvm"
PEERS = (peers.FLOAT32, peers.INT8, TVM)
BLOCK_NS = 30_000_000
COLD = " cold"

Feeds = Mapping[str, np.ndarray]
Samples = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Setting:
    """What all engines of a run share, `threads` being the numbers of them to be compared. `seconds` each is timed."""

    target: targets.Target
    threads: tuple[int, ...]
    batch: int
    seconds: float
    say: Callable[[str], None] = lambda _doing: None


@dataclass(frozen=True)
class Engine:
    """A network on an engine; `label` is unique in a run. What begins with `order` is of ours alone."""

    name: str
    label: str
    call: Callable[[], object]
    threads: int = 1
    form: str | None = None
    order: int | None = None
    scale: Scale | None = None
    rest: str | None = None
    activation: str | None = None
    library: Library | None = None


@dataclass(frozen=True)
class Library:
    """What we made of a network: the library, the names of its steps, and the arithmetic of its layers by name."""

    model: LoadedModel
    steps: tuple[str, ...]
    work: Mapping[str, Work]


def rests_of(model: LoadedModel) -> dict[str, str | None]:
    """Of each layer the arithmetic where it is not binary; a layer that cannot be int8 stays float32."""
    return {layer.name: layer.rest for layer in model.manifest.layers}


def ours(setting: Setting, subject: Subject, order: int, scale: Scale, rest: str, feeds: Feeds) -> Iterator[Engine]:
    """Compiled for the target, once for all numbers of threads.

    What `build` says of a rewrite without training is no matter here.
    """
    label = f"{OURS} K={order} {scale} {rest} {subject.activation}"
    setting.say(f"{subject.name}: compiling {label}")
    options = subject.arguments(order, scale)
    if rest != FLOAT32:
        options["rest"] = rest
    if options:
        options["calibration"] = calibration(subject)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        compiled = horq_tvm.build(subject.horq(order, scale), setting.target, input_shapes=subject.shapes, **options)
    aligned = {name: aligned_copy(array) for name, array in feeds.items()}
    work = layer_work(subject, order, scale, rests_of(compiled.load()))
    for threads in setting.threads:
        model = compiled.load(threads)
        yield Engine(
            OURS,
            label + _with(threads),
            partial(model, **aligned),
            threads,
            order=order,
            scale=scale,
            rest=rest,
            activation=subject.activation,
            library=Library(model, tuple(step.name for step in model.profile(runs=1, **aligned)), work),
        )


def _with(threads: int) -> str:
    """What tells labels apart."""
    return "" if threads == 1 else f" threads={threads}"


def rivals(setting: Setting, subject: Subject, names: Sequence[str], feeds: Feeds, threads: int) -> list[Engine]:
    """The peers of those names on so many threads; int8 in both of its forms.

    Raises:
        HorqError: a peer cannot run the network.
    """
    engines = []
    path = subject.twin()
    if peers.FLOAT32 in names:
        engines.append(_rival(peers.float32(path, feeds, threads), threads))
    if peers.INT8 in names:
        setting.say(f"{subject.name}: quantising for {peers.INT8}")
        with _quiet():
            found = peers.int8(path, feeds, threads, calibration(subject))
            engines += [_rival(peer, threads) for peer in found]
    if TVM in names:
        setting.say(f"{subject.name}: compiling with TVM alone")
        engines.append(Engine(TVM, TVM + _with(threads), plain_tvm(path, setting, feeds, threads), threads))
    return engines


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back what the quantiser tells the root logger: which weights it could not take by channel."""
    log = logging.getLogger()
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _rival(peer: peers.Peer, threads: int) -> Engine:
    label = f"{peer.engine} {peer.form or ''}".strip() + _with(threads)
    return Engine(peer.engine, label, peer.call, threads, form=peer.form)


def plain_tvm(path: Path, setting: Setting, feeds: Feeds, threads: int) -> Callable[[], object]:
    """TVM's own importer, default pipeline and virtual machine, nothing tuned.

    Raises:
        HorqError: TVM cannot compile it; it says why.
    """
    shapes = {name: list(array.shape) for name, array in feeds.items()}
    try:
        mod = from_onnx(onnx.load(path), shape_dict=shapes, keep_params_in_input=False)
        with setting.target.tvm_target():
            executable = tvm.compile(mod, setting.target.tvm_target())
    except Exception as error:  # TVM raises what its many passes raise
        raise HorqError(f"{path}: TVM cannot compile it: {str(error).strip().splitlines()[-1]}") from error
    machine = relax.VirtualMachine(executable, tvm.cpu())
    configure = tvm.get_global_func("runtime.config_threadpool")
    arrays = [tvm.runtime.tensor(feeds[str(parameter.name)]) for parameter in mod["main"].params]

    def call() -> object:
        configure(1, threads)  # of the whole process; nothing to do where it is so already
        return machine["main"](*arrays)

    return call


def block_probe(name: str, call: Callable[[], object], threads: int = 1) -> Probe:
    """Consecutive runs for about `BLOCK_NS`, as one who uses a network would run it, nanoseconds by name.

    The first run of a block finds the caches full of another engine's weights. It is not in the median: its time is
    `name` + `COLD`.
    """
    clock = time.perf_counter_ns

    def timed() -> int:
        begin = clock()
        call()
        return clock() - begin

    call()
    count = block_length(timed())

    def run() -> dict[str, float]:
        with pinned(threads):
            first, *others = (timed() for _ in range(count))
        return {name: float(statistics.median(others)), name + COLD: float(first)}

    return run


def block_length(nanoseconds: float) -> int:
    """Runs in a block, the first included."""
    return 1 + max(1, round(BLOCK_NS / max(nanoseconds, 1)))


def steps_probe(label: str, model: LoadedModel, feeds: Feeds, threads: int = 1) -> Probe:
    """The library's own profile: nanoseconds of each step, as `step_names` calls them."""
    aligned = {name: aligned_copy(array) for name, array in feeds.items()}
    runs = block_length(sum(step.median_ns for step in model.profile(runs=3, **aligned)))

    def run() -> dict[str, float]:
        with pinned(threads):
            steps = model.profile(runs=runs, **aligned)
        return {name: float(step.median_ns) for name, step in zip(step_names(label, len(steps)), steps, strict=True)}

    return run


def step_names(label: str, count: int) -> list[str]:
    """What the steps of an engine are called among the samples."""
    return [f"{label} step {i}" for i in range(count)]


@dataclass(frozen=True)
class Peaks:
    """The register-only loops of each kind of arithmetic."""

    by_kind: Mapping[str, peak.Peak]

    @classmethod
    def find(cls, target: targets.Target) -> Peaks:
        """Those of the target, on this machine."""
        ways = {FLOAT32: peak.float_way(target), INT8: peak.int8_way(target)}
        return cls({BINARY: peak.best(target), **{kind: peak.build(way, target) for kind, way in ways.items()}})

    def probes(self) -> list[Probe]:
        """One a kind, on one core."""
        return [_on_one_core(found.probe(f"peak {kind}")) for kind, found in self.by_kind.items()]

    def rates(self, samples: Samples) -> Rates:
        """Multiply-accumulates a nanosecond of one core, by kind."""
        return {
            kind: found.way.macs_per_call / statistics.median(samples[f"peak {kind}"])
            for kind, found in self.by_kind.items()
        }


def _on_one_core(probe: Probe) -> Probe:
    def run() -> dict[str, float]:
        with pinned(1):
            return dict(probe())

    return run


def time_in_turn(setting: Setting, engines: Sequence[Engine], peaks: Peaks, feeds: Feeds) -> dict[str, list[float]]:
    """Nanoseconds, one value a round: of an engine its block's median and first run, of ours the steps too."""
    probes: list[Probe] = peaks.probes()
    for engine in engines:
        probes.append(block_probe(engine.label, engine.call, engine.threads))
        if engine.library is not None:
            probes.append(steps_probe(engine.label, engine.library.model, feeds, engine.threads))
    return alternate(probes, setting.seconds * len(engines))


def fastest(engines: Sequence[Engine], samples: Samples) -> list[Engine]:
    """The engines, of each peer's forms the fastest alone."""
    kept: dict[Any, Engine] = {}
    for engine in engines:
        key = (engine.name, engine.threads, engine.order, engine.scale, engine.rest, engine.activation)
        other = kept.get(key)
        if other is None or statistics.median(samples[engine.label]) < statistics.median(samples[other.label]):
            kept[key] = engine
    return list(kept.values())
