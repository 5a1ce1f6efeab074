"""The peak loops compute what they say, in registers."""

from __future__ import annotations

import re
import shutil
import subprocess

import numpy as np
import pytest

pytest.importorskip("tvm")

from benchmarks import peak
from horq_tvm import targets

HOST = targets.this_host()
NATIVE = targets.resolve("native", HOST)
# AVX2 looks nibbles up, which a host with VPOPCNTDQ does not, but can.
OTHERS = [target for target in (targets.resolve("x86-64-v3"),) if not target.missing_on(HOST.flags)]
WAYS = (*peak.bit_ways(NATIVE), peak.float_way(NATIVE))
LOOKUPS = [way for target in OTHERS for way in peak.bit_ways(target) if way.shuffle]
TARGETS = [target for target in map(targets.resolve, targets.names()) if not target.missing_on(HOST.flags)]
DOTS = tuple({way.name: way for way in map(peak.int8_way, TARGETS)}.values())


@pytest.fixture(scope="module")
def peaks() -> dict[str, peak.Peak]:
    return {way.name: peak.build(way, NATIVE) for way in WAYS}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_every_step_is_taken(way: peak.Way, peaks: dict[str, peak.Peak]) -> None:
    seed = peak._seed(way)
    out = peaks[way.name].model(seed)["out"]
    acc, w = seed.copy(), seed[0]
    for _ in range(peak.STEPS):
        acc = acc * w + w if way.dtype == "float32" else acc + np.bitwise_count(acc ^ w).astype(way.dtype)
    if way.dtype == "float32":  # a fixed point, which FMA reaches by another rounding
        np.testing.assert_allclose(out, acc, rtol=1e-6)
    else:
        np.testing.assert_array_equal(out, acc)


@pytest.mark.parametrize("way", LOOKUPS, ids=lambda way: way.shuffle)
def test_look_ups_count_every_step(way: peak.Way) -> None:
    """PSHUFB: byte acc mod 16 of the table in the same 128 bits, 0 where acc has its high bit set."""
    seed = peak._seed(way)
    acc, tables = seed.copy(), seed[0].reshape(-1, 16)
    for _ in range(peak.STEPS):
        index = acc.reshape(len(acc), -1, 16)
        found = np.take_along_axis(np.broadcast_to(tables, index.shape), (index & 15).astype(int), axis=-1)
        grown = acc.astype(int) + np.where(index < 128, found, 0).reshape(acc.shape)
        acc = np.minimum(grown, 255).astype("uint8")  # the kernels' addition saturates
    np.testing.assert_array_equal(peak.build(way, OTHERS[0]).model(seed)["out"], acc)


@pytest.mark.parametrize("way", DOTS, ids=lambda way: way.name)
def test_dot_products_count_every_step(way: peak.Way) -> None:
    """Where there is no VNNI the first factors are bytes or halves of acc; pairs saturate at 16 bits."""
    target = next(target for target in TARGETS if peak.int8_way(target) == way)
    seed = peak._seed(way)
    acc, w = seed.copy(), seed[0]
    for _ in range(peak.STEPS):
        acc = acc + products(way, acc, w).astype("int32")
    np.testing.assert_array_equal(peak.build(way, target).model(seed)["out"], acc)


def products(way: peak.Way, acc: np.ndarray, w: np.ndarray) -> np.ndarray:
    signed = w.view("int8").astype("int64")
    if way.name == "VPDPBUSD":
        return (w.view("uint8") * signed).reshape(-1, 4).sum(1)
    if way.name == "PMADDWD":
        return (acc.view("int16").astype("int64") * w.view("int16")).reshape(len(acc), -1, 2).sum(2)
    pairs = (acc.view("uint8") * signed).reshape(len(acc), -1, 2).sum(2)
    return np.clip(pairs, -(2**15), 2**15 - 1).reshape(len(acc), -1, 2).sum(2)


def test_the_clock_is_a_chain() -> None:
    """Two cycles a step at least: no core does a dependent pair in fewer, and none clocks above 10 GHz."""
    way = peak.clock_way()
    (built,) = [peak.build(way, NATIVE)]
    seed = peak._seed(way)
    acc = w = int(seed[0, 0])
    for _ in range(peak.STEPS):
        acc = ((acc + w) ^ w) % 2**64
    assert int(built.model(seed)["out"][0, 0]) == acc
    (nanoseconds,) = built.probe("clock")().values()
    assert 0.1 < way.macs_per_call / nanoseconds < 10


def test_macs_count_every_bit_of_every_vector() -> None:
    way = peak.Way("x", "uint32", lanes=16, accumulators=10, macs=32)
    assert way.macs_per_call == peak.STEPS * 10 * 512


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
@pytest.mark.skipif(NATIVE.popcount != "vpopcntdq", reason="elsewhere counting bits takes several instructions")
def test_the_loop_touches_registers_alone(peaks: dict[str, peak.Peak]) -> None:
    way = WAYS[0]
    command = ["objdump", "-d", "--no-show-raw-insn", str(peaks[way.name].model.path)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = [(int(m[1], 16), m[2]) for m in re.finditer(r"^ +([0-9a-f]+):\s+(.*)$", listing, re.MULTILINE)]
    jumps = [(at, int(m[1], 16)) for at, text in code if (m := re.match(r"j\w+ +([0-9a-f]+)", text))]
    loops = [[text for at, text in code if to <= at <= end] for end, to in jumps if to < end]
    loop = min((loop for loop in loops if any("vpopcntd" in text for text in loop)), key=len)
    assert sum("vpopcntd" in text for text in loop) % way.accumulators == 0
    assert [text for text in loop if "(%" in text] == []


def test_the_best_way_is_never_slower_than_another() -> None:
    """Among equals the first is taken; where LLVM counts bytes or scalars faster, that is the peak."""
    best = peak.best(NATIVE)
    assert best.way.name in [way.name for way in peak.bit_ways(NATIVE)]
    if NATIVE.popcount == "vpopcntdq":
        assert best.way == peak.bit_ways(NATIVE)[0]
