"""The search: MetaSchedule's cost model (gradient-boosted trees over features of each store) over our own spaces.

Each round takes the task that promises most, draws candidates (at random, and by changing one choice of the best ones),
lets the model rank them and measures the best of them with one at random, so that it goes on learning. Records that the
database has are what the search starts from and are not measured again.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import tvm
from tvm.s_tir import meta_schedule as ms

from horq_tvm.targets import Target

from . import candidates
from .candidates import Candidate, Point
from .database import Database, Record
from .tasks import Task

ROUND = 8  # measurements between two updates of the model
DRAWN = 32  # candidates that the model ranks in a round
PARENTS = 4
WARM_UP = 16  # measurements before the model has a say
ATTEMPTS = 60  # draws without a new point after which a space counts as measured through


@dataclass
class Spent:
    """Seconds of wall time, by what they went to."""

    measuring: float = 0.0
    compiling: float = 0.0
    searching: float = 0.0
    compiled: int = 0


@dataclass
class State:
    """What is known of a task; filled from the database, then by measurements."""

    task: Task
    context: Any
    default: Candidate
    measured: dict[Point, Record] = field(default_factory=dict)
    exhausted: bool = False

    @property
    def default_seconds(self) -> float:
        """Infinite before it was measured."""
        record = self.measured.get(self.default.point)
        return record.median if record else float("inf")

    @property
    def best(self) -> Record | None:
        """The fastest there is."""
        found = [record for record in self.measured.values() if record.error is None]
        return min(found, key=lambda record: record.median, default=None)

    @property
    def promise(self) -> float:
        """Seconds a run of the model that this kernel takes, per measurement already spent on it."""
        seconds = self.best.median if self.best else 0.0
        return self.task.calls * seconds / (1 + len(self.measured))


class Search:
    """The tasks of a run, their records, and the model that they share."""

    def __init__(self, tasks: Sequence[Task], target: Target, database: Database, seed: int) -> None:
        self._target, self._database, self._seed = target, database, seed
        self.spent = Spent()
        # One thread: the candidate is measured on the other cores' time otherwise.
        self._model = ms.cost_model.XGBModel(num_warmup_samples=WARM_UP, num_tuning_cores=1)
        self.states = [self._state(task) for task in tasks]
        for state in self.states:
            self._learn(state, list(state.measured.values()))

    def _state(self, task: Task) -> State:
        with _without_tensor_intrinsics():
            context = ms.TuneContext(mod=task.func, target=self._target.tvm_target(), num_threads=1)
        state = State(task, context, candidates.default(task.func, self._target))
        for record in self._database.records(self._target, task.workload):
            if record.kind == "measurement":
                state.measured[candidates.point(record.decisions)] = record
        return state

    def next(self, room: int) -> tuple[State, list[Candidate]] | None:
        """A task and at most `room` candidates of it to measure; None when every space is measured through.

        The defaults come first, heaviest task first: they say what share of the time a task has.
        """
        begin = time.perf_counter()
        try:
            for state in self.states:
                if state.default.point not in state.measured:
                    return state, [state.default]
            while open_states := [state for state in self.states if not state.exhausted]:
                state = max(open_states, key=lambda s: s.promise)
                found = self._propose(state, min(room, ROUND))
                if found:
                    return state, found
                state.exhausted = True
            return None
        finally:
            self.spent.searching += time.perf_counter() - begin

    def _propose(self, state: State, count: int) -> list[Candidate]:
        # Its own stream for each round, so that a run that was resumed draws what it would have drawn.
        rng = random.Random(f"{self._seed}:{state.task.workload}:{len(state.measured)}")
        drawn = self._draw(state, rng)
        if not drawn:
            return []
        scores = self._scores(state, drawn, rng)
        ranked = [candidate for _, candidate in sorted(zip(scores, drawn, strict=True), key=lambda pair: -pair[0])]
        chosen = ranked[: max(1, count - 1)]
        rest = ranked[len(chosen) :]
        return [*chosen, rng.choice(rest)] if rest and len(chosen) < count else chosen[:count]

    def _draw(self, state: State, rng: random.Random) -> list[Candidate]:
        """New points, half of them near the best that are known."""
        valid = sorted((r for r in state.measured.values() if r.error is None), key=lambda record: record.median)
        found: dict[Point, Candidate] = {}
        failed = 0
        while len(found) < DRAWN and failed < ATTEMPTS:
            func = state.task.func
            if valid and rng.random() < 0.5:
                made = candidates.mutated(func, self._target, rng.choice(valid[:PARENTS]).decisions, rng)
            else:
                made = candidates.sampled(func, self._target, rng)
            if made.point in state.measured or made.point in found:
                failed += 1
            else:
                found[made.point] = made
        return list(found.values())

    def _scores(self, state: State, drawn: Sequence[Candidate], rng: random.Random) -> list[float]:
        if self._model.data_size < WARM_UP or self._model.booster is None:
            return [rng.random() for _ in drawn]
        return [float(s) for s in self._model.predict(state.context, [candidate.for_model() for candidate in drawn])]

    def add(self, state: State, measured: Sequence[tuple[Candidate, Record]]) -> None:
        """Stores records: in the database at once, then as what the model learns from."""
        begin = time.perf_counter()
        for candidate, record in measured:
            self._database.append(self._target, state.task.workload, record)
            state.measured[candidate.point] = record
        self._learn(state, [record for _, record in measured], [candidate for candidate, _ in measured])
        self.spent.searching += time.perf_counter() - begin

    def _learn(self, state: State, records: Sequence[Record], known: Sequence[Candidate] | None = None) -> None:
        pairs = []
        for index, record in enumerate(records):
            made = known[index] if known else candidates.recorded(state.task.func, self._target, record.decisions)
            if made is not None and record.error is None:
                seconds = [tvm.tirx.FloatImm("float32", value) for value in record.seconds]
                pairs.append((made.for_model(), ms.runner.RunnerResult(seconds, None)))
        if pairs:
            self._model.update(state.context, [made for made, _ in pairs], [result for _, result in pairs])


@contextmanager
def _without_tensor_intrinsics() -> Iterator[None]:
    """A TuneContext imports 248 intrinsics of all targets, which no rule of ours names; parsing them takes seconds.

    (Minutes under a deep stack, which the parser walks through for each.)
    """
    name = "tvm.s_tir.tensor_intrin"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = ModuleType(name)
    try:
        yield
    finally:
        del sys.modules[name]
