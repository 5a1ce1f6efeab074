"""The tile kernel on tensor cores: its counts, its epilogue, its tiles, and what it takes of each architecture."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

import tvm
from tvm import relax, s_tir, tirx

from horq_tvm import ops, pipeline, targets
from horq_tvm.cuda import disassembly, fatbin
from horq_tvm.errors import HorqError
from horq_tvm.ops import Geometry
from horq_tvm.relay_passes.pack_weights import pack_words
from horq_tvm.schedules import blocks, layout
from horq_tvm.schedules.cuda import mma, tile
from horq_tvm.schedules.cuda.mma import Gemm, Tile
from horq_tvm.schedules.layout import WeightLayout
from horq_tvm.specs import LayerConfig
from horq_tvm.straightline import constant
from tests.cuda import nvcc
from tests.cuda.source import source_of
from tests.end_to_end.drawn import Drawn, compile_module, rewritten_with_given_scales
from tests.end_to_end.test_oracle import exact_results
from tests.relay_passes.program import module
from tests.schedules.cuda import card, pocl

Array = np.ndarray[Any, Any]
CUDA = targets.resolve("cuda")
CARD = tile.Card.of(CUDA)

STAGES = [  # of ResNet-18: height, channels, filters, stride
    (56, 64, 64, 1),
    (56, 64, 128, 2),
    (28, 128, 128, 1),
    (28, 128, 256, 2),
    (14, 256, 256, 1),
    (14, 256, 512, 2),
    (7, 512, 512, 1),
]

# --- Counts -----------------------------------------------------------------------------------------------------------

THREE = Geometry((3, 3), padding=(1, 1, 1, 1))
ONE = Geometry((1, 1))
COUNTS = [  # every chunk of 4, 2 and 1 words; stages that end within a window; tiles beyond pixels and filters
    (Gemm((1, 9, 7, 1, 2, 8), (1, 72, 72), THREE), Tile(64, 64, 2, 2, 2)),
    (Gemm((1, 5, 5, 1, 1, 16), (1, 40, 144), THREE), Tile(16, 32, 1, 4, 4)),
    (Gemm((2, 5, 6, 1, 3, 2), (1, 32, 24), THREE), Tile(32, 32, 2, 2, 3)),
    (
        Gemm((2, 7, 5, 3, 4, 1), (3, 24, 16), Geometry((3, 3), (2, 1), (1, 2, 1, 0), (1, 2), 3)),
        Tile(32, 32, 2, 2, 1),
    ),
    (Gemm((3, 4, 4, 2, 2, 2), (2, 8, 8), Geometry((2, 2), (1, 2), (0, 1, 2, 0), groups=2)), Tile(16, 32, 1, 2, 1)),
    (Gemm((1, 1, 3, 1, 1, 6), (1, 104, 8), ONE), Tile(16, 64, 1, 2, 2)),
    (Gemm((1, 1, 40, 1, 8, 36), (1, 40, 40), ONE), Tile(16, 32, 1, 4, 1)),
    (Gemm((1, 12, 11, 1, 1, 2), (1, 64, 24), THREE), Tile(128, 64, 2, 4, 1)),
    (Gemm((1, 7, 10, 1, 1, 4), (1, 136, 40), THREE), Tile(64, 128, 4, 2, 2)),
]


def windows(gemm: Gemm, planes: Array) -> Array:
    """planes [N,H,W,G,P,words] → [P,M,G,kh·kw·words]."""
    top, left, bottom, right = gemm.geometry.padding
    padded = np.pad(planes, [(0, 0), (top, bottom), (left, right)] + [(0, 0)] * 3)
    (kh, kw), (sy, sx), (dy, dx) = gemm.geometry.kernel, gemm.geometry.strides, gemm.geometry.dilation
    rows, columns = gemm.output
    taps = [
        padded[:, y * dy : y * dy + (rows - 1) * sy + 1 : sy, x * dx : x * dx + (columns - 1) * sx + 1 : sx]
        for y in range(kh)
        for x in range(kw)
    ]
    rows_of_words = np.stack(taps, 5).reshape(gemm.pixels, gemm.weight[0], gemm.orders, gemm.window)
    return np.moveaxis(rows_of_words, 2, 0)


def operands(gemm: Gemm) -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    planes, weight = (rng.integers(0, 2**32, shape, dtype=np.uint32) for shape in (gemm.planes, gemm.weight))
    weight[:, :, gemm.window :] = 0
    return planes, weight


def by_tiles(gemm: Gemm, of: Tile) -> pocl.Program:
    sch = s_tir.Schedule(mma.count(gemm, of))
    m, g, n = sch.get_loops(sch.get_sblock("mma"))
    for loop, axis in ((m, "x"), (n, "y"), (g, "z")):
        sch.bind(loop, f"blockIdx.{axis}")
    return pocl.Program.of(blocks.function(sch))


def counted(gemm: Gemm, program: pocl.Program) -> Array:
    """int32 [P,M,G,F]"""
    (name,) = program.functions
    planes = program.run(name, *operands(gemm))
    groups = gemm.weight[0]
    return np.stack(planes).reshape(gemm.orders, -1, groups, planes[0].shape[-1])[:, : gemm.pixels, :, : gemm.filters]


def popcounts(gemm: Gemm) -> Array:
    planes, weight = operands(gemm)
    differing = windows(gemm, planes)[:, :, :, None] ^ weight[:, :, : gemm.window]
    return np.bitwise_count(differing).sum(-1)


@pytest.mark.parametrize(("gemm", "of"), COUNTS, ids=str)
def test_counts_are_exact_whenever_copies_land(gemm: Gemm, of: Tile) -> None:
    program, expected = by_tiles(gemm, of), popcounts(gemm)
    for asynchronous in (True, False):
        np.testing.assert_array_equal(counted(gemm, replace(program, asynchronous=asynchronous)), expected)


@pytest.mark.parametrize(("gemm", "of"), COUNTS[:2], ids=str)
def test_counts_without_barriers_are_wrong(gemm: Gemm, of: Tile) -> None:
    stripped = replace(by_tiles(gemm, of).without_barriers(), asynchronous=False)
    assert np.any(counted(gemm, stripped) != popcounts(gemm))


# --- Whole layers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conv:
    """A convolution of a chain: filters, kernel, padding, groups, stride, order."""

    filters: int
    order: int
    kernel: int = 3
    groups: int = 1
    stride: int = 1
    padding: int = 1


CHAINS: dict[str, tuple[tuple[int, int, int, int], Sequence[Conv], bool]] = {
    "planes alone": ((2, 5, 7, 32), [Conv(64, 2), Conv(96, 3), Conv(16, 1, kernel=1, padding=0)], False),
    "value and planes": ((1, 6, 7, 64), [Conv(64, 2), Conv(64, 1), Conv(64, 4)], True),
    "groups": ((1, 6, 7, 64), [Conv(128, 2, groups=2), Conv(128, 2, groups=4), Conv(128, 3)], True),
    "many planes": ((2, 7, 5, 64), [Conv(64, 5, stride=2), Conv(96, 8), Conv(160, 2, padding=0)], True),
}


def chain(shape: tuple[int, int, int, int], convs: Sequence[Conv], residual: bool) -> tvm.IRModule:
    """Convolutions of ±1, an affine, a PReLU and a residual behind each that keeps its shape; static scales."""
    rng = np.random.default_rng(1)
    depths = [shape[3], *(conv.filters for conv in convs)]

    def body(emit: Any, value: relax.Expr) -> relax.Expr:
        for i, (conv, (depth, filters)) in enumerate(zip(convs, pairwise(depths), strict=True)):
            weight = rng.choice(np.array([-1.0, 1.0]), (filters, conv.kernel, conv.kernel, depth // conv.groups))
            y = emit(
                ops.conv2d(
                    value,
                    constant(weight.astype("float32")),
                    name=f"c{i}",
                    strides=(conv.stride,) * 2,
                    padding=(conv.padding,) * 4,
                    groups=conv.groups,
                )
            )
            line, slope = rng.standard_normal((2, filters)).astype("float32"), rng.random(filters).astype("float32")
            y = emit(relax.op.add(emit(relax.op.multiply(y, constant(line[0]))), constant(line[1])))
            y = emit(relax.op.nn.prelu(y, constant(slope), axis=3))
            keeps = residual and ops.shape_of(y) == ops.shape_of(value)
            value = emit(relax.op.add(y, value)) if keeps else y
        return value

    configs = {
        f"c{i}": LayerConfig(conv.order, "static", tuple(3.0 / (k + 1) for k in range(conv.order)))
        for i, conv in enumerate(convs)
    }
    return pipeline.rewrite(configs)(module([shape], body))


@pytest.mark.parametrize("name", CHAINS)
def test_one_launch_from_planes_to_planes(name: str) -> None:
    """As on the CPU, to the last bit where no sign is in doubt: sums of different roundings could flip one."""
    shape, convs, residual = CHAINS[name]
    mod = chain(shape, convs, residual)
    model = card.OnPocl(mod)
    x = (4 * np.random.default_rng(2).standard_normal(shape)).astype("float32")
    expected = compile_module(mod).load()(x)["y0"]
    np.testing.assert_allclose(model(x)["y0"], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    rules = [str(kernel.attrs["horq.rule"]) for _, kernel in kernels(model.lowered)]
    assert sorted(rules) == ["ballots"] + ["tensor_cores"] * len(convs)


def check_stage(stage: tuple[int, int, int, int], order: int, target: str) -> None:
    """Two convolutions of a stage in full size, as on the CPU."""
    height, channels, filters, stride = stage
    shape = (1, height, height, channels)
    mod = chain(shape, [Conv(filters, order, stride=stride), Conv(filters, order)], residual=True)
    x = (4 * np.random.default_rng(2).standard_normal(shape)).astype("float32")
    expected = compile_module(mod).load()(x)["y0"]
    found = card.OnPocl(mod, target=target)(x)["y0"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_large_tiles_of_a_small_card() -> None:
    check_stage(STAGES[0], 2, "cuda-sm87")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda", "cuda-sm87"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_every_stage_in_full_size(order: int, target: str) -> None:
    for stage in STAGES:
        check_stage(stage, order, target)


def test_the_epilogue_without_barriers_is_wrong() -> None:
    shape, convs, residual = CHAINS["value and planes"]
    model = card.OnPocl(chain(shape, convs, residual))
    x = (4 * np.random.default_rng(2).standard_normal(shape)).astype("float32")
    expected = model(x)["y0"]
    network = model.network
    network.program = replace(network.program.without_barriers(), asynchronous=False)
    assert np.any(model(x)["y0"] != expected)


def test_groups_of_few_filters_take_one_launch_too() -> None:
    few = [
        Drawn(96, 5, 4, "static", size=(2, 4, 4), groups=3, relu=True, seed=1),
        Drawn(4, 4, 2, "sample", size=(2, 5, 4), kernel=(3, 3), groups=8, padding=(1, 1, 1, 1), seed=2),
        Drawn(70, 3, 3, "patch", size=(1, 5, 4), kernel=(3, 3), padding=(1, 0, 1, 1), strides=(2, 1), seed=3),
        Drawn(70, 7, 1, "static", lead=(5,), seed=4),
    ]
    mod, fed = rewritten_with_given_scales(few)
    model = card.OnPocl(mod)
    for drawn, y, result in exact_results(few, [drawn.image() for drawn in few], model, fed, given_beta=1.0):
        np.testing.assert_array_equal(y, result.sums.sum(axis=0), err_msg=str(drawn))
    rules = [str(kernel.attrs["horq.rule"]) for name, kernel in kernels(model.lowered) if "bitserial" in name]
    assert rules == ["popcounts"] * len(few)


def kernels(mod: tvm.IRModule) -> list[tuple[str, tirx.PrimFunc]]:
    return [(gvar.name_hint, func) for gvar, func in mod.functions_items() if isinstance(func, tirx.PrimFunc)]


# --- Layout and tiles -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filters", "groups", "expected"),
    [(64, 1, WeightLayout("mma", 8)), (8, 4, WeightLayout("mma", 8)), (7, 1, WeightLayout("words", 16))],
)
def test_layout_by_filters(filters: int, groups: int, expected: WeightLayout) -> None:
    assert layout.bitserial(CUDA, filters, groups, 576) == expected


def test_rows_of_weights_are_filled_up_to_steps_and_groups_to_products() -> None:
    words = np.random.default_rng(0).integers(1, 2**32, (20, 3, 3, 2), dtype=np.uint32)
    packed = pack_words(words, 2, WeightLayout("mma", 8))
    assert packed.shape == (2, 16, 24)
    np.testing.assert_array_equal(packed[1, 3, :18], words[13].ravel())
    assert not packed[:, :, 18:].any()
    assert not packed[:, 10:].any()


def gemm_of(height: int, channels: int, filters: int, stride: int, order: int, batch: int = 1) -> Gemm:
    words = channels // 32
    depth = -(-9 * words // ops.STEP_WORDS) * ops.STEP_WORDS
    geometry = Geometry((3, 3), (stride, stride), (1, 1, 1, 1))
    return Gemm((batch, height, height, 1, order, words), (1, filters, depth), geometry)


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("order", range(1, 9))
@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_tiles_fit_and_keep_a_card_busy(stage: tuple[int, int, int, int], order: int, batch: int) -> None:
    gemm = gemm_of(*stage, order, batch)
    found = tile.choose(gemm, CARD)
    across, down = found.fragments
    assert tile.shared_bytes(gemm, found) <= CARD.shared_bytes
    assert gemm.orders * across * down * 4 <= tile.REGISTERS_OF_SUMS
    assert found.m == across * found.warps_m * mma.FRAGMENT_M
    assert found.n == down * found.warps_n * mma.FRAGMENT_N
    assert found.n % 32 == 0  # whole words of the next planes
    assert found.row % 16 == 8  # four rows are all banks
    assert math.prod(mma.grid(gemm, found)) >= 32
    least = min(256, gemm.pixels // 4)
    assert batch == 1 or found.m * found.n >= least


def test_few_multiprocessors_take_larger_tiles() -> None:
    small, large = (tile.Card.of(targets.resolve(name)) for name in ("cuda-sm87", "cuda-sm90"))
    for stage in STAGES:
        orin, h100 = (tile.choose(gemm_of(*stage, order=2), of) for of in (small, large))
        assert orin.m * orin.n > h100.m * h100.n, stage


def test_planes_that_no_tile_holds() -> None:
    with pytest.raises(HorqError, match=r"64 planes need \d+ bytes of shared memory .* accepted are up to 49152"):
        tile.choose(gemm_of(*STAGES[0], order=64), CARD)


# --- Machine code -----------------------------------------------------------------------------------------------------


def residual_pair(stage: tuple[int, int, int, int], order: int, target: str) -> tvm.IRModule:
    """Two convolutions of a residual network, lowered; the first makes a float value and the second one's planes."""
    height, channels, filters, stride = stage
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((filters, 3, 3, depth)).astype("float32") for depth in (channels, filters)]

    def body(emit: Any, x: relax.Expr, shortcut: relax.Expr) -> relax.Expr:
        strides = (stride, stride)
        y = emit(ops.conv2d(x, constant(weights[0]), name="a", strides=strides, padding=(1, 1, 1, 1)))
        value = emit(relax.op.add(y, shortcut))
        y = emit(ops.conv2d(value, constant(weights[1]), name="b", padding=(1, 1, 1, 1)))
        return emit(relax.op.add(y, value))

    configs = {name: LayerConfig(order, "static", (0.8, 0.4, 0.2, 0.1)[:order]) for name in "ab"}
    shapes = [(1, height, height, channels), (1, height // stride, height // stride, filters)]
    return card.lower(pipeline.rewrite(configs)(module(shapes, body)), target)


def sources(mods: Sequence[tvm.IRModule]) -> str:
    """CUDA source of the bitserial kernels."""
    named = {}
    for i, mod in enumerate(mods):
        for name, func in kernels(mod):
            if str(func.attrs["horq.rule"]) == "tensor_cores":
                named[f"k{i}_{name}"] = func.with_attr("global_symbol", f"k{i}_{name}")
    return source_of(tvm.IRModule(named), CUDA)


def check_machine_code(order: int, stages: Sequence[tuple[int, int, int, int]], target: str = "cuda") -> None:
    toolkit, archs = nvcc.found(), targets.resolve(target).archs
    source = sources([residual_pair(stage, order, target) for stage in stages])
    check_barriers(source, order)
    made = fatbin.compile_source(source, archs, toolkit, CUDA.shared_bytes)
    nvcc.check_uses(made, 2 * len(stages) * len(archs), 0.125)
    for (kernel, arch), found in nvcc.instructions(made).items():
        assert disassembly.counting(found) == "BMMA", (kernel, arch)
        assert bool(found.get("LDGSTS")) == (arch >= 80), (kernel, arch)


def check_barriers(source: str, order: int) -> None:
    """Counts that TVM lays over the stages wait until these are read. PoCL would hide it: its `horq_mma` waits too."""
    _, *bodies = re.split(r"__global__ void [^;{]*{", source)
    for body in bodies:
        buffers = len(re.findall(r"__shared__", body))
        assert 2 <= buffers <= 2 + order
        epilogue = body[body.rindex("horq_mma(") :]
        stores = epilogue.index("(int2*)")
        assert ("__syncthreads" in epilogue[:stores]) or buffers == 2 + order
        assert "__syncthreads" in epilogue[stores:]


def test_machine_code_of_one_stage() -> None:
    check_machine_code(2, STAGES[5:6])


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda", "cuda-sm75", "cuda-sm87", "cuda-sm90"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_machine_code_of_every_stage(order: int, target: str) -> None:
    check_machine_code(order, STAGES, target)
