"""Vectors that reach past the last channel: their loads and stores are masked.

TVM writes a vector loop with a condition on its lanes, `for v in vectorized(16): if 16·f + v < 63: ...`, as 16 scalar
steps, of every vector: where lanes do not divide channels a kernel was 10 to 90 times slower than where they do. Here
the loop over the vectors loses its last turn to a copy of its body, in which what does not fit is known, the condition
goes, and what the vector's statements read and write of the kernel's operands, and of its own memory where that has no
room for whole vectors, becomes `llvm.masked.load` and `llvm.masked.store`: one instruction each with AVX-512 and AVX,
lane by lane without, which is what there was before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, sym, tirx
from tvm.ir import Call, TensorLoad

from horq_tvm.errors import HorqError

Rows = dict[str, set[int]]  # of a kernel's own memory, by its name: how long a row is
TAIL = "horq.tail"  # an AttrStmt around a vector: how many of its lanes there are


def mask_tails(mod: tvm.IRModule) -> tvm.IRModule:
    """The kernels that have vectors with conditions on their lanes, lowered as far as vectors go, those masked."""
    conditional = {
        gvar: func for gvar, func in mod.functions_items() if isinstance(func, tirx.PrimFunc) and _has_tail(func)
    }
    if not conditional:
        return mod
    lowered = tvm.ir.transform.Sequential(_lowering())(tvm.IRModule(conditional))
    rows = {gvar.name_hint: _rows(func) for gvar, func in lowered.functions_items()}
    lowered = tvm.ir.transform.Sequential(_flattening())(lowered)
    lowered = _each(lowered, _peel)
    lowered = s_tir.transform.StmtSimplify()(lowered)
    lowered = _each(lowered, _mark)
    lowered = tirx.transform.VectorizeLoop(True)(lowered)
    masked = {gvar: _mask(func, rows[gvar.name_hint]) for gvar, func in lowered.functions_items()}
    lowered = tvm.IRModule(masked, attrs=mod.attrs)
    lowered = tirx.transform.ConvertSSA()(lowered)  # a copied body allocates what is its own
    done = mod.clone()
    done.update(lowered)
    return done


def _lowering() -> list[tvm.transform.Pass]:
    """What TVM's own pipeline does to a kernel of a CPU, from its blocks to where buffers still have their axes."""
    return [
        s_tir.transform.CompactBufferAllocation(),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.StmtSimplify(),
        s_tir.transform.LowerOpaqueBlock(),
    ]


def _flattening() -> list[tvm.transform.Pass]:
    """And on from there to its vectors."""
    return [
        tirx.transform.FlattenBuffer(),
        tirx.transform.NarrowDataType(32),
        s_tir.transform.LoopPartition(),
    ]


def _each(mod: tvm.IRModule, change: Any) -> tvm.IRModule:
    return tvm.IRModule({gvar: change(func) for gvar, func in mod.functions_items()}, attrs=mod.attrs)


def _uses(expr: tirx.Expr, var: tirx.Var) -> bool:
    found: list[bool] = []
    tvm_ffi.structural_walk(expr, (tirx.Var, lambda v: found.append(v.same_as(var))))
    return any(found)


def _is_vector(loop: tirx.For) -> bool:
    return int(loop.kind) == tirx.ForKind.VECTORIZED


def _has_tail(func: tirx.PrimFunc) -> bool:
    """Whether a block inside a vectorised loop has a condition on that loop."""
    found: list[bool] = []

    def look(loop: tirx.For) -> None:
        if _is_vector(loop):
            conditions: list[tirx.Expr] = []
            tvm_ffi.structural_walk(loop.body, (s_tir.SBlockRealize, lambda b: conditions.append(b.predicate)))
            found.extend(_uses(condition, loop.loop_var) for condition in conditions)

    tvm_ffi.structural_walk(func.body, (tirx.For, look))
    return any(found)


def _lanes_left(loop: tirx.For) -> tuple[tirx.Expr, list[tirx.Expr]] | None:
    """Of a vectorised loop around one condition: how many of its lanes that lets through, and the rest of it."""
    if not _is_vector(loop) or not isinstance(loop.body, tirx.IfThenElse) or loop.body.else_case is not None:
        return None
    terms, rest, limits = _terms(loop.body.condition), [], []
    for term in terms:
        if not _uses(term, loop.loop_var):
            rest.append(term)
            continue
        if not isinstance(term, tirx.LT) or _uses(term.b, loop.loop_var):
            return None
        analyzer = sym.Analyzer()
        base = _replace(term.a, loop.loop_var, tirx.const(0, str(loop.loop_var.ty.dtype)))
        if not analyzer.can_prove_equal(term.a - base, loop.loop_var):
            return None
        limits.append(analyzer.simplify(term.b - base))
    return (limits[0], rest) if len(limits) == 1 else None


def _terms(condition: tirx.Expr) -> list[tirx.Expr]:
    if isinstance(condition, Call) and str(condition.op.name).endswith("likely"):
        return _terms(condition.args[0])
    if isinstance(condition, tirx.And):
        return [*_terms(condition.a), *_terms(condition.b)]
    return [condition]


def _replace(node: Any, var: tirx.Var, value: tirx.Expr) -> Any:
    return tvm_ffi.structural_map(node, (tirx.Var, lambda v: value if v.same_as(var) else v))


def _peel(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Each serial loop that a vector's condition depends on: all turns but the last, and the last."""

    def visit(loop: tirx.For, mutator: Any) -> tirx.Stmt:
        loop = mutator.default_mutate(loop)
        if int(loop.kind) != tirx.ForKind.SERIAL or not isinstance(loop.extent, tirx.IntImm) or int(loop.extent) < 2:
            return loop
        limits: list[tirx.Expr] = []

        def look(inner: tirx.For) -> None:
            if found := _lanes_left(inner):
                limits.append(found[0])

        tvm_ffi.structural_walk(loop.body, (tirx.For, look))
        if not any(_uses(limit, loop.loop_var) for limit in limits):
            return loop
        turns = tirx.const(int(loop.extent) - 1, str(loop.loop_var.ty.dtype))
        but_last = tirx.For(loop.loop_var, loop.min, turns, loop.kind, loop.body, annotations=loop.annotations)
        return tirx.SeqStmt([but_last, _replace(loop.body, loop.loop_var, loop.min + turns)])

    return func.with_body(tvm_ffi.structural_mutate(func.body, (tirx.For, visit)))


def _mark(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """The conditions on lanes become marks around their vectors."""

    def visit(loop: tirx.For, mutator: Any) -> tirx.Stmt:
        found = _lanes_left(loop)
        if found is None or not _side_by_side(loop):
            return mutator.default_mutate(loop)
        limit, rest = found
        if isinstance(limit, tirx.IntImm) and int(limit) == 1:
            return _replace(loop.body, loop.loop_var, loop.min)  # TVM has put 0 for the lane, and no vector is left
        vector = tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, loop.body.then_case)
        if not _becomes_vectors(vector):
            return mutator.default_mutate(loop)
        marked: tirx.Stmt = tirx.AttrStmt(loop.loop_var, TAIL, limit, vector)
        if _reads_by_vector(vector, limit):
            rest = [*rest, limit > 0]
        for term in rest:
            marked = tirx.IfThenElse(term, marked, None)
        return marked

    return func.with_body(tvm_ffi.structural_mutate(func.body, (tirx.For, visit)))


def _side_by_side(loop: tirx.For) -> bool:
    """Whether a mask fits: stores are to elements side by side, loads too, or from one element for all lanes.

    Lanes that a mask leaves out hold 0, which an integer must not be divided by.
    """
    indices: list[tuple[tirx.Expr, bool]] = []
    buffers: list[tirx.Buffer] = []

    def look(access: Any) -> None:
        indices.extend((index, isinstance(access, tirx.BufferStore)) for index in access.indices)
        buffers.append(access.source if isinstance(access, TensorLoad) else access.buffer)

    tvm_ffi.structural_walk(loop.body.then_case, ((TensorLoad, look), (tirx.BufferStore, look)))
    if any(str(buffer.dtype) == "bool" for buffer in buffers):
        return False  # a byte in memory, a bit in a vector
    if any(_uses(divisor, loop.loop_var) for divisor in _divisors(loop.body.then_case)):
        return False
    next_lane = loop.loop_var + tirx.const(1, str(loop.loop_var.ty.dtype))
    analyzer = sym.Analyzer()

    def step_is(index: tirx.Expr, stride: int) -> bool:
        return bool(analyzer.can_prove_equal(_replace(index, loop.loop_var, next_lane) - index, stride))

    return all(step_is(i, 1) or (not stored and step_is(i, 0)) for i, stored in indices)


def _divisors(stmt: tirx.Stmt) -> list[tirx.Expr]:
    """What integers are divided by."""
    found: list[tirx.Expr] = []

    def look(division: Any) -> None:
        if "int" in str(division.ty.dtype):
            found.append(division.b)

    kinds = (tirx.Div, tirx.Mod, tirx.FloorDiv, tirx.FloorMod)
    tvm_ffi.structural_walk(stmt, tuple((kind, look) for kind in kinds))
    return found


def _reads_by_vector(vector: tirx.For, limit: tirx.Expr) -> bool:
    """Whether something is read once a vector that may lie beyond the end where none of its lanes is left."""
    variables: list[tirx.Var] = []
    tvm_ffi.structural_walk(limit, (tirx.Var, lambda var: variables.append(var)))
    once: list[tirx.Expr] = []

    def look(load: TensorLoad) -> None:
        once.extend(index for index in load.indices if not _uses(index, vector.loop_var))

    tvm_ffi.structural_walk(vector.body, (TensorLoad, look))
    return any(_uses(index, variable) for index in once for variable in variables)


def _becomes_vectors(loop: tirx.For) -> bool:
    """Whether TVM makes vectors of the loop: of a statement that it cannot (`round`, say) it makes a loop over lanes.

    With the condition gone that loop would run beyond the last channel.
    """
    made = tirx.transform.VectorizeLoop(True)(tvm.IRModule({"f": tirx.PrimFunc([], loop)}))["f"].body
    return _stores_vectors(made)


def _stores_vectors(stmt: tirx.Stmt) -> bool:
    """Of what was side by side: whether every store is one of a vector, and nothing is there but stores."""
    scalar: list[bool] = []

    def look(store: tirx.BufferStore) -> None:
        scalar.append(not isinstance(store.indices[-1], tirx.Ramp))

    tvm_ffi.structural_walk(stmt, ((tirx.BufferStore, look), (tirx.Evaluate, lambda _: scalar.append(True))))
    return not any(scalar)


def _mask(func: tirx.PrimFunc, rows: Rows) -> tirx.PrimFunc:
    """The marks go, and what is inside of them reads and writes no more than there is."""
    own = _memories(func, rows)

    def visit(mark: tirx.AttrStmt, mutator: Any) -> tirx.Stmt:
        if mark.attr_key != TAIL:
            return mutator.default_mutate(mark)
        if not _stores_vectors(mark.body):
            raise HorqError(
                f"kernel {func.attrs['global_symbol']}: TVM made no vectors of a loop with {mark.value} lanes"
            )
        masked = (
            (TensorLoad, lambda load: _masked_load(load, mark.value, own)),
            (tirx.BufferStore, lambda store: _masked_store(store, mark.value, own)),
        )
        return tvm_ffi.structural_map(mark.body, masked)

    return func.with_body(tvm_ffi.structural_mutate(func.body, (tirx.AttrStmt, visit)))


@dataclass(frozen=True)
class Memory:
    """A kernel's own memory, the lengths of its rows, and whether it is written in vectors alone, each with room.

    A vector has room that begins at a multiple of its lanes in rows that are multiples of them: one that reaches past
    the last channel ends in its row. It may be read whole there. It may be written whole if nothing else is kept there:
    all that is written are such vectors, and, which is not looked at, conditions on one memory ask for one last
    channel, as those of an accumulator do. A mask would keep it from staying in a register.
    """

    buffer: tirx.Buffer
    rows: frozenset[int]
    vectors: bool


def _rows(func: tirx.PrimFunc) -> Rows:
    """While a kernel's own memory has its axes: the innermost of more than one element, by the memory's name."""
    found: Rows = {}

    def look(alloc: tirx.AllocBuffer) -> None:
        extents = [int(extent) for extent in alloc.buffer.shape if int(extent) > 1]
        found.setdefault(alloc.buffer.name, set()).add(extents[-1] if extents else 1)

    tvm_ffi.structural_walk(func.body, (tirx.AllocBuffer, look))
    return found


def _memories(func: tirx.PrimFunc, rows: Rows) -> list[Memory]:
    """The kernel's own memory, and how it is written."""
    allocated: list[tirx.Buffer] = []
    stores: list[tirx.BufferStore] = []
    looks = (
        (tirx.AllocBuffer, lambda alloc: allocated.append(alloc.buffer)),
        (tirx.BufferStore, lambda store: stores.append(store)),
    )
    tvm_ffi.structural_walk(func.body, looks)

    def memory(buffer: tirx.Buffer) -> Memory:
        written = [store.indices[-1] for store in stores if store.buffer.same_as(buffer)]
        own = frozenset(rows[buffer.name])
        return Memory(buffer, own, all(_has_room(index, own) for index in written))

    return [memory(buffer) for buffer in allocated]


def _has_room(index: tirx.Expr, rows: frozenset[int]) -> bool:
    """Whether it is a vector's, and that begins at a multiple of its lanes in rows that are multiples of them."""
    if not isinstance(index, tirx.Ramp):
        return False
    lanes, known = int(index.lanes), sym.Analyzer().modular_set(index.base)
    return all(number % lanes == 0 for number in (int(known.coeff), int(known.base), *rows))


def _memory(buffer: tirx.Buffer, memories: list[Memory]) -> Memory | None:
    """The kernel's own, None of an operand."""
    return next((memory for memory in memories if memory.buffer.same_as(buffer)), None)


def _fits(access: Any, memory: Memory | None) -> bool:
    """Whether an access may stay as it is: a scalar, or a vector that has room."""
    (index,) = access.indices
    if not isinstance(index, tirx.Ramp):
        return True
    if memory is None or not _has_room(index, memory.rows):
        return False
    return memory.vectors or isinstance(access, TensorLoad)


def _mask_of(limit: tirx.Expr, lanes: int) -> tirx.Expr:
    dtype = str(limit.ty.dtype)
    return tirx.Ramp(tirx.const(0, dtype), tirx.const(1, dtype), lanes) < tirx.Broadcast(limit, lanes)


def _masked_load(load: TensorLoad, limit: tirx.Expr, memories: list[Memory]) -> tirx.Expr:
    if _fits(load, _memory(load.source, memories)):
        return load
    (index,), dtype = load.indices, str(load.source.dtype)
    lanes = int(index.lanes)
    address = tirx.address_of(tirx.BufferLoad(load.source, [index.base]))
    nothing = tirx.Broadcast(tirx.const(0, dtype), lanes)
    mask = _mask_of(limit, lanes)
    return tirx.call_llvm_pure_intrin(f"{dtype}x{lanes}", "llvm.masked.load", address, mask, nothing)


def _masked_store(store: tirx.BufferStore, limit: tirx.Expr, memories: list[Memory]) -> tirx.Stmt:
    memory = _memory(store.buffer, memories)
    if _fits(store, memory):
        return store
    (index,) = store.indices
    address = tirx.address_of(tirx.BufferLoad(store.buffer, [index.base]))
    mask = _mask_of(limit, int(index.lanes))
    masked = tirx.Evaluate(tirx.call_llvm_intrin("void", "llvm.masked.store", store.value, address, mask))
    if memory is None:
        return masked
    # TVM cuts a kernel's own memory to what it sees touched, which of an address is one element. Later it sees that
    # nothing comes of this load.
    return tirx.SeqStmt([tirx.Evaluate(tirx.BufferLoad(store.buffer, [index])), masked])
