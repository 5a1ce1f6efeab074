"""The final pick against the default, in one run and in turn. What is not faster is not used; the record says so."""

from __future__ import annotations

from dataclasses import replace

from horq_tvm.targets import Target

from . import candidates
from .database import Database, Record, median
from .measure import Worker
from .search import State

FASTER = 0.99  # of the default's median: within 1 % of it two kernels are one


def faster(mine: tuple[float, ...], theirs: tuple[float, ...]) -> bool:
    """By the median and by the least sample: another process on the core takes turns too, and may meet one of them."""
    return median(mine) < FASTER * median(theirs) and min(mine) < FASTER * min(theirs)


def confirm(state: State, target: Target, database: Database, worker: Worker, seed: int) -> Record | None:
    """Confirms the best candidate of a task unless the last confirmation was of the same; None where there is none."""
    best = state.best
    if best is None or state.default.point not in state.measured:
        return None
    known = [r for r in database.records(target, state.task.workload) if r.kind == "confirmation"]
    if known and candidates.point(known[-1].decisions) == candidates.point(best.decisions):
        return known[-1]
    if not known and candidates.point(best.decisions) == state.default.point:
        return None
    made = candidates.recorded(state.task.func, target, best.decisions)
    if made is None:
        return None
    record = Record(best.decisions, kind="confirmation", rule=state.task.rule, seed=seed, compiler=best.compiler)
    if made.point != state.default.point:
        answer = worker.compare([made.func, state.default.func])
        if answer.error is not None:
            return None
        mine, theirs = (tuple(samples) for samples in answer.seconds)
        used = faster(mine, theirs)
        record = replace(record, seconds=mine, default_seconds=theirs, used=used)
    database.append(target, state.task.workload, record)
    return record
