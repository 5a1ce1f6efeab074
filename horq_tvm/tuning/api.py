"""`horq_tvm.tune`: a model and a device in, a database out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tvm

from horq_tvm import compiler, pipeline, targets
from horq_tvm.errors import HorqError, UsageError

from . import remote, tasks
from .candidates import Candidate
from .confirm import confirm
from .database import Database, Record, median, target_key
from .measure import Worker
from .search import Search, State
from .worker import Answer


@dataclass(frozen=True)
class Progress:
    """How far a run is: what it works on, measurements of those asked for, seconds (None: no limit known yet)."""

    doing: str
    done: int
    trials: int
    best_ms: float | None = None
    default_ms: float | None = None
    left_s: float | None = None


@dataclass(frozen=True)
class TunedTask:
    """What became of a kernel. Milliseconds of one call are those of the confirming run, in which both took turns."""

    name: str
    layers: tuple[str, ...]
    calls: int
    workload: str
    records: int
    default_ms: float | None
    best_ms: float | None
    used: bool
    decisions: dict[str, int | str]


@dataclass(frozen=True)
class TuneReport:
    """What a run did: its kernels, how many measurements it added, and where the time went (seconds)."""

    target: str
    database: str
    trials: int
    added: int
    failed: int
    tasks: tuple[TunedTask, ...]
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def tune(
    model: Any,
    target: str | targets.Target = "native",
    *,
    trials: int,
    database: str | Path,
    minutes: float | None = None,
    seed: int = 0,
    rpc: str | None = None,
    key: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> TuneReport:
    """Measures schedules of a model's kernels on a device and keeps what it finds in a database that builds use.

    Args:
        model: as `build` takes it, and so are `options` (order, scale, plan, calibration, input_shapes, rest, ...).
        target: the device's target; this machine's unless `rpc` is given.
        trials: how many measurements of these kernels the database shall hold in the end. A run that was killed goes on
            where it was; one that has been through asks for more.
        database: the folder; made where it is missing.
        minutes: an end by the clock, whatever is left of the trials.
        seed: of what is drawn.
        rpc: HOST:PORT of a TVM RPC tracker; every device under `key` measures, this machine only compiles.
        progress: called before and after each measurement.

    Raises:
        UsageError: a mistake in the call, or nothing to tune. HorqError: no device, one that went away and left none
            behind, a database that cannot be read.
    """
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise UsageError(f"trials: found {trials!r}; accepted: a number from 1")
    if minutes is not None and not 0 < minutes < float("inf"):
        raise UsageError(f"minutes: found {minutes!r}; accepted: a number above 0")
    resolved = target if isinstance(target, targets.Target) else targets.resolve(target)
    if resolved.family == "cuda":
        raise UsageError(f"target {resolved.name}: kernels for a card are not tuned; accepted: a target that is a CPU")
    tell = progress or (lambda _progress: None)
    begin = time.monotonic()
    devices = remote.devices(rpc, key) or [None]
    if devices == [None] and (missing := resolved.missing_on(targets.this_host().flags)):
        raise UsageError(
            f"target {resolved.name}: this machine lacks {', '.join(missing)}; accepted: a target that runs here, or"
            " --rpc with a device of that kind"
        )
    store = Database.open(database, create=True)
    tell(Progress("importing the model", 0, trials))
    algorithms, layer_of = _algorithms(model, resolved, options)
    found = tasks.extract(algorithms, resolved, layer_of)
    if not found:
        raise UsageError("nothing to tune: no kernel of this model leaves anything open")
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(resolved, device)) for device in devices]
        run = _Run(Search(found, resolved, store, seed), workers, store, resolved, seed, trials, tell)
        deadline = None if minutes is None else begin + 60 * minutes
        run.measure(deadline)
        return run.report(begin)


def _algorithms(model: Any, target: targets.Target, options: dict[str, Any]) -> tuple[tvm.IRModule, dict[str, str]]:
    """The model's kernels before they are scheduled, and the layer of each that has one."""
    rewritten = compiler.rewritten(model, target, **options)
    with target.tvm_target():
        grouped = pipeline.optimise(target)(rewritten)
        return pipeline.kernels(target)(grouped), compiler.layers_of_kernels(grouped)


@dataclass
class _Run:
    search: Search
    workers: list[Worker]
    store: Database
    target: targets.Target
    seed: int
    trials: int
    tell: Callable[[Progress], None]
    added: int = 0
    failed: int = 0

    @property
    def done(self) -> int:
        """Measurements of these kernels in the database."""
        return sum(len(state.measured) for state in self.search.states)

    def measure(self, deadline: float | None) -> None:
        """Until there are as many measurements as asked for, every space is measured through, or time is up."""
        begin, before = time.monotonic(), self.done
        with ThreadPoolExecutor(max(1, len(self.workers))) as pool:
            while self.done < self.trials and (deadline is None or time.monotonic() < deadline):
                proposed = self.search.next(self.trials - self.done)
                if proposed is None:
                    return
                state, batch = proposed
                while batch and (deadline is None or time.monotonic() < deadline):
                    left = self._left(begin, before, deadline)
                    self._tell(state, left)
                    now, batch = batch[: len(self.workers)], batch[len(self.workers) :]
                    answers = list(pool.map(_measure, self.workers, now))
                    self._keep(state, now, answers)
                    self._tell(state, left)

    def _keep(self, state: State, measured: Sequence[Candidate], answers: Sequence[Answer]) -> None:
        gone = [worker for worker, answer in zip(self.workers, answers, strict=False) if answer.lost]
        self.workers = [worker for worker in self.workers if worker not in gone]
        if not self.workers:
            why = next(answer.error for answer in answers if answer.lost)
            raise HorqError(f"{why}; {self.done} measurements are in the database, the same call goes on with them")
        kept = []
        for candidate, answer in zip(measured, answers, strict=True):
            if answer.lost:
                continue
            self.search.spent.compiling += answer.compile_s
            self.search.spent.measuring += answer.measure_s
            self.search.spent.compiled += 1
            seconds = tuple(answer.seconds[0]) if answer.seconds else ()
            record = Record(
                dict(candidate.decisions),
                seconds,
                answer.error,
                rule=state.task.rule,
                seed=self.seed,
                compiler=f"tvm {tvm.__version__}",
            )
            self.failed += answer.error is not None
            kept.append((candidate, record))
        self._stop_at_a_wrong_device(state, kept)
        self.search.add(state, kept)
        self.added += len(kept)

    def _stop_at_a_wrong_device(self, state: State, kept: Sequence[tuple[Candidate, Record]]) -> None:
        """A default that fails is no bad candidate: the device, or the target, is not what was asked for."""
        for candidate, record in kept:
            if candidate.point == state.default.point and record.error is not None:
                raise HorqError(
                    f"the default kernel {state.task.name} does not run for target {self.target.name}"
                    f" ({self.target.mtriple}, {self.target.mcpu}) on that device: {record.error}; accepted: the target"
                    " of the device"
                )

    def _tell(self, state: State, left: float | None) -> None:
        best, default = state.best, state.default_seconds
        known = default < float("inf")
        self.tell(
            Progress(
                state.task.layers[0] if state.task.layers else state.task.name,
                self.done,
                self.trials,
                best.median * 1e3 if best else None,
                default * 1e3 if known else None,
                left,
            )
        )

    def _left(self, begin: float, before: int, deadline: float | None) -> float | None:
        spent, made = time.monotonic() - begin, self.done - before
        by_trials = spent / made * (self.trials - self.done) if made else None
        by_clock = None if deadline is None else max(0.0, deadline - time.monotonic())
        known = [value for value in (by_trials, by_clock) if value is not None]
        return min(known, default=None)

    def report(self, begin: float) -> TuneReport:
        """Confirms every pick, and says what became of each kernel."""
        found = []
        for state in self.search.states:
            self.tell(Progress(f"confirming {state.task.name}", self.done, self.trials))
            record = confirm(state, self.target, self.store, self.workers[0], self.seed)
            found.append(_tuned(state, record))
        spent = self.search.spent
        seconds = {
            "total": time.monotonic() - begin,
            "measuring": spent.measuring,
            "compiling": spent.compiling,
            "searching": spent.searching,
            "compiling_each": spent.compiling / max(1, spent.compiled),
        }
        folder = str(self.store.folder / target_key(self.target))
        return TuneReport(self.target.name, folder, self.trials, self.added, self.failed, tuple(found), seconds)


def _measure(worker: Worker, candidate: Candidate) -> Answer:
    return worker.measure(candidate.func)


def _tuned(state: State, record: Record | None) -> TunedTask:
    task, best = state.task, state.best
    known = state.default_seconds < float("inf")
    default_ms, best_ms = state.default_seconds * 1e3 if known else None, best.median * 1e3 if best else None
    if record is not None and record.seconds:
        default_ms, best_ms = median(record.default_seconds) * 1e3, record.median * 1e3
    return TunedTask(
        task.name,
        task.layers,
        task.calls,
        task.workload,
        len(state.measured),
        default_ms,
        best_ms,
        bool(record and record.used),
        dict(record.decisions) if record and record.used else {},
    )
