"""What a core can do at most: loops that touch nothing but registers, in libraries built for the target like any other.

    bits     acc ← acc + popcount(acc XOR w)      a lane-bit is a multiply-accumulate of ±1 values
    nibbles  acc ← acc + w[acc mod 16]            a byte shuffle: four bits of every byte lane (schedules/nibble.py)
    float32  acc ← acc·w + w                      one FMA, which TVM's code generator makes of it by itself
    int8     acc ← acc + Σ of 4 products          VPDPBUSD, or VPMADDUBSW and VPMADDWD where there is no VNNI
    clock    acc ← (acc + w) XOR w                a chain of two dependent instructions of one cycle each

The accumulators are independent of one another and there are enough of them to hide the instructions' latency; each is
its own operand, so that no compiler can take anything out of the loop. `python -m benchmarks.peak` prints the table.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tvm import relax, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from horq_tvm import targets
from horq_tvm.emit import standalone
from horq_tvm.manifest import Manifest
from horq_tvm.runtime.loader import LoadedModel, load
from horq_tvm.schedules import nibble
from horq_tvm.schedules.layout import NIBBLE_POPCOUNTS
from horq_tvm.specs import TensorSpec

from .measure import Probe, alternate, kernel_probe, pinned

STEPS = 4096
KERNEL = "peak"
CHOICE_SECONDS = 0.15
MARGIN = 1.03  # by how much another way of counting has to be faster to be the peak


@dataclass(frozen=True)
class Way:
    """A loop over `accumulators` vectors of `lanes` elements; `macs` multiply-accumulates an element and step.

    `shuffle` is LLVM's name of the byte shuffle that does the counting, "" where popcount or FMA does. `dot` are LLVM's
    names of the instructions of an int8 dot product: VNNI's, which adds to the accumulator, or the two before VNNI.
    """

    name: str
    dtype: str
    lanes: int
    accumulators: int
    macs: int
    shuffle: str = ""
    dot: tuple[str, ...] = ()
    chain: bool = False

    @property
    def macs_per_call(self) -> int:
        """Multiply-accumulates that one call of the kernel does."""
        return STEPS * self.accumulators * self.lanes * self.macs


@dataclass(frozen=True)
class Peak:
    """A way of counting, as a loaded library of one step."""

    way: Way
    model: LoadedModel
    _folder: tempfile.TemporaryDirectory[str]

    def probe(self, name: str) -> Probe:
        """Times the loop under `name`."""
        return kernel_probe(self.model, {"seed": _seed(self.way)}, {name: KERNEL})


def bit_ways(target: targets.Target) -> tuple[Way, ...]:
    """How a target can count bits in its registers: LLVM's popcount of lanes, bytes or scalars, and table look-ups.

    With VPOPCNTDQ the first is one instruction. AVX2 and plain AVX-512 look nibbles up (vpshufb); in bytes the sum over
    a word's bytes is left out, as a kernel may that widens its accumulators now and then, and with a table for each
    activation nibble the XOR is too, so that a shuffle and an addition are all there is. Scalars use POPCNT if there is
    one.
    """
    count, bytes_ = _accumulators(target), target.vector_bits // 8
    ways = [
        Way("popcount of 32-bit lanes", "uint32", bytes_ // 4, count, 32),
        Way("popcount of bytes", "uint8", bytes_, count, 8),
    ]
    if target.vector_bits == 128:  # with wider vectors LLVM makes vectors of scalars, and slower than it finds them
        ways.append(Way("popcount of 64-bit scalars", "uint64", 1, 6, 64))
    if target.popcount in NIBBLE_POPCOUNTS:
        ways.append(Way("nibble look-ups", "uint8", bytes_, count, 4, nibble.SHUFFLES[bytes_]))
    return tuple(ways)


def float_way(target: targets.Target) -> Way:
    """FMA of float32 vectors; a multiplication and an addition where the target has no FMA."""
    return Way("FMA", "float32", target.vector_bits // 32, 12, 1)


_MADD = {
    512: ("llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512"),
    256: ("llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd"),
    128: ("llvm.x86.ssse3.pmadd.ub.sw.128", "llvm.x86.sse2.pmadd.wd"),
}


def int8_way(target: targets.Target) -> Way:
    """Products of unsigned and signed bytes, summed in int32: VNNI, else products in 16 bits that are added in pairs.

    SSE2 alone has the second of these, on int16.
    """
    bits, count = target.vector_bits, _accumulators(target)
    lanes = bits // 32
    if "avx512_vnni" in target.features or (bits == 256 and "avx_vnni" in target.features):
        return Way("VPDPBUSD", "int32", lanes, count, 4, dot=(f"llvm.x86.avx512.vpdpbusd.{bits}",))
    if target.popcount == "scalar":
        return Way("PMADDWD", "int32", lanes, count, 2, dot=_MADD[bits][1:])
    return Way("PMADDUBSW, PMADDWD", "int32", lanes, count, 4, dot=_MADD[bits])


def clock_way() -> Way:
    """Cycles for multiply-accumulates: `macs_per_call` over nanoseconds is the core's clock in GHz."""
    return Way("dependent ADD and XOR", "uint64", 1, 1, 2, chain=True)


def _accumulators(target: targets.Target) -> int:
    """As many as hide 8 cycles of latency; the nibble tables, masks and temporaries of a popcount need the rest."""
    return 24 if target.vector_registers >= 32 else 10


def build(way: Way, target: targets.Target) -> Peak:
    """The loop as a library for `target`."""
    shape = (way.accumulators, way.lanes)
    builder = relax.BlockBuilder()
    gvar = builder.add_func(_loop(way), KERNEL)
    seed = relax.Var("seed", relax.TensorType(shape, way.dtype))
    with builder.function("main", [seed]):
        with builder.dataflow():
            out = builder.emit_output(relax.call_tir(gvar, [seed], out_ty=relax.TensorType(shape, way.dtype)))
        builder.emit_func_output(out)
    manifest = Manifest((TensorSpec("seed", shape, way.dtype),), (TensorSpec("out", shape, way.dtype),))
    folder = tempfile.TemporaryDirectory(prefix="horq-peak-")
    library = Path(folder.name) / "peak.so"
    standalone(builder.get(), target, manifest, library)
    return Peak(way, load(library), folder)


def best(target: targets.Target) -> Peak:
    """The fastest way in which this machine counts bits with the instructions of `target`; the first in a tie."""
    peaks = {way.name: build(way, target) for way in bit_ways(target)}
    samples = alternate([peak.probe(name) for name, peak in peaks.items()], CHOICE_SECONDS)
    speed = {name: peak.way.macs_per_call / float(np.median(samples[name])) for name, peak in peaks.items()}
    chosen = next(iter(peaks))
    for name in peaks:
        if speed[name] > speed[chosen] * MARGIN:
            chosen = name
    return peaks[chosen]


def _loop(way: Way) -> tirx.PrimFunc:
    """seed [accumulators, lanes] → out, after STEPS steps."""
    shape = (way.accumulators, way.lanes)
    with IRBuilder() as builder, T.prim_func(private=True, s_tir=True):
        T.func_name(KERNEL)
        seed = T.arg("seed", T.Buffer(shape, way.dtype))
        out = T.arg("out", T.Buffer(shape, way.dtype))
        with T.sblock("root"):
            # One buffer each: on the stack, and from there in a register, a buffer is only while it is small (tvm.md).
            accumulators = [T.sblock_alloc_buffer((way.lanes,), way.dtype) for _ in range(way.accumulators)]
            lanes = T.Ramp(0, 1, way.lanes) if way.lanes > 1 else 0
            for i, acc in enumerate(accumulators):
                T.buffer_store(acc, seed[i, lanes], [lanes])
            w = T.bind(seed[0, lanes])
            with T.serial(0, STEPS):
                for acc in accumulators:
                    T.buffer_store(acc, _step(way, acc[lanes], w), [lanes])
            for i, acc in enumerate(accumulators):
                T.buffer_store(out, acc[lanes], [i, lanes])
    return builder.get()


def _step(way: Way, acc: tirx.Expr, w: tirx.Expr) -> tirx.Expr:
    if way.shuffle:
        found = T.call_llvm_pure_intrin(f"{way.dtype}x{way.lanes}", way.shuffle, w, acc)
        # As the kernels add: on Zen 5 the addition that saturates is never put on the pipes that shuffle.
        return T.call_llvm_pure_intrin(f"{way.dtype}x{way.lanes}", "llvm.uadd.sat", acc, found)
    if way.dot:
        return _dot(way, acc, w)
    if way.chain:
        return (acc + w) ^ w
    return acc * w + w if way.dtype == "float32" else acc + tirx.popcount(acc ^ w)


def _dot(way: Way, acc: tirx.Expr, w: tirx.Expr) -> tirx.Expr:
    """acc + the sum of each lane's products; before VNNI of acc's own bytes, or they would be loop-invariant."""
    wide, narrow = f"int32x{way.lanes}", f"int16x{2 * way.lanes}"
    signed = tirx.reinterpret(f"int8x{4 * way.lanes}", w)
    if "vpdpbusd" in way.dot[0]:  # LLVM's operands are bytes, though VNNI's registers do not care
        return T.call_llvm_pure_intrin(wide, way.dot[0], acc, signed, signed)
    *first, last = way.dot
    if not first:
        return acc + T.call_llvm_pure_intrin(wide, last, tirx.reinterpret(narrow, acc), tirx.reinterpret(narrow, w))
    pairs = T.call_llvm_pure_intrin(narrow, first[0], tirx.reinterpret(f"int8x{4 * way.lanes}", acc), signed)
    return acc + T.call_llvm_pure_intrin(wide, last, pairs, T.Broadcast(T.int16(1), 2 * way.lanes))


def _seed(way: Way) -> np.ndarray:
    """Bits drawn at random; floats near 0.5, which the loop takes to w/(1 − w), near 1."""
    rng = np.random.default_rng(0)
    if way.dtype == "float32":
        return rng.uniform(0.45, 0.55, (way.accumulators, way.lanes)).astype("float32")
    return rng.integers(0, np.iinfo(way.dtype).max, (way.accumulators, way.lanes), way.dtype, endpoint=True)


def main() -> None:
    """Every way of every target that runs here, in GMAC/s."""
    for name in targets.names():
        target = targets.resolve(name)
        if target.missing_on(targets.this_host().flags):
            continue
        ways = (*bit_ways(target), float_way(target), int8_way(target))
        with pinned(1):
            clock = clock_way()
            samples = alternate([build(way, target).probe(way.name) for way in (*ways, clock)], CHOICE_SECONDS)
        ghz = clock.macs_per_call / np.median(samples[clock.name])
        speeds = (f"{way.name} {way.macs_per_call / np.median(samples[way.name]):.0f}" for way in ways)
        print(f"{name}: {', '.join(speeds)} GMAC/s at {ghz:.2f} GHz")


if __name__ == "__main__":
    main()
