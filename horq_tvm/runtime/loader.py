"""`load`: a compiled library as a Python callable, with ctypes and numpy alone.

model = load("resnet20.so", threads=2)
scores = model(image)["scores"]
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import statistics
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from horq_tvm.errors import HorqError, UsageError
from horq_tvm.manifest import Manifest
from horq_tvm.runtime.elf import Elf
from horq_tvm.specs import TensorSpec

ABI_VERSION = 1
MAX_THREADS = 256
MANIFEST_SECTION = ".horq.manifest"
_ALIGNMENT = 64  # memory so aligned is used in place, any other is copied
_NAMES_CAPACITY = 64

Array = np.ndarray[Any, Any]


class StepTime(NamedTuple):
    """A kernel call and its median time in nanoseconds."""

    name: str
    median_ns: int


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The manifest of a library, which is not loaded: it may be for another machine.

    HorqError where the file cannot be read, is cut short, or was not built by horq-tvm.
    """
    return _manifest_of(Elf.read(Path(path)), Path(path))


def load(path: str | os.PathLike[str], threads: int = 1) -> LoadedModel:
    """Loads a library to run on `threads` threads; one of `--emit tvm` by TVM's runtime, which has to be installed.

    UsageError for a number of threads out of 1 to 256. HorqError where the file is not a library of horq-tvm, is for
    another machine, or needs CPU features or a card that this one lacks (named); no kernel has run then.
    """
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= MAX_THREADS:
        raise UsageError(f"threads is {threads!r}; accepted are 1 to {MAX_THREADS}")
    path = Path(path)
    elf = Elf.read(path)
    manifest = _manifest_of(elf, path)
    if not _runs_here(elf.machine):
        raise HorqError(f"{path} is built for {elf.machine}; this machine is {platform.machine()}")
    if manifest.runtime == "tvm":
        from .virtual_machine import VirtualMachineModel

        return VirtualMachineModel(path, manifest, threads)
    return LoadedModel(path, manifest, _open(path), threads)


def _manifest_of(elf: Elf, path: Path) -> Manifest:
    section = elf.section(MANIFEST_SECTION)
    if section is None:
        raise HorqError(f"{path} was not built by horq-tvm: it has no section {MANIFEST_SECTION}")
    try:
        return Manifest.from_json(elf.contents(section).rstrip(b"\0").decode())
    except (HorqError, UnicodeDecodeError) as error:
        raise HorqError(f"{path}: {error}") from error


def _runs_here(machine: str) -> bool:
    here = platform.machine()
    wide = ctypes.sizeof(ctypes.c_void_p) == 8
    if here.startswith("arm") or (here == "aarch64" and not wide):
        return machine == "arm"
    if here in ("i386", "i486", "i586", "i686") or (here == "x86_64" and not wide):
        return machine == "i686"
    return machine == here


_opened: dict[str, list[tuple[int, int]]] = {}
_opened_lock = threading.Lock()


def fresh_name(path: Path) -> str:
    """A name for dlopen, which hands back the old library under a name that it knows, rebuilt or not.

    A file that has taken another's place under one path is a new inode (the old one stays mapped, so its number is not
    given again); it gets a name that is spelt otherwise.
    """
    name = os.path.realpath(path)
    status = Path(name).stat()
    with _opened_lock:
        known = _opened.setdefault(name, [])
        if (status.st_dev, status.st_ino) not in known:
            known.append((status.st_dev, status.st_ino))
        folder, file = os.path.split(name)
        return folder + "/" + "./" * known.index((status.st_dev, status.st_ino)) + file


def _open(path: Path) -> ctypes.CDLL:
    """The library, its functions typed. HorqError where the system refuses it or its ABI is not ours."""
    try:
        library = ctypes.CDLL(fresh_name(path))
    except OSError as error:
        raise HorqError(f"cannot load {path}: {error}") from error
    library.horq_abi_version.restype = ctypes.c_int
    if (version := library.horq_abi_version()) != ABI_VERSION:
        raise HorqError(f"{path} has ABI version {version}; this horq-tvm loads version {ABI_VERSION}: build it again")
    pointers = ctypes.POINTER(ctypes.c_void_p)
    signatures: dict[str, tuple[Any, Sequence[Any]]] = {
        "horq_missing_features": (ctypes.c_size_t, (ctypes.POINTER(ctypes.c_char_p), ctypes.c_size_t)),
        "horq_arena_bytes": (ctypes.c_size_t, ()),
        "horq_create": (ctypes.c_int, (ctypes.c_int, pointers)),
        "horq_destroy": (None, (ctypes.c_void_p,)),
        "horq_run": (ctypes.c_int, (ctypes.c_void_p, pointers, pointers)),
        "horq_last_error": (ctypes.c_char_p, (ctypes.c_void_p,)),
        "horq_status_text": (ctypes.c_char_p, (ctypes.c_int,)),
        "horq_step_count": (ctypes.c_size_t, ()),
        "horq_step_name": (ctypes.c_char_p, (ctypes.c_size_t,)),
        "horq_set_profiling": (None, (ctypes.c_void_p, ctypes.c_int)),
        "horq_step_nanoseconds": (ctypes.POINTER(ctypes.c_uint64), (ctypes.c_void_p,)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class _Contexts:
    """Contexts of one library: as many as there are calls at once, each for one call at a time."""

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        self._library = library
        self._threads = threads
        self._free: list[int] = []
        self._lock = threading.Lock()
        self._process = os.getpid()
        # Not at exit: the memory goes with the process, and a forked child has no threads to join.
        weakref.finalize(self, _destroy_all, library, self._free).atexit = False

    @contextmanager
    def borrowed(self) -> Iterator[int]:
        """A context that nobody else uses meanwhile."""
        context = self.take()
        try:
            yield context
        finally:
            self.give_back(context)

    def take(self) -> int:
        """A context for the caller alone, until `give_back`."""
        if self._process != os.getpid():  # a context's threads do not follow it through a fork
            with self._lock:
                self._process = os.getpid()
                self._free.clear()
        try:
            return self._free.pop()  # atomic, and so is append
        except IndexError:
            return self._create()

    def give_back(self, context: int) -> None:
        """For the next caller."""
        self._free.append(context)

    def _create(self) -> int:
        context = ctypes.c_void_p()
        status = self._library.horq_create(self._threads, ctypes.byref(context))
        if status != 0 or context.value is None:
            raise HorqError(f"cannot set up the model: {self._library.horq_status_text(status).decode()}")
        return context.value


def _destroy_all(library: ctypes.CDLL, contexts: list[int]) -> None:
    for context in contexts:
        library.horq_destroy(context)


@dataclass(frozen=True)
class _Slot:
    """A tensor of the interface in the terms in which a call checks and makes arrays: found once, not every call."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    nbytes: int

    @classmethod
    def of(cls, spec: TensorSpec) -> _Slot:
        dtype = np.dtype(spec.dtype)
        return cls(spec.name, spec.shape, dtype, math.prod(spec.shape) * dtype.itemsize)

    def checked(self, value: Array) -> Array:
        """`value` as a contiguous array. UsageError where its shape or dtype is another."""
        array = np.asarray(value)
        if array.dtype != self.dtype:
            raise UsageError(f"input {self.name!r} has dtype {array.dtype}; accepted is {self.dtype}")
        if array.shape != self.shape:
            raise UsageError(f"input {self.name!r} has shape {list(array.shape)}; accepted is {list(self.shape)}")
        # ascontiguousarray would make an array of one element of a scalar.
        return array if array.flags.c_contiguous else np.ascontiguousarray(array)

    def empty(self) -> tuple[Array, int]:
        """An uninitialised array whose data start at a multiple of 64 bytes, and where that is."""
        memory = np.empty(self.nbytes + _ALIGNMENT, np.uint8)
        address = _address(memory)
        start = -address % _ALIGNMENT
        return memory[start : start + self.nbytes].view(self.dtype).reshape(self.shape), address + start


class _Call:
    """The arrays of one call and the pointers to them: the arrays live as long as somebody may follow the pointers."""

    __slots__ = ("inputs", "outputs", "results", "sources")

    def __init__(self, inputs: Sequence[Array], outputs: Sequence[_Slot], pointers: tuple[Any, Any]) -> None:
        made = [slot.empty() for slot in outputs]
        self.inputs = inputs
        self.outputs = [array for array, _ in made]
        self.sources = pointers[0](*map(_address, inputs))
        self.results = pointers[1](*(address for _, address in made))


class LoadedModel:
    """A library ready to run. Calls from several threads run at once, each with working memory of its own.

    `inputs` and `outputs` are TensorSpecs in the model's order, `manifest` is what `inspect` prints.
    """

    def __init__(self, path: Path, manifest: Manifest, library: ctypes.CDLL, threads: int) -> None:
        """For `load`, which has checked the file."""
        self._set_interface(path, manifest, threads)
        self._library = library
        inputs, outputs = (ctypes.c_void_p * max(len(slots), 1) for slots in self._slots)
        self._pointers = inputs, outputs
        _check_features(path, library)
        self._contexts = _Contexts(library, threads)
        with self._contexts.borrowed():
            pass  # the first context now, so that what can fail fails here

    def _set_interface(self, path: Path, manifest: Manifest, threads: int) -> None:
        """What every library has, whoever runs it."""
        self.path = path
        self.manifest = manifest
        self.threads = threads
        self._slots = tuple(map(_Slot.of, manifest.inputs)), tuple(map(_Slot.of, manifest.outputs))

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Name, shape and dtype of each input, in order."""
        return self.manifest.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Name, shape and dtype of each output, in order."""
        return self.manifest.outputs

    @property
    def arena_bytes(self) -> int:
        """Bytes of working memory that each call at the same time needs for intermediate tensors."""
        return int(self._library.horq_arena_bytes())

    def __call__(self, /, *arrays: Array, **named: Array) -> dict[str, Array]:
        """Runs the model on arrays in the inputs' order, or by input name, and returns the outputs by name.

        Arrays have the shape and dtype of `inputs`; one that is not contiguous is copied. UsageError names an input
        that is missing, unknown, or of another shape or dtype; HorqError a kernel that failed.
        """
        call = self._call(arrays, named)
        context = self._contexts.take()  # not `borrowed`, which takes as long as a small network
        try:
            self._run(context, call)
        finally:
            self._contexts.give_back(context)
        return {slot.name: array for slot, array in zip(self._slots[1], call.outputs, strict=True)}

    def profile(self, /, *arrays: Array, runs: int = 20, **named: Array) -> list[StepTime]:
        """The kernel calls of the model in order, each with its median time over `runs` runs, after one to warm up."""
        if runs < 1:
            raise UsageError(f"runs is {runs}; accepted is 1 or more")
        call = self._call(arrays, named)
        library, count = self._library, self._library.horq_step_count()
        samples: list[list[int]] = []
        with self._contexts.borrowed() as context:
            library.horq_set_profiling(context, 1)
            try:
                for _ in range(runs + 1):
                    self._run(context, call)
                    samples.append(library.horq_step_nanoseconds(context)[:count])
            finally:
                library.horq_set_profiling(context, 0)
        medians = [int(statistics.median(times)) for times in zip(*samples[1:], strict=True)]
        return [StepTime(library.horq_step_name(i).decode(), median) for i, median in enumerate(medians)]

    def _run(self, context: int, call: _Call) -> None:
        status = self._library.horq_run(context, call.sources, call.results)
        if status != 0:
            detail = self._library.horq_last_error(context).decode(errors="replace")
            text = self._library.horq_status_text(status).decode()
            raise HorqError(f"{self.path}: {text}" + (f" ({detail})" if detail else ""))

    def _call(self, arrays: Sequence[Array], named: dict[str, Array]) -> _Call:
        return _Call(self._checked(arrays, named), self._slots[1], self._pointers)

    def _checked(self, arrays: Sequence[Array], named: dict[str, Array]) -> list[Array]:
        """The inputs in order, contiguous. UsageError for what does not fit."""
        slots = self._slots[0]
        values = arrays if len(arrays) == len(slots) and not named else self._match(arrays, named)
        return [slot.checked(v) for slot, v in zip(slots, values, strict=True)]

    def _match(self, arrays: Sequence[Array], named: dict[str, Array]) -> list[Array]:
        """The arrays in the inputs' order."""
        names = [slot.name for slot in self._slots[0]]
        if len(arrays) > len(names):
            raise UsageError(f"{len(arrays)} arrays given; the model's inputs are: {', '.join(names)}")
        given: dict[str, Array] = dict(zip(names, arrays, strict=False))
        for name, array in named.items():
            if name not in names:
                raise UsageError(f"the model has no input {name!r}; its inputs are: {', '.join(names)}")
            if name in given:
                raise UsageError(f"input {name!r} is given twice, by position and by name")
            given[name] = array
        missing = [name for name in names if name not in given]
        if missing:
            raise UsageError(f"input {missing[0]!r} is missing; the model's inputs are: {', '.join(names)}")
        return [given[name] for name in names]


def _check_features(path: Path, library: ctypes.CDLL) -> None:
    names = (ctypes.c_char_p * _NAMES_CAPACITY)()
    count = library.horq_missing_features(names, _NAMES_CAPACITY)
    if count:
        missing = ", ".join(name.decode() for name in names[:count] if name is not None)
        raise HorqError(f"{path} needs CPU features that this machine lacks: {missing}; build it for another target")


def _address(array: Array) -> int:
    """Where the data start: `array.ctypes.data` without the object it makes, which takes longer than a small kernel."""
    address: int = array.__array_interface__["data"][0]
    return address
