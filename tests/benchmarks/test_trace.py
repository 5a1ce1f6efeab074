"""Counts of a short log by hand, and of a kernel whose popcounts are known."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("tvm")

from benchmarks import assembly, fragments, mca, static, trace
from benchmarks.fragments import Conv
from horq_tvm import targets
from horq_tvm.errors import HorqError
from tests.end_to_end.emulator import machine

LISTINGS = Path(__file__).parent / "listings"
CORTEX_A72 = targets.resolve("rpi4")


def test_blocks_that_overlap_are_added_up_and_others_code_is_left_out() -> None:
    log, listing = ((LISTINGS / f"{name}.txt").read_text() for name in ("log", "traced"))
    found = trace.blocks(log, assembly.instructions(listing))
    assert [([instruction.address for instruction in block.body], block.runs) for block in found] == [
        ([0x2000], 1),
        ([0x2004, 0x2008], 3),
        ([0x200C, 0x2010], 1),
        ([0x2018], 1),
    ]


def test_the_ways_through_a_loop_are_joined_and_keep_every_count() -> None:
    lines = [
        "mov x9, #0x3",
        "ldr q0, [x1]",
        "tbz w9, #0x0, 0x10",
        "cnt v1.16b, v0.16b",
        "subs x9, x9, #0x1",
        "b.ne 0x4",
    ]
    code = assembly.instructions("\n".join(f"{4 * i:x}: {line}" for i, line in enumerate(lines)))
    found = [
        trace.Block((code[0],), 1),
        trace.Block(tuple(code[1:3]), 30),
        trace.Block((code[3],), 10),
        trace.Block(tuple(code[4:]), 30),
    ]
    assert trace.paths(found, assembly.innermost_loops(code)) == [
        trace.Block((code[0],), 1),
        trace.Block(tuple(code[1:]), 10),
        trace.Block((*code[1:3], *code[4:]), 20),
    ]
    assert trace.paths(found, []) == found


def test_a_kernel_counts_every_bit_once(tmp_path: Path) -> None:
    machine("aarch64")  # skips where the cross compiler or qemu is missing
    try:
        tools = mca.find_tools()
    except HorqError as error:
        pytest.skip(str(error))
    conv = Conv(8, 64, 32)
    built = static.compile_object(fragments.bare_conv(conv, 1, 1), CORTEX_A72, tmp_path / "kernels.o")
    blocks = trace.trace(tools, built.obj, built.plan, built.step, built.symbol, CORTEX_A72)
    counted = sum(block.runs * assembly.vectors(block.body, ("cnt",)) for block in blocks)
    assert counted * 128 == conv.macs(1)
    kind = static.kind_of(static.BITS, CORTEX_A72)
    record = static.whole(tools, blocks, CORTEX_A72, kind)
    assert record["whole_instructions"] > len(kind.needed)
    assert 0 < record["whole_fraction_of_bound"] < 1


def test_a_missing_emulator_names_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(HorqError, match="apt install qemu-user-static"):
        trace.trace(mca.Tools("", "", "", ""), tmp_path / "k.o", None, None, "k", CORTEX_A72)  # type: ignore[arg-type]
