"""A library of `--emit tvm` as a Python callable, by TVM's runtime: what a card needs."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from horq_tvm import extras
from horq_tvm.cuda.device import card_for
from horq_tvm.errors import HorqError, UsageError
from horq_tvm.manifest import Manifest

from .loader import Array, LoadedModel, StepTime, fresh_name


class VirtualMachineModel(LoadedModel):
    """A library that TVM's virtual machine runs, on a card or a CPU. Calls from several threads wait for each other."""

    def __init__(self, path: Path, manifest: Manifest, threads: int) -> None:
        """For `load`, which has checked the file.

        HorqError: TVM is not installed, or does not load the library; the CPU lacks features; there is no card, or none
        of an architecture that the library has code for.
        """
        self._set_interface(path, manifest, threads)
        self._lock = threading.Lock()
        card = card_for(manifest.archs) if manifest.archs else None
        try:
            import tvm
            from tvm import relax
        except ImportError as error:
            raise extras.missing(error) from error
        _check_cpu(path, manifest)
        if card is not None:
            from horq_tvm.cuda.driver import load_runtime

            load_runtime()
        else:
            tvm.get_global_func("runtime.config_threadpool")(1, threads)
        self._device = tvm.cpu() if card is None else tvm.cuda(card.index)
        self._tensor = tvm.runtime.tensor
        try:
            self._machine = relax.VirtualMachine(tvm.runtime.load_module(fresh_name(path)), self._device)
        except Exception as error:  # whatever TVM's runtime raises
            raise HorqError(f"cannot load {path}: {_first_line(error)}") from error
        self._main = self._machine["main"]

    @property
    def arena_bytes(self) -> int:
        """0: TVM's runtime allocates as it goes."""
        return 0

    def __call__(self, /, *arrays: Array, **named: Array) -> dict[str, Array]:
        """Runs the model on arrays in the inputs' order, or by input name, and returns the outputs by name.

        Arrays are copied to the device and back. Raises as `LoadedModel` does.
        """
        inputs = self._on_device(arrays, named)
        with self._lock:
            results = self._results(inputs)
        return {spec.name: result.numpy() for spec, result in zip(self.outputs, results, strict=True)}

    def profile(self, /, *arrays: Array, runs: int = 20, **named: Array) -> list[StepTime]:
        """The kernel calls in order, each with its median time over `runs` runs, the device idle before and after it.

        Waiting for the device takes some microseconds, which the times contain; `timer` has no such share.
        """
        if runs < 1:
            raise UsageError(f"runs is {runs}; accepted is 1 or more")
        inputs = self._on_device(arrays, named)
        with self._lock:
            watch = _StopWatch(self._device.sync, self.manifest.steps)
            self._machine.set_instrument(watch)
            try:
                samples = [watch.of(lambda: self._results(inputs)) for _ in range(runs + 1)][1:]
            finally:
                self._machine.set_instrument(lambda *_: 0)
        names = [name for name, _ in samples[0]]
        times = [[ns for _, ns in sample] for sample in samples]
        return [
            StepTime(name, int(statistics.median(of))) for name, of in zip(names, zip(*times, strict=True), strict=True)
        ]

    def timer(self, /, *arrays: Array, **named: Array) -> Callable[[int], float]:
        """A function that runs the model n times on inputs that lie on the device and returns the seconds of all n."""
        inputs = self._on_device(arrays, named)

        def measure(count: int) -> float:
            with self._lock:
                self._device.sync()
                begin = time.perf_counter()
                for _ in range(count):
                    self._main(*inputs)
                self._device.sync()
                return time.perf_counter() - begin

        return measure

    def _on_device(self, arrays: Sequence[Array], named: dict[str, Array]) -> list[Any]:
        return [self._tensor(array, self._device) for array in self._checked(arrays, named)]

    def _results(self, inputs: Sequence[Any]) -> list[Any]:
        try:
            result = self._main(*inputs)
            self._device.sync()
        except Exception as error:  # whatever TVM's runtime raises
            raise HorqError(f"{self.path}: a kernel failed: {_first_line(error)}") from error
        return list(result) if len(self.outputs) > 1 or isinstance(result, (list, tuple)) else [result]


class _StopWatch:
    """What the virtual machine calls before and after each function: times those that are kernels of the model."""

    def __init__(self, sync: Callable[[], None], steps: Any) -> None:
        self._sync = sync
        self._steps = steps
        self._times: list[tuple[str, int]] = []
        self._begin = 0

    def __call__(self, _function: Any, name: str, before: bool, _result: Any, *_args: Any) -> int:
        if name in self._steps:
            self._sync()
            if before:
                self._begin = time.perf_counter_ns()
            else:
                self._times.append((self._steps[name], time.perf_counter_ns() - self._begin))
        return 0

    def of(self, run: Callable[[], Any]) -> list[tuple[str, int]]:
        """The kernel calls of one run, in order, with nanoseconds."""
        self._times = []
        run()
        return self._times


def _check_cpu(path: Path, manifest: Manifest) -> None:
    from horq_tvm.targets import this_host

    missing = [feature for feature in manifest.cpu_features if feature not in this_host().flags]
    if missing:
        raise HorqError(
            f"{path} needs CPU features that this machine lacks: {', '.join(missing)}; build it for another target"
        )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
