"""What a build asks of a database: who decides a kernel, and what to say of its layer."""

from __future__ import annotations

from tvm import tirx

from horq_tvm.schedules.decisions import Decide, Recorded, by_default
from horq_tvm.targets import Target

from .database import Best, Database
from .tasks import workload_key


class Lookup:
    """The confirmed records of one target. Without a database every kernel is the default's.

    Where `database` knows nothing of a kernel, not even a measurement, `shipped` is asked: the package's own.
    """

    def __init__(self, database: Database | None, target: Target, shipped: Database | None = None) -> None:
        self._database, self._shipped, self._target = database, shipped, target
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
        decide = self._decided.get(workload_key(func))
        return decide is not None and decide.fits, self._best(func).measurements

    @property
    def stale(self) -> list[str]:
        """The workloads whose records are not of these rules any more: the default was taken.

        Of the user's own database alone, which tuning again mends; nobody can do so with the package's.
        """
        return [key for key, decide in self._decided.items() if not decide.fits and self._knows(key)]

    def _knows(self, key: str) -> bool:
        return self._database is not None and bool(self._database.records(self._target, key))

    def _best(self, func: tirx.PrimFunc) -> Best:
        key = workload_key(func)
        store = self._database if self._knows(key) else self._shipped
        return store.best(self._target, key) if store else Best()
