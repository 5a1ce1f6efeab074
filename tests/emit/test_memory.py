"""The memory plan: what lives at once does not overlap, and it wastes nothing where nothing need be wasted."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from horq_tvm.emit.memory import ALIGNMENT, Copy, Lifetime, Place, Space, align, pack, place
from horq_tvm.emit.plan import Buffer, CallPlan, Step, View


@st.composite
def lifetimes(draw: st.DrawFn) -> list[Lifetime]:
    found = []
    for buffer in range(draw(st.integers(0, 12))):
        first = draw(st.integers(0, 10))
        found.append(Lifetime(buffer, draw(st.integers(0, 1000)), first, first + draw(st.integers(0, 5))))
    return found


@given(lifetimes())
def test_buffers_alive_at_one_step_do_not_overlap(lives: list[Lifetime]) -> None:
    offsets, arena = pack(lives)
    assert set(offsets) == {life.buffer for life in lives}
    for life in lives:
        start = offsets[life.buffer]
        assert start % ALIGNMENT == 0
        assert start >= 0
        assert start + life.nbytes <= arena
        for other in lives:
            if other is not life and life.overlaps(other):
                apart = start + life.nbytes <= offsets[other.buffer] or offsets[other.buffer] + other.nbytes <= start
                assert apart


def test_a_chain_needs_no_more_than_its_busiest_step() -> None:
    sizes = [640, 1280, 64, 2560, 320, 320]
    lives = [Lifetime(index, size, index, index + 1) for index, size in enumerate(sizes)]
    bound = max(align(a) + align(b) for a, b in pairwise(sizes))
    assert pack(lives)[1] == bound


def test_the_order_of_the_buffers_does_not_matter() -> None:
    lives = [Lifetime(index, 100 * (index % 3), index, index + 2) for index in range(9)]
    assert pack(lives) == pack(reversed(lives))


def plan_of(buffers: list[Buffer], steps: list[tuple[int, ...]], outputs: list[int]) -> CallPlan:
    views = tuple(View(index, (buffer.nbytes // 4,), "float32") for index, buffer in enumerate(buffers))
    return CallPlan(tuple(buffers), views, tuple(Step("k", "k", args) for args in steps), tuple(outputs))


def test_a_computed_output_lies_in_the_callers_memory_and_others_are_copied() -> None:
    weight = Buffer("constant", 8, data=b"12345678")
    buffers = [Buffer("input", 16), weight, Buffer("temporary", 128), Buffer("temporary", 256)]
    placement = place(plan_of(buffers, [(0, 1, 2), (2, 3)], [3, 0, 1, 3]))
    assert placement.places == (
        Place(Space.INPUT, 0),
        Place(Space.WEIGHTS, 0),
        Place(Space.ARENA, 0),
        Place(Space.OUTPUT, 0),
    )
    assert placement.copies == (Copy(0, 1, 16), Copy(1, 2, 8), Copy(3, 3, 256))
    assert (placement.arena_bytes, placement.weight_bytes) == (128, 64)


def test_an_output_takes_no_arena_even_where_later_steps_read_it() -> None:
    buffers = [Buffer("input", 64), Buffer("temporary", 64), Buffer("temporary", 64)]
    placement = place(plan_of(buffers, [(0, 1), (1, 2)], [1, 2]))
    assert placement.arena_bytes == 0
    assert not placement.copies
