"""Which layers there are, and who decides what becomes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from horq_tvm import ops
from horq_tvm.errors import HorqError, UsageError
from horq_tvm.layers import NOT_CONSTANT, Choice, Layer, choose, enumerate_layers
from horq_tvm.plan import Plan
from horq_tvm.specs import LayerConfig
from horq_tvm.straightline import constant
from tests.relay_passes.program import module

WEIGHT = constant(np.ones((8, 3, 3, 8), "float32"))
SAME = (1, 1, 1, 1)
SAMPLE = LayerConfig(2, "sample")
PATCH = LayerConfig(3, "patch")

STEM = Layer("stem", "conv2d", (8, 3, 3, 3), 1, reads_input=True)
BODY = Layer("body", "conv2d", (8, 3, 3, 8))
DEPTHWISE = Layer("depthwise", "conv2d", (8, 3, 3, 1), 8)
OPAQUE = Layer("opaque", "dense", opaque=NOT_CONSTANT)
HEAD = Layer("head", "dense", (10, 8), feeds_output=True)
LAYERS = (STEM, BODY, DEPTHWISE, HEAD, OPAQUE)


def network() -> tvm.IRModule:
    """stem → relu → body → + the stem's value → pool → head, and a second output from the sum."""

    def body(emit: Any, x: relax.Expr) -> Any:
        stem = emit(ops.conv2d(x, WEIGHT, name="stem", padding=SAME))
        y = emit(ops.conv2d(emit(relax.op.nn.relu(stem)), WEIGHT, name="body", padding=SAME))
        deep = emit(ops.conv2d(emit(relax.op.add(y, stem)), WEIGHT, name="deep", padding=SAME, groups=1))
        flat = emit(relax.op.reshape(emit(relax.op.nn.relu(deep)), (1, 128)))
        return emit(relax.op.nn.softmax(emit(ops.dense(flat, constant(np.ones((10, 128), "float32")), name="head"))))

    return module([(1, 4, 4, 8)], body)


def test_layers_in_topological_order_with_their_place_in_the_network() -> None:
    weight = (8, 3, 3, 8)
    assert enumerate_layers(network()) == (
        Layer("stem", "conv2d", weight, 1, reads_input=True),
        Layer("body", "conv2d", weight),
        Layer("deep", "conv2d", weight),
        Layer("head", "dense", (10, 128), feeds_output=True),
    )


def test_a_shortcut_around_the_first_layer_puts_the_next_one_at_the_edge_too() -> None:
    def body(emit: Any, x: relax.Expr) -> Any:
        y = emit(ops.conv2d(x, WEIGHT, name="a", padding=SAME))
        z = emit(ops.conv2d(emit(relax.op.add(x, y)), WEIGHT, name="b", padding=SAME))
        return emit(ops.conv2d(z, WEIGHT, name="c", padding=SAME)), z

    edges = {
        layer.name: (layer.reads_input, layer.feeds_output) for layer in enumerate_layers(module([(1, 4, 4, 8)], body))
    }
    assert edges == {"a": (True, False), "b": (True, True), "c": (False, True)}


def test_layers_without_constant_weights_are_listed_and_stand_between_the_others() -> None:
    def body(emit: Any, x: relax.Expr, w: relax.Expr) -> Any:
        return emit(ops.dense(emit(relax.op.matmul(x, w)), constant(np.ones((4, 4), "float32")), name="d"))

    mod = module([(2, 4), (4, 4)], body).with_attr("horq.opaque_layers", [["m", "dense", "it is two inputs"]])
    assert enumerate_layers(mod) == (
        Layer("d", "dense", (4, 4), feeds_output=True),
        Layer("m", "dense", opaque="it is two inputs"),
    )


def configs(choices: dict[str, Choice]) -> dict[str, LayerConfig | None]:
    return {name: choice.config for name, choice in choices.items()}


def test_by_default_the_inner_layers_are_rewritten_and_the_others_say_why_not() -> None:
    assert choose(LAYERS) == {
        "stem": Choice(None, "it reads the model's input", "default"),
        "body": Choice(SAMPLE, None, "default"),
        "depthwise": Choice(None, "it is depthwise", "default"),
        "head": Choice(None, "it feeds the model's output", "default"),
        "opaque": Choice(None, NOT_CONSTANT, "default"),
    }


@pytest.mark.parametrize(
    ("order", "scale", "expected"),
    [
        (3, None, LayerConfig(3, "sample")),
        (None, "patch", LayerConfig(2, "patch")),
        (1, "static", LayerConfig(1, "static")),
    ],
)
def test_order_and_scale_speak_for_inner_layers_only(
    order: int | None, scale: str | None, expected: LayerConfig
) -> None:
    chosen = choose(LAYERS, order=order, scale=scale)
    assert chosen["body"] == Choice(expected, None, "order")
    assert [name for name, config in configs(chosen).items() if config is not None] == ["body"]


def test_order_float_rewrites_nothing_but_the_models_own_horq_layers() -> None:
    assert choose(LAYERS, order="float")["body"] == Choice(None, "order is float", "order")
    assert configs(choose(LAYERS, order="float", trained={"body": PATCH}))["body"] == PATCH


def test_a_model_with_horq_layers_leaves_the_others_float_unless_an_order_is_given() -> None:
    layers = (*LAYERS, Layer("other", "dense", (4, 4)))
    silent = choose(layers, trained={"body": PATCH})
    assert silent["body"] == Choice(PATCH, None, "model")
    assert silent["other"] == Choice(None, "the model has HORQ layers, and this is none of them", "default")
    assert configs(choose(layers, trained={"body": PATCH}, scale="patch"))["other"] is None
    explicit = choose(layers, trained={"body": PATCH}, order=1)
    assert configs(explicit)["body"] == PATCH
    assert configs(explicit)["other"] == LayerConfig(1, "sample")
    assert configs(choose(layers, trained={"stem": PATCH}))["stem"] == PATCH


def test_the_plan_speaks_first() -> None:
    plan = Plan(layers={"stem": PATCH, "depthwise": SAMPLE, "body": None})
    chosen = choose(LAYERS, plan=plan, trained={"body": PATCH}, order=4)
    assert configs(chosen) == {"stem": PATCH, "body": None, "depthwise": SAMPLE, "head": None, "opaque": None}
    assert chosen["body"] == Choice(None, "the plan says float", "plan")
    assert chosen["head"].reason == "it feeds the model's output"


def test_a_plans_default_speaks_for_every_layer_that_it_does_not_list() -> None:
    floats = choose(LAYERS, plan=Plan(default=None, layers={"head": SAMPLE}), trained={"body": PATCH}, order=4)
    assert floats["body"] == Choice(None, "the plan's default is float", "plan")
    assert configs(floats)["head"] == SAMPLE
    chosen = configs(choose(LAYERS, plan=Plan(default=SAMPLE, layers={"head": None})))
    assert chosen == {"stem": SAMPLE, "body": SAMPLE, "depthwise": SAMPLE, "head": None, "opaque": None}


def test_mistakes() -> None:
    with pytest.raises(UsageError, match=r"no layer 'bodi' in the model; accepted: body, stem"):
        choose(LAYERS, plan=Plan(layers={"bodi": SAMPLE}))
    with pytest.raises(UsageError, match=r"layers.opaque: its weights are not constant"):
        choose(LAYERS, plan=Plan(layers={"opaque": SAMPLE}))
    with pytest.raises(UsageError, match="order: found 0; accepted: 1 to 8"):
        choose(LAYERS, order=0)
    with pytest.raises(UsageError, match="order: found 'double'"):
        choose(LAYERS, order="double")
    with pytest.raises(UsageError, match="scale: found 'row'"):
        choose(LAYERS, scale="row")
    with pytest.raises(HorqError, match="no layer ghost in the module"):
        choose(LAYERS, trained={"ghost": SAMPLE})
