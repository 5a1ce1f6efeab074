"""Kernels for CUDA executed without a card: their OpenCL source, run on the CPU by PoCL.

The same TensorIR, thread bindings, shared memory and barriers included, goes through TVM's generator for OpenCL; what
the CUDA prelude does with a warp, `prelude.cl` does lane by lane. PoCL runs the work items of a group one after the
other from barrier to barrier, so a barrier that is missing shows, and it shows every time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from numpy.typing import NDArray
from tvm import tirx

from horq_tvm.emit import plan

Array = NDArray[Any]

PRELUDE = Path(__file__).with_name("prelude.cl").read_text(encoding="utf-8")
THREADS = ("threadIdx.x", "threadIdx.y", "threadIdx.z")
BLOCKS = ("blockIdx.x", "blockIdx.y", "blockIdx.z")
WARP = 32
LAUNCH = "tirx.call_ffi_kernel"
# Limits that every CUDA architecture keeps. With warps of 32 TVM would use shuffles, which are not here.
TARGET = {
    "kind": "opencl",
    "max_num_threads": 1024,
    "max_threads_per_block": 1024,
    "max_shared_memory_per_block": 49152,
    "host": {"kind": "llvm"},
}
UNWRITTEN = 0xC5  # each byte of memory that nobody has written, so that this is told from a zero; prelude.cl has it too


@cache
def device() -> Any:
    """PoCL's CPU as a pyopencl context; skips the test that asks where there is none."""
    cl = pytest.importorskip("pyopencl", reason="pyopencl is not installed (extra dev)")
    try:
        platforms = cl.get_platforms()
    except cl.LogicError:
        platforms = []
    found = [p for p in platforms if "Portable Computing Language" in p.name]
    if not found:
        pytest.skip("no PoCL here: make opencl (as root), or apt install pocl-opencl-icd")
    return cl.Context(found[0].get_devices()[:1])


@dataclass(frozen=True)
class Tensor:
    """A buffer's shape and type."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Launch:
    """One launch of a device function: by argument the number of a tensor of the function that launches, and sizes."""

    kernel: str
    arguments: tuple[int, ...]
    blocks: tuple[int, int, int]
    threads: tuple[int, int, int]


@dataclass(frozen=True)
class Function:
    """A scheduled PrimFunc: its parameters, then what it allocates between its launches."""

    params: tuple[Tensor, ...]
    spaces: tuple[Tensor, ...]
    launches: tuple[Launch, ...]


@dataclass(frozen=True)
class Program:
    """OpenCL source with the functions that use it, either of which `dataclasses.replace` may edit before they run.

    `asynchronous`: copies to shared memory as from sm_80 on and at the earliest, else as on sm_75 and at the latest.
    `optimised` costs a second a kernel, which a large one earns back.
    """

    source: str
    functions: Mapping[str, Function]
    asynchronous: bool = True
    optimised: bool = False
    _kernels: dict[str, Any] = field(default_factory=dict, init=False, compare=False)

    @classmethod
    def of(cls, *functions: tirx.PrimFunc) -> Program:
        """The functions by their names, f0, f1, ... where they have none."""
        named = {str((f.attrs or {}).get("global_symbol", f"f{i}")): f for i, f in enumerate(functions)}
        return cls.of_module(tvm.IRModule(named))

    @classmethod
    def of_module(cls, mod: tvm.IRModule) -> Program:
        """Every PrimFunc of a module."""
        kernels = {g: f.with_attr("global_symbol", g) for g, f in _prim_funcs(mod)}
        capture = _Capture()
        with tvm.transform.PassContext(opt_level=3, instruments=[capture]):
            built = tvm.compile(tvm.IRModule(kernels), target=tvm.target.Target(TARGET))
        functions = {name: _read(capture.split[name]) for name in kernels}
        (device_code,) = built.mod.imports
        source = device_code.inspect_source()
        for function in functions.values():
            for launch in function.launches:
                source = _prepared(source, launch)
        return cls(PRELUDE + source, functions)

    def without_barriers(self) -> Program:
        """The same kernels with every barrier of theirs taken out; those of the prelude stay."""
        generated = self.source.removeprefix(PRELUDE)
        stripped, count = re.subn(r"\b(horq_)?barrier\([^;]*\);", ";", generated)
        assert count, "there is no barrier to take out"
        return replace(self, source=PRELUDE + stripped)

    def run(self, name: str, *inputs: Array) -> list[Array]:
        """Runs a function whose parameters are inputs, then outputs; returns the outputs."""
        function = self.functions[name]
        queue = _Queue.open()
        given = [queue.put(array, spec) for array, spec in zip(inputs, function.params, strict=False)]
        outputs = function.params[len(inputs) :]
        results = [queue.empty(spec) for spec in outputs]
        self.enqueue(queue, name, [*given, *results])
        return [queue.get(buffer, spec) for buffer, spec in zip(results, outputs, strict=True)]

    def enqueue(self, queue: _Queue, name: str, arguments: Sequence[Any]) -> None:
        """The launches of a function on device buffers."""
        function = self.functions[name]
        tensors = [*arguments, *(queue.empty(spec) for spec in function.spaces)]
        for launch in function.launches:
            sizes = tuple(b * t for b, t in zip(launch.blocks, launch.threads, strict=True))
            self._kernel(launch.kernel)(queue.cl, sizes, launch.threads, *(tensors[i] for i in launch.arguments))
        queue.cl.finish()

    def _kernel(self, name: str) -> Any:
        if not self._kernels:
            cl = pytest.importorskip("pyopencl")
            options = ["-w", *(["-DHORQ_ASYNCHRONOUS"] if self.asynchronous else [])]
            options += [] if self.optimised else ["-cl-opt-disable"]
            built = cl.Program(device(), self.source).build(options=options)
            self._kernels.update({kernel.function_name: kernel for kernel in built.all_kernels()})
        return self._kernels[name]


def run(func: tirx.PrimFunc, *inputs: Array) -> list[Array]:
    """The outputs of one scheduled PrimFunc, whose parameters are inputs, then outputs."""
    program = Program.of(func)
    (name,) = program.functions
    return program.run(name, *inputs)


class Network:
    """A lowered module (docs/architecture.md, section 4): its kernels called as `emit.plan` says."""

    def __init__(self, lowered: tvm.IRModule, **how: bool) -> None:
        """`how`: `asynchronous` and `optimised`, see `Program`."""
        self.plan = plan.make_plan(plan.lower(lowered))
        self.program = replace(Program.of_module(lowered), **how)

    def __call__(self, *inputs: Array) -> list[Array]:
        """The results of `main`, in its order."""
        queue, views = _Queue.open(), self.plan.views
        buffers = [queue.empty(Tensor((buffer.nbytes,), "uint8")) for buffer in self.plan.buffers]
        for memory, buffer in zip(buffers, self.plan.buffers, strict=True):
            if buffer.kind == "constant":
                queue.write(memory, np.frombuffer(buffer.data, "uint8"))
            elif buffer.kind == "input":
                array = inputs[buffer.index]
                assert array.nbytes == buffer.nbytes, f"input {buffer.index}: {array.shape} {array.dtype}"
                queue.write(memory, array)
        for step in self.plan.steps:
            self.program.enqueue(queue, step.kernel, [buffers[views[view].buffer] for view in step.args])
        found = (views[view] for view in self.plan.outputs)
        return [queue.get(buffers[view.buffer], Tensor(view.shape, view.dtype)) for view in found]


@dataclass(frozen=True)
class _Queue:
    """Memory of the device and what moves it."""

    cl: Any
    context: Any

    @classmethod
    def open(cls) -> _Queue:
        context = device()
        return cls(pytest.importorskip("pyopencl").CommandQueue(context), context)

    def empty(self, spec: Tensor) -> Any:
        cl = pytest.importorskip("pyopencl")
        buffer = cl.Buffer(self.context, cl.mem_flags.READ_WRITE, max(spec.nbytes, 1))
        self.write(buffer, np.full(max(spec.nbytes, 1), UNWRITTEN, "uint8"))
        return buffer

    def put(self, array: Array, spec: Tensor) -> Any:
        assert (array.shape, str(array.dtype)) == (spec.shape, spec.dtype), f"{array.shape} {array.dtype} for {spec}"
        buffer = self.empty(spec)
        self.write(buffer, array)
        return buffer

    def write(self, buffer: Any, array: Array) -> None:
        pytest.importorskip("pyopencl").enqueue_copy(self.cl, buffer, np.ascontiguousarray(array))

    def get(self, buffer: Any, spec: Tensor) -> Array:
        found = np.empty(spec.shape, spec.dtype)
        pytest.importorskip("pyopencl").enqueue_copy(self.cl, found, buffer)
        return found


# --- Reading what TVM made of a function ------------------------------------------------------------------------------


@tvm.ir.instrument.pass_instrument
class _Capture:
    """Keeps the module in which host and device are apart and calls still have names and sizes."""

    split: tvm.IRModule

    def run_after_pass(self, mod: tvm.IRModule, info: Any) -> None:
        if info.name == "tirx.SplitHostDevice":
            self.split = mod


def _prim_funcs(mod: tvm.IRModule) -> Iterator[tuple[str, tirx.PrimFunc]]:
    return ((g.name_hint, f) for g, f in mod.functions_items() if isinstance(f, tirx.PrimFunc))


def _read(host: tirx.PrimFunc) -> Function:
    """The launches of a function's host part, in order. It passes on `buffer_data` of tensors, or of views of them."""
    tensors, views, calls = list(host.params), list[Any](), list[Any]()
    visit = [
        (tirx.AllocBuffer, lambda stmt: tensors.append(stmt.buffer)),
        (tirx.DeclBuffer, views.append),
        (tvm.ir.Call, lambda call: calls.append(call) if call.op.name == LAUNCH else None),
    ]
    tvm_ffi.structural_walk(host.body, visit)

    def number(buffer: Any) -> int:
        found = [i for i, tensor in enumerate(tensors) if tensor.same_as(buffer)]
        if found:
            return found[0]
        (view,) = (view for view in views if view.buffer.same_as(buffer))
        return number(view.data.args[0])

    def launch(call: Any) -> Launch:
        tags = [str(tag) for tag in call.attrs["launch_params"]]
        kernel, *arguments = call.args
        sizes = dict(zip(tags, map(int, arguments[len(arguments) - len(tags) :]), strict=True))
        blocks, threads = (tuple(sizes.get(tag, 1) for tag in names) for names in (BLOCKS, THREADS))
        given = arguments[: len(arguments) - len(tags)]
        return Launch(str(kernel.value), tuple(number(pointer.args[0]) for pointer in given), blocks, threads)

    def tensor(buffer: Any) -> Tensor:
        return Tensor(tuple(int(extent) for extent in buffer.shape), str(buffer.dtype))

    count = len(host.params)
    found = [tensor(buffer) for buffer in tensors]
    return Function(tuple(found[:count]), tuple(found[count:]), tuple(launch(call) for call in calls))


def _prepared(source: str, launch: Launch) -> str:
    """The kernel with what the functions of the prelude need: where lanes meet, and what others do not yet see.

    Shared memory is filled with what no kernel writes, or it would hold what the group before has left there.
    """
    head = re.search(rf"__kernel void {launch.kernel}\([^;{{]*\) {{\n", source)
    assert head, f"no kernel {launch.kernel} in the source"
    end = source.index("\n}\n", head.end())
    body, declared = source[head.end() : end], ""
    if re.search(r"\bhorq_(mma|ballot)\b", body):
        assert launch.threads[0] == WARP, f"{launch.kernel}: threadIdx.x is no lane"
        declared += f"  __local uint horq_exchange[HORQ_EXCHANGE * {launch.threads[1] * launch.threads[2]}];\n"
    if re.search(r"\bhorq_land[124]\b", body):
        declared += "  HORQ_STORES\n"
        body = re.sub(r"\bbarrier\(", "horq_barrier(", body)
    body = re.sub(r"^( *__local [^;=(]* (\w+)\[\d+\];)$", r"\1 HORQ_UNWRITTEN(\2)", body, flags=re.MULTILINE)
    return source[: head.end()] + declared + body + source[end:]
