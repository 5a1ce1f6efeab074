"""Loops are found in a listing, and what is wrong with one is seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import assembly

LISTINGS = Path(__file__).parent / "listings"


def code(name: str) -> list[assembly.Instruction]:
    return assembly.instructions((LISTINGS / f"{name}.txt").read_text())


def only_loop(name: str) -> assembly.Loop:
    (loop,) = assembly.innermost_loops(code(name))
    return loop


def texts(found: tuple[assembly.Instruction, ...]) -> list[str]:
    return [instruction.text for instruction in found]


def test_a_listing_is_read_without_headings_and_comments() -> None:
    first, second, *_ = read = code("bits")
    assert (first.address, first.text) == (0, "stp x29, x30, [sp, #-0x10]!")
    assert second.text == "mov x9, #0x10"
    assert len(read) == 27


def test_innermost_loops_hold_no_other() -> None:
    loops = assembly.innermost_loops(code("bits"))
    assert [(loop.body[0].address, loop.body[-1].address) for loop in loops] == [(0x10, 0x40), (0x54, 0x60)]
    assert [instruction.address for instruction in loops[0].before] == [0, 4, 8, 12]


def test_the_hottest_loop_holds_most_of_what_is_counted() -> None:
    loop = assembly.hottest(code("bits"), ("cnt",))
    assert loop is not None
    assert loop.body[0].address == 0x10
    assert loop.count(("cnt",)) == 2
    assert assembly.innermost_loops(code("bits"))[1].count(("cnt",)) == 0.5  # 64 bits
    assert assembly.hottest(code("bits"), ("fmla",)) is None


def test_registers_of_half_the_width_count_as_half() -> None:
    loop = only_loop("floats")
    assert loop.count(("fmla", "fmls")) == 2.5
    assert loop.count(("fmadd",)) == 0.25


def test_a_clean_loop_has_neither_spills_nor_scalar_popcounts() -> None:
    loop = assembly.hottest(code("bits"), ("cnt",))
    assert loop is not None
    assert loop.spills == ()
    assert loop.scalar_popcounts == ()


def test_spills_are_seen_behind_pointers_into_the_stack_alone() -> None:
    assert texts(only_loop("spills").spills) == [
        "ldr q1, [sp, #0x20]",
        "stp q1, q2, [sp, #0x40]",
        "ld1 { v3.16b }, [x10], #0x10",
        "str q3, [x8]",
        "ldr q5, [x28, #0x30]",
    ]


def test_bits_counted_outside_the_vectors_are_seen() -> None:
    assert texts(only_loop("scalar").scalar_popcounts) == [
        "cnt v0.8b, v0.8b",
        "and x10, x9, #0x5555555555555555",
        "cnt x11, x9",
    ]


def test_the_assembly_stands_by_itself() -> None:
    lines = assembly.text_of(only_loop("floats").body).splitlines()
    assert lines[0] == f"{assembly.LABEL}:"
    assert lines[-5:] == [
        f"bl {assembly.LABEL}",
        f"adrp x8, {assembly.LABEL}",
        f"cbz x8, {assembly.LABEL}",
        "add x8, x8, #0x1",
        f"tbnz w9, #0x0, {assembly.LABEL}",
    ]


@pytest.mark.parametrize(
    ("text", "destination"),
    [
        ("b.ne 0x3c8 <f+0x28>", 0x3C8),
        ("b 0x10", 0x10),
        ("cbnz w9, 0x24 <f+0x24>", 0x24),
        ("bne 0x40 <f>", 0x40),
        ("bl 0x40 <memcpy>", None),
        ("bic v0.16b, v1.16b, v2.16b", None),
        ("br x8", None),
        ("ret", None),
    ],
)
def test_destinations_of_branches(text: str, destination: int | None) -> None:
    assert assembly.Instruction(0, text).destination == destination
