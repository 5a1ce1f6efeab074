"""The process that compiles and times candidates: one for a whole run, so that the compiler is imported once.

`measure.Worker` starts `main`, which reads pickled requests from its standard input and answers on its standard output.
A candidate that crashes or hangs takes this process with it and nothing else; the next request starts another.
"""

from __future__ import annotations

import itertools
import math
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

WARM_SECONDS = 0.01
SYMBOL = "candidate"
ON_FAST_CORES = 1  # of a device that has two kinds


@dataclass(frozen=True)
class Remote:
    """A device behind an RPC tracker, by its key."""

    host: str
    port: int
    key: str


@dataclass(frozen=True)
class Request:
    """Kernels (as TVM's JSON) to be timed in turn, `repeats` samples of at least `sample_ms` each."""

    funcs: Sequence[str]
    target: Any
    repeats: int
    sample_ms: float


@dataclass(frozen=True)
class Answer:
    """Samples of each kernel, seconds of one call, and what compiling and timing took. `error` says why there are none.

    `lost` is True where the device, not the candidate, is to blame.
    """

    seconds: Sequence[Sequence[float]] = ()
    compile_s: float = 0.0
    measure_s: float = 0.0
    error: str | None = None
    lost: bool = False


class _LostError(Exception):
    """The device is not there (any more)."""


def serve(requests: BinaryIO, answers: BinaryIO, remote: Remote | None) -> None:
    """Answers until the requests end."""
    os.environ["TVM_NUM_THREADS"] = "1"
    _pin()
    device = _Device(remote)
    while True:
        try:
            request: Request = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(_answer(request, device), answers)
        answers.flush()


def _pin() -> None:
    """On the last of the CPUs that we may use, whose neighbour the operating system is not."""
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[-1]})


def _answer(request: Request, device: _Device) -> Answer:
    begin = time.perf_counter()
    compiled = begin
    try:
        with tempfile.TemporaryDirectory(prefix="horq-tune-") as scratch:
            libraries = [_library(func, request.target, Path(scratch), i) for i, func in enumerate(request.funcs)]
            compiled = time.perf_counter()
            seconds = device.time([library for library, _ in libraries], [shapes for _, shapes in libraries], request)
        return Answer(seconds, compiled - begin, time.perf_counter() - compiled)
    except Exception as error:
        message = " ".join(str(error).split())[:300] or type(error).__name__
        return Answer(error=message, lost=isinstance(error, _LostError), compile_s=compiled - begin)


def _library(func: str, target: Any, folder: Path, index: int) -> tuple[Path, list[tuple[tuple[int, ...], str]]]:
    """The kernel as a shared library for the target, and shapes and dtypes of its parameters."""
    import subprocess

    import tvm

    from horq_tvm.emit import kernels, link

    function = tvm.ir.load_json(func)
    obj, out = folder / f"k{index}.o", folder / f"k{index}.so"
    in_place = frozenset({SYMBOL}) if "horq.in_place" in (function.attrs or {}) else frozenset()
    kernels.compile_kernels(tvm.IRModule({SYMBOL: function}), {SYMBOL: SYMBOL}, target.tvm_target(), obj, in_place)
    command = [*link.find_compiler(target.compiler), "-shared", "-nostdlib", "-o", str(out), str(obj), "-lm"]
    subprocess.run(command, check=True, capture_output=True)
    shapes = [(tuple(int(e) for e in p.shape), str(p.dtype)) for p in function.params]
    return out, shapes


class _Device:
    """This machine, or one behind a tracker, whose session lasts as long as it answers."""

    def __init__(self, remote: Remote | None) -> None:
        self._remote = remote
        self._session: Any = None
        self._count = itertools.count()

    def time(
        self, libraries: Sequence[Path], shapes: Sequence[list[tuple[tuple[int, ...], str]]], request: Request
    ) -> list[list[float]]:
        """Samples of each library, taken in turn."""
        import tvm

        if self._remote is None:
            modules = [tvm.runtime.load_module(str(library)) for library in libraries]
            return _time(modules, tvm.cpu(), shapes, request)
        self._connect()
        # A name is used once: the file of a library that is loaded must not be written over.
        names = [f"horq-{os.getpid()}-{next(self._count)}.so" for _ in libraries]
        try:
            for library, name in zip(libraries, names, strict=True):
                self._session.upload(str(library), name)
            modules = [self._session.load_module(name) for name in names]
            found = _time(modules, self._session.cpu(), shapes, request)
            for name in names:
                self._session.remove(name)
            return found
        except Exception as error:
            try:
                self._session.get_function("runtime.config_threadpool")  # does it still answer?
            except Exception as gone:
                self._session = None
                raise _LostError(f"the device under the key {self._remote.key!r} went away") from gone
            raise error

    def _connect(self) -> None:
        if self._session is not None:
            return
        from tvm import rpc

        assert self._remote is not None
        try:
            tracker = rpc.connect_tracker(self._remote.host, self._remote.port)
            if not tracker.summary()["queue_info"].get(self._remote.key, {}).get("free"):
                raise _LostError("the tracker has none that is free")  # a request would wait for one
            self._session = tracker.request(self._remote.key, session_timeout=120, max_retry=1)
            self._session.get_function("runtime.config_threadpool")(ON_FAST_CORES, 1)
        except Exception as error:
            raise _LostError(f"no device under the key {self._remote.key!r}: {error}") from error


def _time(modules: Sequence[Any], device: Any, shapes: Sequence[Any], request: Request) -> list[list[float]]:
    import numpy as np
    import tvm

    rng = np.random.default_rng(0)
    made: dict[Any, Any] = {}

    def tensor(index: int, shape: tuple[int, ...], dtype: str) -> Any:
        key = index, shape, dtype
        if key not in made:
            values = rng.standard_normal(shape) if dtype.startswith("float") else rng.integers(0, 100, shape)
            made[key] = tvm.runtime.tensor(values.astype(dtype), device)
        return made[key]

    arguments = [[tensor(i, *spec) for i, spec in enumerate(specs)] for specs in shapes]
    sizes = []
    for module, args in zip(modules, arguments, strict=True):
        warm = module.time_evaluator(SYMBOL, device, number=1, repeat=3)(*args).results
        once = max(min(warm), 1e-8)
        module.time_evaluator(SYMBOL, device, number=max(1, math.ceil(WARM_SECONDS / once)), repeat=1)(*args)
        sizes.append(max(1, math.ceil(request.sample_ms / 1e3 / once)))
    samples: list[list[float]] = [[] for _ in modules]
    rounds = request.repeats if len(modules) > 1 else 1
    evaluators = [
        module.time_evaluator(SYMBOL, device, number=size, repeat=1 if rounds > 1 else request.repeats)
        for module, size in zip(modules, sizes, strict=True)
    ]
    for _ in range(rounds):
        for kept, evaluator, args in zip(samples, evaluators, arguments, strict=True):
            kept.extend(float(value) for value in evaluator(*args).results)
    return samples


def main() -> None:
    """The process: the pickled Remote (or None) is its argument, in hexadecimal digits."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get among the answers
    serve(sys.stdin.buffer, answers, pickle.loads(bytes.fromhex(sys.argv[1])))
