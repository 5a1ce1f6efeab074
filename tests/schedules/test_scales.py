"""Scales and planes that take x·factor + addend from x: channels of whole and of broken vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

from tvm import relax

from horq_tvm import ops, reference
from horq_tvm.specs import LayerConfig, Scale
from horq_tvm.straightline import constant
from tests.end_to_end.drawn import with_betas
from tests.end_to_end.test_oracle import assert_within
from tests.relay_passes.program import module

CHANNELS = (8, 24, 64, 96, 320)
SIZE = (2, 7, 9)


@pytest.mark.parametrize("scale", ["sample", "patch"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_line_by_channel(scale: Scale, order: int) -> None:
    """Factors are powers of two and all else are eighths, so that x·factor + addend is exact in any rounding."""
    rng = np.random.default_rng(order)
    factors = [2.0 ** rng.integers(-1, 2, c).astype("float32") for c in CHANNELS]
    addends = [rng.integers(-9, 10, c).astype("float32") / 8 for c in CHANNELS]
    weights = [rng.standard_normal((16, 3, 3, c)).astype("float32") for c in CHANNELS]
    images = [rng.integers(-40, 41, (*SIZE, c)).astype("float32") / 8 for c in CHANNELS]

    def body(emit: Any, *inputs: relax.Var) -> list[relax.Expr]:
        outputs = []
        for i, x in enumerate(inputs):
            y = emit(relax.op.add(emit(relax.op.multiply(x, constant(factors[i]))), constant(addends[i])))
            outputs.append(emit(ops.conv2d(y, constant(weights[i]), name=f"L{i}", padding=(1, 1, 1, 1))))
        return outputs

    configs = {f"L{i}": LayerConfig(order, scale) for i in range(len(CHANNELS))}
    outputs = with_betas(module([(*SIZE, c) for c in CHANNELS], body), configs).load()(*images)
    for i, x in enumerate(images):
        signs, alpha = reference.binarize_weights(weights[i])
        lined = np.moveaxis(x * factors[i] + addends[i], 3, 1)
        how: dict[str, Any] = {"order": order, "scale": scale, "padding": (1, 1, 1, 1)}
        signs = np.moveaxis(signs, 3, 1)
        shared = reference.conv2d(lined, signs, alpha, outputs[f"beta_{i}"], **how)
        own = reference.conv2d(lined, signs, alpha, **how)
        assert (np.abs(shared.beta.astype("float64") - own.beta) <= 1e-6 * own.beta[..., :1]).all()
        assert_within(np.moveaxis(outputs[f"y{i}"], 3, 1), shared.output, shared.tolerance, f"{CHANNELS[i]} channels")
