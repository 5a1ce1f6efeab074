"""A point of a kernel's space, and its schedule: the rule runs anew for each, as its choices steer what it does.

(MetaSchedule would replay a trace with other samples, which keeps what Python did with the first ones.)
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from tvm import s_tir, tirx
from tvm.s_tir import meta_schedule as ms

from horq_tvm.relay_passes.schedule_kernels import schedule
from horq_tvm.schedules.decisions import Decisions, Option, Recorded, Sampled
from horq_tvm.targets import Target

Point = tuple[tuple[str, Option], ...]


@dataclass(frozen=True)
class Candidate:
    """Decisions, and the kernel that they make."""

    decisions: Decisions
    func: tirx.PrimFunc

    @property
    def point(self) -> Point:
        return point(self.decisions)

    def for_model(self) -> ms.MeasureCandidate:
        """As the cost model takes it."""
        return ms.MeasureCandidate(s_tir.Schedule(self.func), ms.arg_info.ArgInfo.from_prim_func(self.func))


def point(decisions: Decisions) -> Point:
    """Decisions as a key."""
    return tuple(sorted(decisions.items()))


def default(func: tirx.PrimFunc, target: Target) -> Candidate:
    """What the analytic model takes."""
    return _made(func, target, Recorded({}))


def recorded(func: tirx.PrimFunc, target: Target, decisions: Decisions) -> Candidate | None:
    """The candidate of a record, None where the rule does not offer that any more."""
    decide = Recorded(decisions)
    made = _made(func, target, decide)
    return made if decide.fits else None


def sampled(func: tirx.PrimFunc, target: Target, rng: random.Random) -> Candidate:
    """A point at random."""
    return _made(func, target, Sampled(rng))


def mutated(func: tirx.PrimFunc, target: Target, parent: Decisions, rng: random.Random) -> Candidate:
    """`parent` with one choice made anew, and those that are not offered any more behind it."""
    kept = dict(parent)
    if kept:
        del kept[rng.choice(sorted(kept))]
    return _made(func, target, Sampled(rng, kept))


def _made(func: tirx.PrimFunc, target: Target, decide: Recorded) -> Candidate:
    made = schedule(func, target, decide)
    return Candidate(decide.taken, made)
