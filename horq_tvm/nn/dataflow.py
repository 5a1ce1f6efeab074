"""Where a model's layers stand between its inputs and outputs, read from a trace of its forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from horq_tvm.errors import UsageError
from horq_tvm.nn.activations import PReLU, RPReLU, RSign
from horq_tvm.nn.layers import HorqLayer

# Operators by name, whichever form a trace has them in: a module's class, a function, a method, an ATen operator.
_LAYERS = {
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution"),
    *("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "bilinear", "scaled_dot_product_attention"),
    *("multi_head_attention_forward", "horq_conv2d", "horq_linear"),
}
_LAYER_MODULES = (
    *(nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase),
    HorqLayer,
)
_NEVER_NEGATIVE = {"relu", "relu_", "relu6", "hardsigmoid", "sigmoid", "softplus", "softmax", "abs", "square", "exp"}
# Nor these, if their least value, the second argument, is not.
_CLIPPED = {"clamp", "clamp_", "clamp_min", "clip", "hardtanh", "hardtanh_"}
# What is not negative stays so through these.
_SIGN_KEPT = {
    *("maxpool1d", "maxpool2d", "max_pool1d", "max_pool2d", "max_pool1d_with_indices", "max_pool2d_with_indices"),
    *("avgpool1d", "avgpool2d", "avg_pool1d", "avg_pool2d", "adaptiveavgpool1d", "adaptiveavgpool2d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptivemaxpool2d", "adaptive_max_pool2d", "mean", "amax"),
    *("dropout", "dropout1d", "dropout2d", "alphadropout", "identity", "clone", "contiguous", "to", "detach"),
    *("flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "chunk", "split", "getitem"),
    *("cat", "concat", "stack", "upsample", "interpolate"),
}
# Through these too, where all that goes in is not negative, numbers included.
_ARITHMETIC = {"add", "iadd", "add_", "mul", "imul", "mul_", "div", "truediv"}


@dataclass(frozen=True)
class Role:
    """Where a layer stands.

    `reads_input` and `feeds_output`: with no other layer between. `after_relu`: nothing that it is fed is negative.
    """

    reads_input: bool
    feeds_output: bool
    after_relu: bool


@dataclass(frozen=True)
class _Step:
    """A node of a trace: its operator's name in lower case, the module it belongs to, the least value it clips to."""

    node: fx.Node
    op: str
    is_layer: bool = False
    module: nn.Module | None = None
    least: float | None = None

    @property
    def sources(self) -> list[fx.Node]:
        return self.node.all_input_nodes


def layer_roles(model: nn.Module, example_inputs: Tensor | Sequence[Tensor] | None = None) -> dict[nn.Module, Role]:
    """The role of every layer module that forward calls.

    A module that is called more than once reads the input, feeds the output or follows a ReLU if any of its calls does.
    Traced by `torch.export` if example inputs are given, else by `torch.fx`. UsageError where that fails.
    """
    steps = _exported(model, example_inputs) if example_inputs is not None else _traced(model)
    inputs = _reached_by_inputs(steps)
    outputs = _reaching_outputs(steps)
    positive = _never_negative(steps)
    roles: dict[nn.Module, Role] = {}
    for step in steps:
        if step.is_layer and step.module is not None:
            before = roles.get(step.module, Role(False, False, False))
            roles[step.module] = Role(
                before.reads_input or step.node in inputs,
                before.feeds_output or step.node in outputs,
                before.after_relu or bool(step.sources and step.sources[0] in positive),
            )
    return roles


def _reached_by_inputs(steps: Sequence[_Step]) -> set[fx.Node]:
    """Nodes that a model input reaches with no layer between, layers themselves included."""
    carrying: set[fx.Node] = set()
    reached: set[fx.Node] = set()
    for step in steps:
        if step.op == "input" or any(source in carrying for source in step.sources):
            reached.add(step.node)
            if not step.is_layer:
                carrying.add(step.node)
    return reached


def _reaching_outputs(steps: Sequence[_Step]) -> set[fx.Node]:
    """Nodes that reach a model output with no layer between, layers themselves included."""
    reaching: set[fx.Node] = set()
    for step in reversed(steps):
        if step.op == "output" or (step.node in reaching and not step.is_layer):
            reaching.update(step.sources)
    return reaching


def _never_negative(steps: Sequence[_Step]) -> set[fx.Node]:
    """Nodes whose values are at least 0, whatever the input."""
    positive: set[fx.Node] = set()
    for step in steps:
        kept = step.op in _SIGN_KEPT or (step.op in _ARITHMETIC and not _has_negative_number(step.node))
        kept = kept and bool(step.sources) and all(source in positive for source in step.sources)
        clipped = step.least is not None and step.least >= 0
        if kept or clipped or step.op in _NEVER_NEGATIVE:
            positive.add(step.node)
    return positive


def _has_negative_number(node: fx.Node) -> bool:
    return any(isinstance(value, (int, float)) and value < 0 for value in (*node.args, *node.kwargs.values()))


# --- Traces -----------------------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Layers and the activations of `horq_tvm.nn` are one node each."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, (*_LAYER_MODULES, PReLU, RSign, RPReLU)) or super().is_leaf_module(
            module, qualified_name
        )


def _traced(model: nn.Module) -> list[_Step]:
    """The model's forward as `torch.fx` sees it. UsageError where it cannot."""
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # a tracer raises whatever the model's own code raises
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UsageError(
            f"{type(model).__name__}: torch.fx cannot trace its forward ({reason}); accepted is a forward that it can, "
            "or example_inputs, with which torch.export traces it"
        ) from error
    modules = dict(model.named_modules(remove_duplicate=False))
    steps = []
    for node in graph.nodes:
        if node.op == "call_module":
            module = modules[node.target]
            least = module.min_val if isinstance(module, nn.Hardtanh) else None
            steps.append(_Step(node, type(module).__name__.lower(), isinstance(module, _LAYER_MODULES), module, least))
        elif node.op in ("call_function", "call_method"):
            steps.append(_call(node, None))
        elif node.op in ("placeholder", "output"):
            steps.append(_Step(node, "input" if node.op == "placeholder" else "output"))
    return steps


def _exported(model: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> list[_Step]:
    """The model's forward as `torch.export` sees it. UsageError where it cannot."""
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    was = {module: module.training for module in model.modules()}
    try:
        program = torch.export.export(model.eval(), inputs)
    except Exception as error:  # as above
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UsageError(f"{type(model).__name__}: torch.export cannot trace its forward: {reason}") from error
    finally:
        for module, training in was.items():
            module.training = training
    signature = program.graph_signature
    user_inputs = set(signature.user_inputs)
    modules = dict(model.named_modules(remove_duplicate=False))
    steps = []
    for node in program.graph.nodes:
        if node.op == "call_function":
            # The second call of a module is told from the first by "@1" behind its name.
            stack = [path.partition("@")[0] for path, _ in node.meta.get("nn_module_stack", {}).values()]
            steps.append(_call(node, modules.get(stack[-1]) if stack else None))
        elif node.op == "output" or node.name in user_inputs:
            steps.append(_Step(node, "input" if node.op == "placeholder" else "output"))
    return steps


def _call(node: fx.Node, module: nn.Module | None) -> _Step:
    """A call of a function, in the forward of `module` where that is known."""
    op = _op_name(node.target)
    bound = node.args[1] if len(node.args) > 1 else node.kwargs.get("min", node.kwargs.get("min_val"))
    least = bound if op in _CLIPPED and isinstance(bound, (int, float)) else None
    return _Step(node, op, op in _LAYERS, module, least)


def _op_name(target: str | Callable[..., Any]) -> str:
    """`relu` of "relu", F.relu, torch.relu, operator.iadd and aten.relu.default alike."""
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    return name.partition(".")[0].lower().strip("_") if not isinstance(target, str) else target.lower()
