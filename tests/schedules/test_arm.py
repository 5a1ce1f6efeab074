"""NEON's kernels: the layout, the boundary of 16-bit sums, sweeps of layers under qemu, what the loop is made of."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

pytest.importorskip("tvm")

from horq_tvm import targets
from horq_tvm.emit import kernels
from horq_tvm.emit.plan import lower, make_plan
from horq_tvm.errors import HorqError
from horq_tvm.schedules import arm, layout, neon
from horq_tvm.schedules.layout import WeightLayout
from horq_tvm.schedules.tile import Loop
from tests.end_to_end.drawn import Drawn, with_given_scales, with_own_scales
from tests.end_to_end.emulator import EmulatedModel, machine
from tests.end_to_end.test_oracle import (
    EDGE_INPUTS,
    EDGE_LAYERS,
    SWEEP,
    check_general,
    draws,
    exact_results,
    share_of,
    subnormals,
)

MACHINES = (("aarch64", "aarch64"), ("armv7-neon", "armv7"))

# --- The layout and the tile ------------------------------------------------------------------------------------------


def test_a_sum_of_16_bits_holds_the_longest_row_and_no_word_more() -> None:
    words = neon.MAX_ROW // 32
    assert words * neon.STEP <= np.iinfo("uint16").max < (words + 1) * neon.STEP


@pytest.mark.parametrize(
    ("target", "filters", "groups", "row", "expected"),
    [
        ("rpi4", 64, 1, 576, WeightLayout("uadalp", 4)),
        ("rpi5", 3, 1, 576, WeightLayout("uadalp", 4)),
        ("rpi2", 64, 1, 576, WeightLayout("vpadal", 4)),
        ("rpi4", 8, 4, 576, WeightLayout("uadalp", 4)),
        ("rpi4", 6, 4, 576, WeightLayout("words", 2)),
        ("rpi4", 64, 1, neon.MAX_ROW, WeightLayout("uadalp", 4)),
        ("rpi4", 64, 1, neon.MAX_ROW + 1, WeightLayout("words", 4)),
    ],
)
def test_layout(target: str, filters: int, groups: int, row: int, expected: WeightLayout) -> None:
    assert layout.bitserial(targets.resolve(target), filters, groups, row) == expected


@pytest.mark.parametrize("registers", [16, 32])
@pytest.mark.parametrize("width", [56, 28, 14, 7, 1])
def test_tiles_leave_registers_for_operands_and_spread_few_pixels(registers: int, width: int) -> None:
    loop = Loop(width, width, blocks=64, lanes=4, registers=registers, latency=arm.LATENCY, per_step=1.5)
    tile = arm.choose(loop)
    assert tile.px * tile.q + tile.px + arm.WORKING <= registers
    assert tile.px <= tile.q


# --- Layers under qemu ------------------------------------------------------------------------------------------------

# The four stages of ResNet-18, small images: every channel count of the kernel table.
STAGES = [
    Drawn(channels, channels, order, scale, size=(1, size, size), kernel=(3, 3), padding=(1, 1, 1, 1), seed=channels)
    for order, scale in ((1, "static"), (2, "static"), (2, "sample"), (3, "patch"))
    for channels, size in ((64, 5), (128, 4), (256, 3), (512, 2))
]


@pytest.mark.parametrize(("target", "name"), MACHINES)
def test_sums_of_the_kernel_table_are_the_integers(target: str, name: str) -> None:
    exact(STAGES, target, name)


@pytest.mark.parametrize(("target", "name"), MACHINES)
def test_outputs_of_the_kernel_table_agree_within_the_tolerance(target: str, name: str) -> None:
    model = EmulatedModel(machine(name), with_own_scales(STAGES, target))
    check_general(STAGES, model, [layer.image() for layer in STAGES])


@pytest.mark.parametrize(("target", "name"), MACHINES)
@settings(SWEEP, max_examples=1)
@given(drawn=draws())
def test_sums_are_the_integers(target: str, name: str, drawn: list[Drawn]) -> None:
    exact(drawn, target, name)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "name"), MACHINES)
@SWEEP
@given(drawn=draws(least_row=9))
def test_outputs_agree_within_the_tolerance(target: str, name: str, drawn: list[Drawn]) -> None:
    model = EmulatedModel(machine(name), with_own_scales(drawn, target))
    doubtful, outputs = check_general(drawn, model, [layer.image() for layer in drawn])
    assert share_of(doubtful, outputs) < 0.01


@pytest.mark.parametrize(("target", "name"), MACHINES)
def test_the_longest_row_of_16_bit_sums(target: str, name: str) -> None:
    """All bits differ: ±1 weights of one sign, inputs of the other; and one word more, which 32-bit lanes count."""
    layers = [Drawn(neon.MAX_ROW + extra, 4, 1, "static", lead=(1,)) for extra in (0, 32)]
    compiled, _ = with_given_scales(layers, target)
    images = [-layer.weight(unit=True)[:1] for layer in layers]
    outputs = EmulatedModel(machine(name), compiled)(*images)
    for index, (layer, x) in enumerate(zip(layers, images, strict=True)):
        found = outputs[f"y{index}"]
        np.testing.assert_array_equal(found, x @ layer.weight(unit=True).T)
        assert found[0, 0] == -layer.channels


@pytest.mark.parametrize("target", ["aarch64", "armv7-neon"])
def test_a_row_of_more_words_than_16_bit_sums_hold_is_refused(target: str) -> None:
    """A channel fills a word by itself, so words are what counts: 63×65 of them are the most, 64×64 one too many."""
    most, beyond = (Drawn(1, 4, 1, "static", size=(1, *kernel), kernel=kernel) for kernel in ((63, 65), (64, 64)))
    assert most.row == neon.MAX_ROW // 32
    with_given_scales([most], target)
    with pytest.raises(HorqError, match="a row of 4096 words can overflow 16-bit counts; accepted are up to 4095"):
        with_given_scales([beyond], target)


@pytest.mark.slow
def test_edges_of_float32() -> None:
    """AArch64 alone takes subnormals as they are: NEON's vectors on 32-bit ARM take them for zero."""
    for target, name in MACHINES:
        emulated = machine(name)
        compiled, fed = with_given_scales(EDGE_LAYERS, target)
        given, own = EmulatedModel(emulated, compiled), EmulatedModel(emulated, with_own_scales(EDGE_LAYERS, target))
        for kind in EDGE_INPUTS.values():
            images = [kind(layer) for layer in EDGE_LAYERS]
            for layer, y, result in exact_results(EDGE_LAYERS, images, given, fed, given_beta=1.0):
                np.testing.assert_array_equal(y, result.sums.sum(axis=0), err_msg=str(layer))
            check_general(EDGE_LAYERS, own, images)
        if target == "aarch64":
            images = [subnormals(layer) for layer in EDGE_LAYERS]
            for layer, y, result in exact_results(EDGE_LAYERS, images, given, fed, given_beta=2.0**-131):
                np.testing.assert_array_equal(y, result.output, err_msg=str(layer))


def exact(layers: list[Drawn], target: str, name: str) -> None:
    """With β = 1 and ±1 weights an output is the integer."""
    emulated = machine(name)
    compiled, fed = with_given_scales(layers, target)
    model = EmulatedModel(emulated, compiled)
    images = [layer.image() for layer in layers]
    for layer, y, result in exact_results(layers, images, model, fed, given_beta=1.0):
        np.testing.assert_array_equal(y, result.sums.sum(axis=0), err_msg=str(layer))


# --- The loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["rpi4", "rpi5"])
def test_the_loop_is_three_instructions_for_128_bits(target: str, tmp_path: Path) -> None:
    """Between two labels, the block with most CNTs: as many EORs and UADALPs, no UADDLP, nothing on the stack."""
    objdump = shutil.which("aarch64-linux-gnu-objdump")
    if objdump is None:
        pytest.skip("aarch64-linux-gnu-objdump is not installed: apt install binutils-aarch64-linux-gnu")
    from benchmarks import fragments
    from benchmarks.kernels import STAGES as CONVS

    resolved = targets.resolve(target)
    for conv in CONVS:
        mod = lower(fragments.bare_conv(conv, 1, batch=1).lowered(resolved))
        plan = make_plan(mod)
        symbols = kernels.symbol_names(plan.steps)
        kernels.compile_kernels(mod, symbols, resolved.tvm_target(), tmp_path / "k.o")
        command = [objdump, "-d", "--no-show-raw-insn", str(tmp_path / "k.o")]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        hot = max(re.split(r"\tb[.\w]*\t.*\n", listing), key=lambda block: block.count("\tcnt\t"))
        vectors = hot.count("\tcnt\t")
        assert vectors >= 8
        assert (hot.count("\teor\t"), hot.count("\tuadalp\t"), hot.count("\tuaddlp\t")) == (vectors, vectors, 0)
        assert not re.search(r"\t(ldr|str|ldp|stp)\tq.*\[sp", hot)
