"""Measuring candidates, as a runner that outlives what it measures."""

from __future__ import annotations

import os
import pickle
import select
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType

import tvm
from tvm import tirx

from horq_tvm.targets import Target

from .worker import SYMBOL, Answer, Remote, Request

REPEATS = 12
SAMPLE_MS = 2.0
CONFIRM_REPEATS = 25
TIMEOUT_S = 60.0
START = "from horq_tvm.tuning import worker; worker.main()"
OUTLIER = 3.0  # median absolute deviations


class Worker:
    """The measuring process. Started when first needed, and again after a candidate that took it down."""

    def __init__(self, target: Target, remote: Remote | None = None, timeout_s: float = TIMEOUT_S) -> None:
        self._target = target
        self._remote = remote
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self.starts = 0

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def measure(self, func: tirx.PrimFunc) -> Answer:
        """Samples of one kernel, outliers discarded."""
        return self._ask([func], REPEATS)

    def compare(self, funcs: Sequence[tirx.PrimFunc]) -> Answer:
        """Samples of several, in turn (A B A B ...), outliers discarded."""
        return self._ask(funcs, CONFIRM_REPEATS)

    def stop(self) -> None:
        """Ends the process; the next request starts one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    stream.close()
            self._process = None

    def _ask(self, funcs: Sequence[tirx.PrimFunc], repeats: int) -> Answer:
        texts = [tvm.ir.save_json(func.with_attr("global_symbol", SYMBOL)) for func in funcs]
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump(Request(texts, self._target, repeats, SAMPLE_MS), process.stdin)
            process.stdin.flush()
            if not select.select([process.stdout], [], [], self._timeout_s)[0]:
                self.stop()
                return Answer(error=f"took longer than {self._timeout_s:g} s")
            answer: Answer = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            code = process.wait()
            self.stop()
            return Answer(error=f"the measuring process ended ({-code if code < 0 else code})")
        return Answer(
            [without_outliers(samples) for samples in answer.seconds],
            answer.compile_s,
            answer.measure_s,
            answer.error,
            answer.lost,
        )

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            command = [sys.executable, "-c", START, pickle.dumps(self._remote).hex()]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )
            self.starts += 1
        return self._process


def without_outliers(samples: Sequence[float]) -> tuple[float, ...]:
    """Those within 3 median absolute deviations of the median (or 1 % of it, where most are equal)."""
    middle = _median(samples)
    spread = max(_median([abs(value - middle) for value in samples]), middle * 0.01 / OUTLIER)
    return tuple(value for value in samples if abs(value - middle) <= OUTLIER * spread)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]
