"""All passes from the rewrite to the fused groups, on a small network: the meaning stays, the old operators go."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from horq_tvm import ops
from horq_tvm.relay_passes.fold_affine import FoldAffine
from horq_tvm.relay_passes.fold_constant_plane import FoldConstantPlane
from horq_tvm.relay_passes.fuse_epilogue import FuseEpilogue
from horq_tvm.relay_passes.pack_weights import PackWeights
from horq_tvm.relay_passes.rewrite_layers import RewriteLayers
from horq_tvm.relay_passes.sink_reshapes import SinkReshapes
from horq_tvm.specs import LayerConfig, Scale
from horq_tvm.straightline import constant, fields_of, read_main
from tests.relay_passes.program import module, names, run

C = 32
X = (2, 5, 5, 3)
REWRITTEN = ("same", "down", "hidden")


def network() -> tvm.IRModule:
    """stem → BN, ReLU → same + shortcut → PReLU as it comes from two ReLUs → down, grouped → hidden → head."""
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> relax.Expr:
        return constant(rng.standard_normal(shape).astype("float32"))

    def body(emit: Any, x: relax.Expr) -> relax.Expr:
        def norm(y: relax.Expr) -> relax.Expr:
            return emit(relax.op.add(emit(relax.op.multiply(y, weight(C))), weight(1, 1, 1, C)))

        stem = emit(relax.op.nn.relu(norm(emit(ops.conv2d(x, weight(C, 3, 3, 3), name="stem", padding=(1, 1, 1, 1))))))
        same = emit(ops.conv2d(stem, weight(C, 3, 3, C), name="same", padding=(1, 1, 1, 1)))
        y = emit(relax.op.add(norm(same), stem))
        minus = emit(relax.op.nn.relu(emit(relax.op.negative(y))))
        y = emit(relax.op.subtract(emit(relax.op.nn.relu(y)), emit(relax.op.multiply(minus, weight(C)))))
        shifted = emit(relax.op.add(y, weight(C)))
        window: dict[str, Any] = {"strides": (2, 2), "padding": (1, 0, 1, 2), "groups": 1}
        y = emit(relax.op.reshape(norm(emit(ops.conv2d(shifted, weight(C, 3, 3, C), name="down", **window))), (2, -1)))
        hidden = emit(relax.op.add(emit(ops.dense(y, weight(C, ops.shape_of(y)[-1]), name="hidden")), weight(C)))
        return emit(relax.op.add(emit(ops.dense(hidden, weight(10, C), name="head")), weight(10)))

    return module([X], body)


def compiled(rewritten: tvm.IRModule) -> tvm.IRModule:
    """The passes behind the rewrite, as the pipeline runs them."""
    return tvm.transform.Sequential(
        [
            SinkReshapes(),
            FoldAffine(),
            FoldConstantPlane(),
            relax.transform.DeadCodeElimination(["main"]),
            PackWeights(lambda filters, _groups: 8 if filters > 8 else 4),
            SinkReshapes(),
            FuseEpilogue(),
        ]
    )(rewritten)


def config(scale: Scale, order: int) -> LayerConfig:
    return LayerConfig(order, scale, (1.5, 0.6, 0.2)[:order] if scale == "static" else None)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("scale", ["patch", "sample", "static"])
def test_the_fused_network_means_what_the_rewritten_one_does(scale: Scale, order: int) -> None:
    rewritten = RewriteLayers({name: config(scale, order) for name in REWRITTEN})(network())
    after = compiled(rewritten)
    x = np.random.default_rng(1).standard_normal(X).astype("float32")
    (found,), (expected,) = run(after, x), run(rewritten, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    called = names(after)
    assert not any(name.startswith("horq.bitserial") or name in ("horq.conv2d", "horq.dense") for name in called)
    assert sum(name.startswith("fused_packed_") for name in called) == 5
    assert "relax.add" not in called


def test_taps_of_the_fused_network_are_those_of_the_rewritten_one() -> None:
    rewritten = RewriteLayers({name: config("static", 2) for name in REWRITTEN}, taps=["down", "hidden"])(network())
    after = compiled(rewritten)
    assert list(after.attrs["horq.tap_names"]) == list(rewritten.attrs["horq.tap_names"])
    assert len(fields_of(read_main(after).result)) == 1 + 8
    x = np.random.default_rng(1).standard_normal(X).astype("float32")
    for found, expected in zip(run(after, x), run(rewritten, x), strict=True):
        if expected.dtype == np.uint32:
            np.testing.assert_array_equal(found, expected)
        else:
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
