"""Where every buffer lies: in the caller's memory, among the weights, or in one arena shared over time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from horq_tvm.emit.plan import CallPlan

ALIGNMENT = 64
"""Bytes. TVM's code generator assumes it of every tensor's data."""


class Space(Enum):
    """The four kinds of memory, by their names in internal.h."""

    INPUT = "HQ_INPUT"
    OUTPUT = "HQ_OUTPUT"
    WEIGHTS = "HQ_WEIGHTS"
    ARENA = "HQ_ARENA"


@dataclass(frozen=True)
class Place:
    """`at` is an offset in bytes for arena and weights, an index for inputs and outputs."""

    space: Space
    at: int


@dataclass(frozen=True)
class Lifetime:
    """A temporary of `nbytes` that lives from step `first` to step `last`, both included."""

    buffer: int
    nbytes: int
    first: int
    last: int

    def overlaps(self, other: Lifetime) -> bool:
        """Whether both live at one step."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Copy:
    """After the last step, output `output` is filled from view `view`, `nbytes`."""

    view: int
    output: int
    nbytes: int


@dataclass(frozen=True)
class Placement:
    """A place for each buffer of the plan (None where no step and no output touches it), and what follows from it."""

    places: tuple[Place | None, ...]
    copies: tuple[Copy, ...]
    arena_bytes: int
    weight_bytes: int
    in_place: frozenset[str] = frozenset()
    """The kernels that are handed one piece of memory as an input and an output."""


def align(offset: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def place(plan: CallPlan) -> Placement:
    """Places every buffer of `plan`.

    A temporary that is an output lies in the caller's memory from the start, so that nothing is copied; an output that
    is an input, a constant or a second name of another output is copied at the end. Where a kernel may work in place
    and its operand is not needed afterwards, both are one piece of memory: a residual added so stays in the cache.
    """
    direct, copies = _split_outputs(plan)
    places: list[Place | None] = [None] * len(plan.buffers)
    for buffer, output in direct.items():
        places[buffer] = Place(Space.OUTPUT, output)
    weight_bytes = 0
    for index, buffer_ in enumerate(plan.buffers):
        if buffer_.kind == "input":
            places[index] = Place(Space.INPUT, buffer_.index)
        elif buffer_.kind == "constant":
            places[index] = Place(Space.WEIGHTS, weight_bytes)
            weight_bytes = align(weight_bytes + buffer_.nbytes)
    shared, in_place = _share([life for life in _lifetimes(plan) if life.buffer not in direct], plan)
    offsets, arena_bytes = pack(lives[0] for lives in shared)
    for first, *others in shared:
        for index in (first.buffer, *(life.buffer for life in others)):
            places[index] = Place(Space.ARENA, offsets[first.buffer])
    return Placement(tuple(places), copies, arena_bytes, weight_bytes, in_place)


def _share(lifetimes: Sequence[Lifetime], plan: CallPlan) -> tuple[list[list[Lifetime]], frozenset[str]]:
    """Lifetimes that are one piece of memory by kernels working in place, the first of each the span of all.

    An output takes over the memory of an input that dies in the same step and that no other argument of it looks at.
    """
    by_buffer = {life.buffer: life for life in lifetimes}
    owner = {life.buffer: life.buffer for life in lifetimes}
    groups = {life.buffer: [life] for life in lifetimes}
    kernels: set[str] = set()
    for index, step in enumerate(plan.steps):
        buffers = [plan.views[view].buffer for view in step.args]
        for source, target in ((buffers[i], buffers[o]) for i, o in step.in_place):
            old, new = by_buffer.get(source), by_buffer.get(target)
            if old is None or new is None or buffers.count(source) > 1 or old.nbytes != new.nbytes:
                continue
            root = owner[source]
            if groups[root][0].last != index or new.first != index or owner[target] != target:
                continue
            span = replace(groups[root][0], last=new.last)
            groups[root] = [span, *groups[root][1:], *groups.pop(target)]
            owner[target] = root
            kernels.add(step.kernel)
    return list(groups.values()), frozenset(kernels)


def _split_outputs(plan: CallPlan) -> tuple[dict[int, int], tuple[Copy, ...]]:
    """The temporaries that are outputs, with the output's number, and the outputs that have to be copied."""
    direct: dict[int, int] = {}
    copies: list[Copy] = []
    for output, view in enumerate(plan.outputs):
        buffer = plan.views[view].buffer
        if plan.buffers[buffer].kind == "temporary" and buffer not in direct:
            direct[buffer] = output
        else:
            copies.append(Copy(view, output, plan.buffers[buffer].nbytes))
    return direct, tuple(copies)


def _lifetimes(plan: CallPlan) -> list[Lifetime]:
    """The temporaries that a step touches, from the first step that does to the last."""
    span: dict[int, tuple[int, int]] = {}
    for index, step in enumerate(plan.steps):
        for view in step.args:
            buffer = plan.views[view].buffer
            if plan.buffers[buffer].kind == "temporary":
                span[buffer] = (span.get(buffer, (index, index))[0], index)
    return [Lifetime(buffer, plan.buffers[buffer].nbytes, *steps) for buffer, steps in span.items()]


def pack(lifetimes: Iterable[Lifetime]) -> tuple[dict[int, int], int]:
    """Offsets in bytes by buffer, and the arena's size: the largest first, each into the lowest gap that holds it.

    On ResNet-18 this reaches the lower bound (the most that is alive at any one step).
    """
    placed: list[tuple[int, Lifetime]] = []
    arena = 0
    for life in sorted(lifetimes, key=lambda life: (-life.nbytes, life.first, life.buffer)):
        offset = _lowest_gap(life, placed)
        placed.append((offset, life))
        arena = max(arena, align(offset + life.nbytes))
    return {life.buffer: offset for offset, life in placed}, arena


def _lowest_gap(life: Lifetime, placed: Sequence[tuple[int, Lifetime]]) -> int:
    offset = 0
    contemporaries = [(start, other) for start, other in placed if life.overlaps(other)]
    for start, other in sorted(contemporaries, key=lambda pair: pair[0]):
        if offset + life.nbytes <= start:
            break
        offset = max(offset, align(start + other.nbytes))
    return offset
