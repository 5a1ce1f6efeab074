"""What kernels written for blocks of threads share: their buffers, their loops, and sums as exact as design.md asks.

A thread's float32 sum is rounded at most `STRETCH` − 1 times, then it is added to its float64 sum; those of several
threads are added by halves in shared memory. No term is negative, so a sum is off by at most 15·2⁻²⁴ = 8.9e-7 of
itself; and everything is added in one order, whatever runs first, so a sum is always the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from tvm import s_tir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from horq_tvm.schedules import blocks
from horq_tvm.schedules.decisions import Decide, by_default
from horq_tvm.targets import Target

STRETCH = 16
ZERO = tirx.const(0.0, "float32")
NOTHING = tirx.const(0.0, "float64")
THREADED = "threaded"  # how the names of blocks begin that run on threads as they were written


def written(func: tirx.PrimFunc, _target: Target, _decide: Decide = by_default) -> s_tir.Schedule | None:
    """Kernels that were written with their threads."""
    sch = s_tir.Schedule(func)
    found = all(blocks.name(sch, block).startswith(THREADED) for block in blocks.Kernel.of(sch).blocks)
    return sch if found else None


@contextmanager
def launch(
    name: str, extents: Mapping[str, int], reads: Sequence[tirx.Buffer], writes: Sequence[tirx.Buffer]
) -> Iterator[list[tirx.Expr]]:
    """The code of one thread of a launch, with its indices; `extents` by thread axis, as "blockIdx.x"."""
    with ExitStack() as stack:
        loops = [stack.enter_context(T.thread_binding(index(n), thread=axis)) for axis, n in extents.items()]
        stack.enter_context(T.sblock(f"{THREADED}_{name}"))
        T.reads(*(buffer[whole(buffer)] for buffer in reads))
        T.writes(*(buffer[whole(buffer)] for buffer in writes))
        stack.enter_context(T.attr(index(0), "pragma_unroll_explicit", tirx.const(False, "bool")))
        yield loops


def whole(buffer: tirx.Buffer) -> tuple[slice, ...]:
    """The index of everything in a buffer."""
    return tuple(slice(0, extent) for extent in buffer.shape)


def index(value: int) -> tirx.Expr:
    return tirx.const(value, "int64")


def wide(extents: Sequence[int]) -> tuple[tirx.Expr, ...]:
    """As int64, the index type of Relax's own kernels: FuseTIR joins buffers whose types are the same to the letter."""
    return tuple(index(extent) for extent in extents)


def room(name: str, extents: Sequence[int], dtype: str, scope: str = "local") -> tirx.Buffer:
    """A buffer of a thread (`local`: registers, if its indices are known when loops are unrolled) or of its block."""
    return IRBuilder.name(name, T.sblock_alloc_buffer(wide(extents), dtype, scope=scope))


class Sum:
    """Emits a thread's sum of magnitudes."""

    def __init__(self) -> None:
        self._part, self._total = room("part", (1,), "float32"), room("total", (1,), "float64")

    def over(self, count: int, term: Callable[[tirx.Expr], tirx.Expr]) -> tirx.Expr:
        """Σ term(i) for i < count, float64; a term is float32 and not negative."""
        at = index(0)
        T.buffer_store(self._total, NOTHING, [at])
        stretches, rest = divmod(count, STRETCH)

        def stretch(begin: tirx.Expr, size: int) -> None:
            T.buffer_store(self._part, ZERO, [at])
            with T.unroll(index(size)) as i:
                T.buffer_store(self._part, self._part[at] + term(begin + i), [at])
            T.buffer_store(self._total, self._total[at] + tirx.Cast("float64", self._part[at]), [at])

        if stretches:
            with T.unroll(index(stretches)) as s:
                stretch(s * STRETCH, STRETCH)
        if rest:
            stretch(index(stretches * STRETCH), rest)
        return self._total[at]


def add_up(shared: tirx.Buffer, prefix: Sequence[tirx.Expr], thread: tirx.Expr, own: tirx.Expr) -> tirx.Expr:
    """The sum of what threads have as their `own`, for all of them; `shared` [..., threads], those under `prefix`.

    All threads of the block have to come here.
    """

    def at(position: tirx.Expr | int) -> list[tirx.Expr]:
        return [*prefix, index(position) if isinstance(position, int) else position]

    T.evaluate(T.tvm_storage_sync("shared"))  # of a sum before, everything is read
    T.buffer_store(shared, own, at(thread))
    count = int(shared.shape[-1])
    while count > 1:
        half = -(-count // 2)
        T.evaluate(T.tvm_storage_sync("shared"))
        with T.If(thread < count - half), T.Then():
            T.buffer_store(shared, shared[tuple(at(thread))] + shared[tuple(at(thread + half))], at(thread))
        count = half
    T.evaluate(T.tvm_storage_sync("shared"))
    return shared[tuple(at(0))]
