"""Float layers for CUDA, executed by PoCL, against plain NumPy in float64; and what a missing barrier does to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

import tvm
from numpy.typing import NDArray
from tvm import te, topi

from horq_tvm import targets
from horq_tvm.cuda import fatbin
from horq_tvm.ops import Geometry
from horq_tvm.schedules import conv2d as direct
from horq_tvm.schedules.cuda import float as floats
from horq_tvm.schedules.cuda.tile import Card
from tests.cuda import nvcc
from tests.cuda.source import source_of
from tests.schedules.cuda import pocl

Array = NDArray[Any]
CUDA = targets.resolve("cuda")
CARD = Card.of(CUDA)


def conv(
    size: tuple[int, int, int], channels: int, filters: int, kernel: int = 3, stride: int = 1, **how: int
) -> floats.Gemm:
    """A convolution of a padded image of `size` = (N, H, W), its weights as PackWeights lays them for a card."""
    groups, dilation = how.get("groups", 1), how.get("dilation", 1)
    per_group = filters // groups
    lanes = next(v for v in (16, 8, 4, 2, 1) if groups == 1 or per_group % v == 0)
    weight = (groups, -(-per_group // lanes), kernel, kernel, channels // groups, lanes)
    geometry = Geometry((kernel, kernel), (stride, stride), dilation=(dilation, dilation), groups=groups)
    return floats.Gemm((*size, channels), weight, geometry, filters)


CONVS = [
    conv((1, 9, 9), 3, 24),
    conv((2, 10, 7), 40, 70, stride=2),
    conv((1, 8, 8), 32, 64, kernel=1),
    conv((1, 12, 12), 24, 40, dilation=2, groups=2),
    conv((3, 6, 6), 12, 12, groups=3),
    conv((1, 30, 30), 3, 64, kernel=7, stride=2),
    conv((1, 7, 7), 256, 512, kernel=1),
    conv((1, 1, 33), 65, 10, kernel=1),
]
LARGE = [
    conv((1, 230, 230), 3, 64, kernel=7, stride=2),
    conv((8, 58, 58), 64, 64),
    conv((16, 14, 14), 256, 512, kernel=1, stride=2),
    conv((64, 8, 8), 32, 96),
]


def function(inputs: Sequence[te.Tensor], output: te.Tensor) -> tvm.tirx.PrimFunc:
    (func,) = tvm.s_tir.Schedule(te.create_prim_func([*inputs, output])).mod.functions.values()
    return func


def scheduled(rule: Any, inputs: Sequence[te.Tensor], output: te.Tensor) -> tvm.tirx.PrimFunc:
    found = rule(function(inputs, output), CUDA)
    assert found is not None
    (func,) = found.mod.functions.values()
    return func.with_attr("global_symbol", "f0")


def kernel(spec: floats.Gemm, tile: floats.Tile | None = None) -> tvm.tirx.PrimFunc:
    """relu(conv + bias)."""
    x, weight, bias = (
        te.placeholder(shape, name=n) for shape, n in ((spec.x, "x"), (spec.weight, "w"), ((spec.channels,), "b"))
    )
    y = floats.conv2d(spec, tile or floats.choose(spec, CARD), x, weight)
    return scheduled(
        floats.tiles, [x, weight, bias], te.compute(y.shape, lambda n, h, v, f: te.max(y[n, h, v, f] + bias[f], 0.0))
    )


def drawn(spec: floats.Gemm) -> list[Array]:
    rng = np.random.default_rng(7)
    return [rng.normal(size=shape).astype("float32") for shape in (spec.x, spec.weight, (spec.channels,))]


def expected(spec: floats.Gemm, x: Array, weight: Array, bias: Array) -> Array:
    groups, _, kh, kw, inner, _ = spec.weight
    (sy, sx), (dy, dx) = spec.geometry.strides, spec.geometry.dilation
    rows, columns = spec.output
    out = np.zeros((spec.x[0], rows, columns, groups, spec.filters))
    for g in range(groups):
        filters = np.moveaxis(weight[g].astype("float64"), 0, 3).reshape(kh, kw, inner, -1)[..., : spec.filters]
        for ry in range(kh):
            for rx in range(kw):
                taken = x[:, ry * dy :, rx * dx :, g * inner : (g + 1) * inner]
                out[:, :, :, g] += taken[:, : sy * (rows - 1) + 1 : sy, : sx * (columns - 1) + 1 : sx] @ filters[ry, rx]
    return np.maximum(out.reshape(*out.shape[:3], -1) + bias, 0)


@pytest.mark.parametrize(
    "spec", [*CONVS, *(pytest.param(spec, marks=pytest.mark.slow) for spec in LARGE)], ids=lambda s: f"{s.x}-{s.weight}"
)
def test_a_convolution_and_its_epilogue_are_one_launch(spec: floats.Gemm) -> None:
    pocl.device()
    program = pocl.Program.of(kernel(spec))
    assert len(program.functions["f0"].launches) == 1
    operands = drawn(spec)
    (found,) = program.run("f0", *operands)
    np.testing.assert_allclose(found, expected(spec, *operands), rtol=1e-5, atol=2e-6 * spec.depth)


def test_every_tile_is_taken_by_some_layer() -> None:
    taken = {floats.choose(spec, CARD) for spec in (*CONVS, *LARGE)}
    assert len(taken) > 3
    orin, h100 = (floats.choose(CONVS[6], Card.of(targets.resolve(name))) for name in ("cuda-sm87", "cuda-sm90"))
    assert orin.bm * orin.bn > h100.bm * h100.bn
    few, many = floats.choose(CONVS[6], CARD), floats.choose(LARGE[1], CARD)
    assert few.bm * few.bn < many.bm * many.bn


def test_without_barriers_a_convolution_is_wrong() -> None:
    pocl.device()
    spec = CONVS[1]
    operands = drawn(spec)
    (found,) = pocl.Program.of(kernel(spec)).without_barriers().run("f0", *operands)
    assert not np.allclose(found, expected(spec, *operands), rtol=1e-2, atol=1e-2)


def placeholders(*shapes: tuple[int, ...]) -> list[te.Tensor]:
    return [te.placeholder(shape, name=f"x{i}") for i, shape in enumerate(shapes)]


def dense() -> tuple[list[te.Tensor], te.Tensor, Any]:
    """One row: 500 sums of 300 products, which are shared out among threads."""
    x, w, b = placeholders((1, 1, 1, 300), (1, 32, 1, 1, 300, 16), (500,))
    y = direct.conv2d(x, w, Geometry((1, 1)), 500)
    out = te.compute(y.shape, lambda n, h, v, f: y[n, h, v, f] + b[f])
    return (
        [x, w, b],
        out,
        lambda x, w, b: (np.einsum("c,bcv->bv", x[0, 0, 0], w[0, :, 0, 0]).ravel()[:500] + b)[None, None, None],
    )


def mean() -> tuple[list[te.Tensor], te.Tensor, Any]:
    (x,) = placeholders((2, 7, 7, 40))
    return [x], topi.sum(x, axis=[1, 2], keepdims=True), lambda x: x.sum((1, 2), keepdims=True)


def depthwise() -> tuple[list[te.Tensor], te.Tensor, Any]:
    x, w = placeholders((2, 10, 11, 24), (3, 3, 24))
    y = direct.depthwise(x, w, Geometry((3, 3)))
    out = te.compute(y.shape, lambda *index: te.max(y(*index), 0.0))
    taps = [(i, j) for i in range(3) for j in range(3)]
    return [x, w], out, lambda x, w: np.maximum(sum(x[:, i : i + 8, j : j + 9] * w[i, j] for i, j in taps), 0)


def max_pool() -> tuple[list[te.Tensor], te.Tensor, Any]:
    (x,) = placeholders((1, 16, 16, 20))
    taps = [(i, j) for i in range(3) for j in range(3)]

    def of(x: Array) -> Array:
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
        return np.max([padded[:, i : i + 15 : 2, j : j + 15 : 2] for i, j in taps], axis=0)

    return [x], topi.nn.pool2d(x, (3, 3), (2, 2), (1, 1), (1, 1, 1, 1), "max", layout="NHWC"), of


WINDOWS = {"dense": dense, "mean": mean, "depthwise": depthwise, "max_pool": max_pool}


@pytest.mark.parametrize("name", WINDOWS)
def test_one_reduction_and_its_epilogue_are_one_launch(name: str) -> None:
    pocl.device()
    inputs, output, reference = WINDOWS[name]()
    func = scheduled(floats.windows, inputs, output)
    assert ('scope="shared"' in func.script()) == (name in ("dense", "mean"))
    program = pocl.Program.of(func)
    assert len(program.functions["f0"].launches) == 1
    rng = np.random.default_rng(3)
    operands = [rng.normal(size=[int(e) for e in tensor.shape]).astype("float32") for tensor in inputs]
    (found,) = program.run("f0", *operands)
    np.testing.assert_allclose(found, reference(*operands), rtol=1e-4, atol=1e-4)


def test_without_barriers_a_shared_sum_is_wrong() -> None:
    pocl.device()
    inputs, output, reference = dense()
    program = pocl.Program.of(scheduled(floats.windows, inputs, output)).without_barriers()
    operands = [np.full([int(e) for e in tensor.shape], 1.0, "float32") for tensor in inputs]
    (found,) = program.run("f0", *operands)
    assert not np.allclose(found, reference(*operands))


@pytest.mark.parametrize("rule", [floats.tiles, floats.windows])
def test_what_is_no_reduction_is_left_to_others(rule: Any) -> None:
    (x,) = placeholders((2, 4))
    assert rule(function([x], te.compute(x.shape, lambda *index: x(*index) + 1.0)), CUDA) is None


@pytest.mark.parametrize("tile", floats.TILES, ids=str)
def test_no_tile_spills(tile: floats.Tile) -> None:
    found = nvcc.found()
    func = kernel(conv((1, 30, 30), 64, 64), tile)
    source = source_of(tvm.IRModule({"f0": func}), CUDA)
    made = fatbin.compile_source(source, CUDA.archs, found, CUDA.shared_bytes)
    nvcc.check_uses(made, len(CUDA.archs), 0.25)
