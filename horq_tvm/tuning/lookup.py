"""What a build asks of a database: who decides a kernel, and what to say of its layer."""

from __future__ import annotations

from tvm import tirx

from horq_tvm.schedules.decisions import Decide, Recorded, by_default
from horq_tvm.targets import Target

from .database import Best, Database
from .tasks import workload_key


class Lookup:
    """The confirmed records of one target. Without a database every kernel is the default's."""

    def __init__(self, database: Database | None, target: Target) -> None:
        self._database, self._target = database, target
        self._decided: dict[str, Recorded] = {}

    def choose(self, func: tirx.PrimFunc) -> Decide:
        """Who decides for a kernel that is not scheduled yet."""
        best = self._best(func)
        if best.decisions is None:
            return by_default
        decide = Recorded(best.decisions)
        self._decided[workload_key(func)] = decide
        return decide

    def of(self, func: tirx.PrimFunc) -> tuple[bool, int]:
        """Whether the kernel, which was scheduled by `choose`, is a tuned one, and how many measurements there are."""
        decide = self._decided.get(workload_key(func)) if self._database else None
        return decide is not None and decide.fits, self._best(func).measurements

    @property
    def stale(self) -> list[str]:
        """The workloads whose records are not of these rules any more: the default was taken."""
        return [key for key, decide in self._decided.items() if not decide.fits]

    def _best(self, func: tirx.PrimFunc) -> Best:
        return self._database.best(self._target, workload_key(func)) if self._database else Best()
