"""Which layers a model has, and which of them are rewritten (shared interface: "Which layers are rewritten")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import tvm
from tvm import relax

from . import ops
from .errors import HorqError, UsageError
from .plan import UNSET, Plan, layer_config
from .specs import LayerConfig
from .straightline import Program, op_name, read_main, vars_of

OPAQUE_LAYERS = "horq.opaque_layers"
DEFAULT_ORDER = 2
DEFAULT_SCALE = "sample"

NOT_CONSTANT = "its weights are not constant"
LAYER_OPS = {"horq.conv2d": "conv2d", "horq.dense": "dense"}
# Between a layer and the model's edge, these too are a conv or dense layer: of opaque weights, or of another kind.
OTHER_LAYER_OPS = frozenset(
    {"relax.matmul", *(f"relax.nn.conv{rank}d{kind}" for rank in (1, 2, 3) for kind in ("", "_transpose"))}
)

Source = Literal["plan", "model", "order", "default"]


@dataclass(frozen=True)
class Layer:
    """A conv or dense layer. `weight` is its shape, [F,kh,kw,C/g] or [F,L], None where `opaque` says what is wrong.

    `reads_input` and `feeds_output`: a model input reaches it, or it reaches a model output, with no other conv or
    dense between.
    """

    name: str
    op: str
    weight: tuple[int, ...] | None = None
    groups: int = 1
    reads_input: bool = False
    feeds_output: bool = False
    opaque: str | None = None

    @property
    def depthwise(self) -> bool:
        """One input channel a group (C/g = 1)."""
        return self.op == "conv2d" and self.weight is not None and self.weight[-1] == 1

    @property
    def reason_to_stay_float(self) -> str | None:
        """Why the layer is float unless a plan or the model itself says otherwise."""
        if self.opaque is not None:
            return self.opaque
        if self.reads_input:
            return "it reads the model's input"
        if self.feeds_output:
            return "it feeds the model's output"
        return "it is depthwise" if self.depthwise else None


@dataclass(frozen=True)
class Choice:
    """What becomes of a layer, and who said so: `config` binarises it, else `reason` says why it stays float."""

    config: LayerConfig | None
    reason: str | None
    source: Source


def enumerate_layers(mod: tvm.IRModule) -> tuple[Layer, ...]:
    """The layers of a module in canonical form, in topological order; those of opaque weights come last."""
    program = read_main(mod)
    reads = _reached_by_inputs(program)
    feeds = _reaching_outputs(program)
    layers = []
    for var, value in program.bindings:
        op = LAYER_OPS.get(op_name(value))
        if op is not None:
            groups = int(value.attrs["groups"]) if op == "conv2d" else 1
            name, weight = str(value.attrs["name"]), ops.shape_of(value.args[1])
            layers.append(Layer(name, op, weight, groups, var in reads, var in feeds))
    opaque = mod.attrs[OPAQUE_LAYERS] if mod.attrs and OPAQUE_LAYERS in mod.attrs else []
    return (*layers, *(Layer(str(name), str(op), opaque=str(reason)) for name, op, reason in opaque))


def choose(
    layers: Sequence[Layer],
    *,
    plan: Plan | None = None,
    trained: Mapping[str, LayerConfig] | None = None,
    order: int | str | None = None,
    scale: str | None = None,
) -> dict[str, Choice]:
    """What becomes of each layer: the plan decides, then the model's own HORQ node, then `order` and `scale`.

    `order` (1 to 8, or "float") and `scale` are None where the caller did not give them. A plan speaks of the layers
    that it lists and, where it has a `default`, of all others too, the first and last layer included; it cannot rewrite
    a layer of opaque weights.

    Raises:
        UsageError: an unknown layer, order or scale, or a plan that lists a layer of opaque weights.
        HorqError: a HORQ node that is not among the layers.
    """
    plan, trained = plan or Plan(), trained or {}
    names = [layer.name for layer in layers]
    plan.check_names(names)
    lost = sorted(trained.keys() - set(names))
    if lost:
        raise HorqError(f"no layer {', '.join(lost)} in the module; there are {', '.join(names) or 'none'}")
    fallback = _fallback(order, scale, bool(trained))
    return {layer.name: _choice(layer, plan, trained.get(layer.name), fallback) for layer in layers}


def _choice(layer: Layer, plan: Plan, trained: LayerConfig | None, fallback: Choice) -> Choice:
    planned = plan.layers.get(layer.name, plan.default)
    if planned != UNSET:
        listed = layer.name in plan.layers
        return _planned(layer, planned, plan.source, listed=listed)
    if trained is not None:
        return Choice(trained, None, "model")
    if fallback.config is not None and layer.reason_to_stay_float is not None:
        return Choice(None, layer.reason_to_stay_float, "default")
    return fallback


def _planned(layer: Layer, config: Any, source: str, *, listed: bool) -> Choice:
    if config is None:
        return Choice(None, "the plan says float" if listed else "the plan's default is float", "plan")
    if layer.opaque is None:
        return Choice(config, None, "plan")
    if listed:
        raise UsageError(f"{source}: layers.{layer.name}: {layer.opaque}, so it cannot be rewritten; accepted: float")
    return Choice(None, layer.opaque, "plan")


def _fallback(order: int | str | None, scale: str | None, has_trained: bool) -> Choice:
    """What a layer gets that neither plan nor model speaks of, its place in the network aside."""
    given: Source = "default" if order is None and scale is None else "order"
    if order == "float":
        return Choice(None, "order is float", "order")
    if order is not None and not isinstance(order, int):
        raise UsageError(f"order: found {order!r}; accepted: 1 to 8 or float")
    config = layer_config(DEFAULT_ORDER if order is None else order, DEFAULT_SCALE if scale is None else scale)
    if has_trained and order is None:
        return Choice(None, "the model has HORQ layers, and this is none of them", "default")
    return Choice(config, None, given)


def _is_layer(value: relax.Expr) -> bool:
    return op_name(value) in LAYER_OPS or op_name(value) in OTHER_LAYER_OPS


def _reached_by_inputs(program: Program) -> set[relax.Var]:
    """The bindings that a model input reaches with no layer between, layers themselves included."""
    carrying, reached = set(program.params), set()
    for var, value in program.bindings:
        if any(used in carrying for used in vars_of(value)):
            reached.add(var)
            if not _is_layer(value):
                carrying.add(var)
    return reached


def _reaching_outputs(program: Program) -> set[relax.Var]:
    """The bindings that reach a model output with no layer between, layers themselves included."""
    reaching: set[relax.Var] = set(vars_of(program.result))
    for var, value in reversed(program.bindings):
        if var in reaching and not _is_layer(value):
            reaching.update(vars_of(value))
    return reaching
