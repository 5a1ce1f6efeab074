"""The phases in their order: after each, the forms before it are gone (docs/architecture.md)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from horq_tvm import ops, pipeline, targets
from horq_tvm.ops.int8 import Activation
from horq_tvm.specs import LayerConfig
from horq_tvm.straightline import constant, op_name, read_main
from tests.relay_passes.program import module, names

RNG = np.random.default_rng(0)
X = (1, 8, 6, 6)
CONFIGS = {"body": LayerConfig(2, "static", (0.75, 0.25))}
op, nn = relax.op, relax.op.nn


def imported() -> tvm.IRModule:
    """stem → BN → body → ReLU → mean → head, as a front end gives it, NCHW."""

    def normal(*shape: int) -> relax.Expr:
        return constant(RNG.standard_normal(shape).astype("float32"))

    def body(emit: Any, x: relax.Expr) -> Any:
        stem = emit(nn.conv2d(x, emit(ops.name(normal(16, 8, 3, 3), name="stem")), padding=(1, 1, 1, 1)))
        normed = emit(op.add(emit(op.multiply(stem, normal(1, 16, 1, 1))), normal(1, 16, 1, 1)))
        weight = emit(ops.name(normal(16, 16, 3, 3), name="body"))
        inner = emit(nn.relu(emit(nn.conv2d(normed, weight, padding=(1, 1, 1, 1)))))
        pooled = emit(op.mean(inner, [2, 3]))
        return emit(op.matmul(pooled, emit(ops.name(normal(16, 4), name="head"))))

    return module([X], body)


@pytest.fixture(scope="module")
def canonical() -> tvm.IRModule:
    return pipeline.canonicalise()(imported())


def layers(mod: tvm.IRModule) -> list[str]:
    return [name for name in names(mod) if name in ("horq.conv2d", "horq.dense", "horq.bitserial_conv2d")]


def test_canonical_form_has_named_layers_and_no_names(canonical: tvm.IRModule) -> None:
    assert layers(canonical) == ["horq.conv2d", "horq.conv2d", "horq.dense"]
    assert not {"horq.name", "relax.nn.conv2d", "relax.matmul"} & set(names(canonical))


def test_rewriting_folds_normalisation_and_leaves_float_what_has_no_config(canonical: tvm.IRModule) -> None:
    after = pipeline.rewrite(CONFIGS)(canonical)
    assert layers(after) == ["horq.conv2d", "horq.bitserial_conv2d", "horq.dense"]
    assert "relax.multiply" not in names(after)


def test_a_float_rest_in_int8(canonical: tvm.IRModule) -> None:
    activation = Activation(0.05, 128)
    after = pipeline.quantize_rest({"stem": activation, "head": activation})(pipeline.rewrite(CONFIGS)(canonical))
    assert {"horq.int8_conv2d", "horq.int8_dense"} <= set(names(after))
    assert not {"horq.conv2d", "horq.dense"} & set(names(after))


@pytest.mark.parametrize("level", ["x86-64", "x86-64-v3", "x86-64-v4-vpopcntdq"])
def test_from_groups_to_kernels(canonical: tvm.IRModule, level: str) -> None:
    target = targets.resolve(level)
    with target.tvm_target():
        grouped = pipeline.optimise(target)(pipeline.rewrite(CONFIGS)(canonical))
        assert not any(name.startswith("horq.bitserial") for name in names(grouped))
        lowered = pipeline.lower(target)(grouped)
    calls = [value for _, value in read_main(lowered).bindings if isinstance(value, relax.Call)]
    assert {op_name(call) for call in calls} <= {"relax.call_tir", "relax.reshape"}
    kernels = [function for function in lowered.functions.values() if isinstance(function, tvm.tirx.PrimFunc)]
    assert len(kernels) >= 3
    assert not any(
        isinstance(function, relax.Function) for gvar, function in lowered.functions.items() if gvar.name_hint != "main"
    )
