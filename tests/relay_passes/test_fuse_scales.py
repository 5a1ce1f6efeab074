"""FuseScales: what joins scales and binarisations computed at run time, what does not, and that all means the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from horq_tvm import ops
from horq_tvm.relay_passes.fold_constant_plane import FoldConstantPlane
from horq_tvm.relay_passes.fuse_scales import FuseScales
from horq_tvm.relay_passes.rewrite_layers import RewriteLayers
from horq_tvm.specs import LayerConfig, Scale
from horq_tvm.straightline import constant, op_name, read_main
from tests.relay_passes.program import module, names, run

C = 8
X = (2, 5, 4, C)
RNG = np.random.default_rng(0)
WEIGHT = constant(RNG.standard_normal((C, 3, 3, C)).astype("float32"))
OP = relax.op


def by_channel(channels: int = C) -> relax.Expr:
    return constant(RNG.standard_normal(channels).astype("float32"))


def block(emit: Any, x: relax.Expr, *, shortcut: bool = True, relu: bool = False) -> relax.Expr:
    """conv(x·factor + addend), and x besides where there is a shortcut."""
    line = emit(OP.add(emit(OP.multiply(x, by_channel())), by_channel()))
    line = emit(OP.nn.relu(line)) if relu else line
    y = emit(ops.conv2d(line, WEIGHT, name="a", padding=(1, 0, 1, 2)))
    return emit(OP.add(y, x)) if shortcut else y


def rewritten(mod: tvm.IRModule, scale: Scale, order: int = 2, taps: tuple[str, ...] = ()) -> tvm.IRModule:
    betas = (0.9, 0.4, 0.1)[:order] if scale == "static" else None
    return FoldConstantPlane()(RewriteLayers({"a": LayerConfig(order, scale, betas)}, taps)(mod))


def same(before: tvm.IRModule, after: tvm.IRModule) -> None:
    x = RNG.standard_normal(X).astype("float32")
    for found, expected in zip(run(after, x), run(before, x), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("relu", [False, True])
def test_patch_is_one_operator(order: int, relu: bool) -> None:
    before = rewritten(module([X], lambda emit, x: block(emit, x, relu=relu)), "patch", order)
    after = FuseScales()(before)
    called = names(after)
    assert "horq.patch" in called
    assert not {"horq.scales", "horq.binarize"} & set(called)
    (patch,) = (value for _, value in read_main(after).bindings if op_name(value) == "horq.patch")
    assert int(patch.attrs["first"]) == (relu and order > 1)
    assert len(patch.args) == (1 if relu else 3)
    same(before, after)


def test_of_sample_both_read_what_the_shortcut_reads() -> None:
    before = rewritten(module([X], block), "sample")
    after = FuseScales()(before)
    program = read_main(after)
    sources = {op_name(value): value.args[0] for _, value in program.bindings if op_name(value).startswith("horq.")}
    assert sources["horq.scales"] == sources["horq.binarize"] == program.params[0]
    assert "relax.multiply" not in names(after)
    same(before, after)


@pytest.mark.parametrize("missing", ["multiply", "add"])
def test_a_factor_or_an_addend_alone(missing: str) -> None:
    def body(emit: Any, x: relax.Expr) -> relax.Expr:
        line = emit(OP.add(x, by_channel()) if missing == "multiply" else OP.multiply(by_channel(), x))
        return emit(ops.conv2d(line, WEIGHT, name="a"))

    before = rewritten(module([X], body), "sample")
    after = FuseScales()(before)
    assert [name for name in names(after) if name.startswith("relax.")] == []
    same(before, after)


def unfused(kind: str, emit: Any, x: relax.Expr) -> relax.Expr | list[relax.Expr]:
    y = emit(OP.nn.relu(x))
    if kind == "made for it alone":  # the two operators belong to the kernel that makes y
        return block(emit, y, shortcut=False)
    if kind == "needed elsewhere":
        line = emit(OP.add(y, by_channel()))
        conv = emit(ops.conv2d(line, WEIGHT, name="a", padding=(1, 1, 1, 1)))
        return emit(OP.add(emit(OP.add(conv, line)), y))
    if kind == "returned":
        line = emit(OP.add(y, by_channel()))
        return [emit(ops.conv2d(line, WEIGHT, name="a")), line, y]
    line = emit(OP.add(y, constant(RNG.standard_normal(X).astype("float32"))))  # not by channel
    return [emit(ops.conv2d(line, WEIGHT, name="a")), y]


@pytest.mark.parametrize("kind", ["made for it alone", "needed elsewhere", "returned", "not by channel"])
def test_what_stays(kind: str) -> None:
    before = rewritten(module([X], lambda emit, x: unfused(kind, emit, x)), "sample")
    after = FuseScales()(before)
    assert names(after) == names(before)
    same(before, after)


def test_channels_that_make_no_vector_stay() -> None:
    shape, weight = (1, 4, 4, 9), constant(np.ones((4, 1, 1, 9), "float32"))

    def body(emit: Any, x: relax.Expr) -> relax.Expr:
        return emit(ops.conv2d(emit(OP.add(x, by_channel(9))), weight, name="a"))

    before = rewritten(module([shape], body), "sample")
    assert names(FuseScales()(before)) == names(before)


def test_static_scales_are_left_to_the_epilogue() -> None:
    before = rewritten(module([X], block), "static")
    assert names(FuseScales()(before)) == names(before)


def test_taps_see_the_value_and_the_planes() -> None:
    before = rewritten(module([X], block), "patch", taps=("a",))
    after = FuseScales()(before)
    assert "horq.patch" in names(after)
    assert "relax.multiply" in names(after)
    same(before, after)
