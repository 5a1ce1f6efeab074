"""The analysis on loops whose cost is known, and the command; no core has run any of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

pytest.importorskip("tvm")

from benchmarks import assembly, fragments, mca, static
from benchmarks.fragments import Conv
from horq_tvm import targets
from horq_tvm.errors import HorqError
from tests.end_to_end.emulator import machine

LISTINGS = Path(__file__).parent / "listings"


@pytest.fixture(scope="module")
def tools() -> mca.Tools:
    try:
        return mca.find_tools()
    except HorqError as error:
        pytest.skip(str(error))


BITS = static.KINDS["aarch64"][static.BITS]
FLOATS = static.KINDS["aarch64"][static.FLOATS]


def target_of(mcpu: str, mtriple: str = "aarch64-linux-gnu") -> targets.Target:
    return dataclasses.replace(targets.resolve("aarch64"), name=mcpu, mtriple=mtriple, mcpu=mcpu)


def loop_of(kind: static.Kind, more: str = "") -> str:
    """A listing of an endless loop of the needed instructions, and `more` after each vector's."""
    lines = kind.bound_loop.splitlines()
    step = len(kind.needed)
    body = [line for i in range(0, len(lines), step) for line in (*lines[i : i + step], *filter(None, [more]))]
    return "\n".join(f"{4 * i:x}: {text}" for i, text in enumerate([*body, "b 0x0"]))


@pytest.mark.parametrize(
    ("mcpu", "model", "cycles"),
    [("cortex-a53", "A53", 3.0), ("cortex-a72", "A57", 1.5), ("neoverse-n1", "N1", 1.5)],
)
def test_the_bound_is_three_instructions_on_the_vector_pipes(
    tools: mca.Tools, mcpu: str, model: str, cycles: float
) -> None:
    """One pipe of 128 bits in a Cortex-A53, two in the others."""
    assert static.bound(tools, target_of(mcpu), BITS) == pytest.approx(cycles, rel=0.02)
    found = tools.analyse(BITS.bound_loop, "aarch64-linux-gnu", mcpu)
    assert found.model == model
    assert found.instructions == 3 * BITS.copies
    assert max(found.busy.values()) == pytest.approx(1, abs=0.02)


def test_a_cpu_without_a_model_is_an_error(tools: mca.Tools) -> None:
    with pytest.raises(HorqError, match="cortex-b72"):
        tools.analyse("cnt v0.16b, v0.16b\n", "aarch64-linux-gnu", "cortex-b72")


def test_a_core_without_numbers_is_checked_but_not_timed(tools: mca.Tools) -> None:
    kind = static.KINDS["arm"][static.BITS]
    cortex_a7, cortex_a72 = (target_of(mcpu, "armv7-linux-gnueabihf") for mcpu in ("cortex-a7", "cortex-a72"))
    unknown = static.analyse(tools, loop_of(kind, "vst1.64 {d16, d17}, [sp:128]"), cortex_a7, kind)
    assert (unknown["cycles"], unknown["model"], unknown["spills"]) == (None, None, kind.copies)
    known = static.analyse(tools, loop_of(kind), cortex_a72, kind)
    assert known["fraction_of_bound"] == pytest.approx(1, abs=0.1)
    assert (known["model"], known["spills"], known["vectors_per_iteration"]) == ("A57", 0, kind.copies)


def test_products_that_are_added_by_themselves_count_as_well(tools: mca.Tools) -> None:
    """32-bit code for a Cortex-A7 has no VFMA; where a core is known, the VADD costs its part of the bound."""
    kind = static.KINDS["arm"][static.FLOATS]
    apart = [line for i in range(6) for line in (f"vmul.f32 q{i}, q14, q15", f"vadd.f32 q{i + 6}, q{i + 6}, q{i}")]
    listing = "\n".join(f"{4 * i:x}: {text}" for i, text in enumerate([*apart, "b 0x0"]))
    unknown, known = (
        static.analyse(tools, listing, target_of(mcpu, "armv7-linux-gnueabihf"), kind)
        for mcpu in ("cortex-a7", "cortex-a72")
    )
    assert (unknown["vectors_per_iteration"], unknown["cycles"]) == (6, None)
    assert known["fraction_of_bound"] == pytest.approx(0.5, abs=0.1)


def test_what_is_not_needed_costs_its_part_of_the_bound(tools: mca.Tools) -> None:
    """A fourth instruction on the same pipes leaves three quarters."""
    alone = static.analyse(tools, loop_of(BITS), target_of("cortex-a72"), BITS)
    assert alone["fraction_of_bound"] == pytest.approx(1, abs=0.03)
    assert alone["macs_per_cycle"] == pytest.approx(128 / 1.5, rel=0.03)
    more = static.analyse(tools, loop_of(BITS, "orr v29.16b, v30.16b, v31.16b"), target_of("cortex-a72"), BITS)
    assert more["fraction_of_bound"] == pytest.approx(0.75, abs=0.03)
    assert (more["spills"], more["scalar_popcounts"], more["vectors_per_iteration"]) == (0, 0, 8)


@pytest.mark.parametrize(("listing", "kind"), [("bits", BITS), ("floats", FLOATS)])
def test_a_loop_of_a_listing_is_analysed(tools: mca.Tools, listing: str, kind: static.Kind) -> None:
    text = (LISTINGS / f"{listing}.txt").read_text()
    record = static.analyse(tools, text, target_of("cortex-a72"), kind)
    loop = assembly.hottest(assembly.instructions(text), kind.counted)
    assert loop is not None
    assert record["assembly"] == [instruction.text for instruction in loop.body]
    assert 0 < record["fraction_of_bound"] < 1


def test_a_kernel_without_the_loop_is_an_error(tools: mca.Tools) -> None:
    text = (LISTINGS / "floats.txt").read_text()
    with pytest.raises(HorqError, match="no loop of the conv kernel holds cnt"):
        static.analyse(tools, text, target_of("cortex-a72"), BITS)


def test_records_and_table(
    tools: mca.Tools, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine("aarch64")  # skips where the cross compiler or qemu is missing
    monkeypatch.setattr(static, "STAGES", (Conv(14, 128, 32),))
    monkeypatch.setattr(static, "FLOAT_CONVS", {static.STEM: Conv(16, 3, 32, kernel=7, stride=2)})
    out = tmp_path / "static.json"
    assert static.main(["--targets", "rpi4,rpi3", "--orders", "1", "--json", str(out)]) == 0
    records = json.loads(out.read_text())
    assert [(r["target"], r["kernel"], r["order"]) for r in records] == [
        ("rpi4", "conv", 1),
        ("rpi4", "float_conv", None),
        ("rpi3", "conv", 1),
        ("rpi3", "float_conv", None),
    ]
    for record in records:
        assert record["note"] == static.NOTE
        assert record["llvm"] == tools.version
        assert 0 < record["fraction_of_bound"] <= 1.02
        assert record["scalar_popcounts"] == 0
    shown = capsys.readouterr().out
    assert shown.startswith("static analysis, not measured")
    assert len(shown.splitlines()) == 4 + len(records)


def test_mistakes_in_the_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert static.main(["--targets", "zen5"]) == 2
    error = capsys.readouterr().err
    assert "zen5" in error
    assert "rpi4" in error


def test_a_missing_tool_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(HorqError, match="apt install llvm"):
        mca.find_tools.__wrapped__()


def test_the_bare_kernel_is_what_is_analysed() -> None:
    """Two stages, two orders and the stem: the kernels whose time `benchmarks.kernels` measures."""
    found = [(kind, layer, order) for kind, layer, order, _ in static.kernels((1, 2))]
    assert found[:2] == [("conv", "56x56x64", 1), ("conv", "28x28x128", 1)]
    assert found[-1] == ("float_conv", fragments.Conv(224, 3, 64).layer, None)
    assert len(found) == 9
