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


def in_place_plan(steps: list[tuple[int, ...]], outputs: list[int], count: int) -> CallPlan:
    """Input 0 and temporaries of 64 bytes; the first argument of every step may share memory with its last."""
    buffers = [Buffer("input", 64)] + [Buffer("temporary", 64)] * (count - 1)
    plan = plan_of(buffers, steps, outputs)
    allowed = tuple(Step(f"k{i}", "k", s.args, ((0, len(s.args) - 1),)) for i, s in enumerate(plan.steps))
    return CallPlan(plan.buffers, plan.views, allowed, plan.outputs)


def test_an_operand_that_dies_gives_its_memory_to_the_result() -> None:
    placement = place(in_place_plan([(0, 1), (1, 2), (2, 3), (3, 4)], [4], 5))
    assert placement.places[1] == placement.places[2] == placement.places[3]
    assert placement.arena_bytes == 64
    assert placement.in_place == {"k1", "k2"}  # the model's input stays as it is, its output is the caller's memory


def test_an_operand_that_is_read_later_keeps_its_memory() -> None:
    placement = place(in_place_plan([(0, 1), (1, 2), (1, 2, 3)], [3], 4))
    assert placement.places[1] != placement.places[2]
    assert "k1" not in placement.in_place


def test_an_operand_that_another_argument_looks_at_keeps_its_memory() -> None:
    placement = place(in_place_plan([(0, 1), (1, 1, 2), (2, 3)], [3], 4))
    assert placement.places[1] != placement.places[2]
    assert not placement.in_place
