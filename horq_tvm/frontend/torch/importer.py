"""The walk over an exported graph: constants folded on the way, our converters for layers, TVM's for the rest."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from tvm import relax
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from ...errors import HorqError
from ...specs import LayerConfig
from ...straightline import constant
from ..imported import ImportedModel, result_specs, tensor_spec
from . import program as torch_program
from .converters import CONVERTERS, LAYERS, Node


def import_program(
    model: torch.nn.Module | ExportedProgram | str | Path,
    example_inputs: Sequence[torch.Tensor] | None,
    input_shapes: Mapping[str, tuple[int, ...]],
) -> ImportedModel:
    """`import_torch`, with torch there."""
    program = torch_program.load(model, example_inputs, input_shapes)
    inputs = list(torch_program.user_inputs(program))
    importer = _GraphImporter(program)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            mod = importer.from_exported_program(program, False, True, False, None)
        finally:
            if importer.broken:
                importer.block_builder._end_block()  # TVM would log to standard error that it was left open
    kept = mod["main"].params
    specs = tuple(tensor_spec(name, param) for name, param in zip(inputs, kept, strict=True))
    results = mod["main"].ret_ty
    count = len(results.fields) if isinstance(results, relax.TupleType) else 1
    names = ["output"] if count == 1 else [f"output_{position}" for position in range(count)]
    return ImportedModel(mod, specs, result_specs(mod, names), importer.trained)


class _GraphImporter(ExportedProgramImporter):
    """TVM's importer, with parameters as constants from the start and every node's name known to its converter."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        self.trained: dict[str, LayerConfig] = {}
        self.broken = False
        self._names = layer_names(program.graph)
        self._known = _constants(program)

    def _check_unsupported_func_type(self, nodes: Sequence[fx.Node]) -> None:
        unknown: dict[str, list[str]] = {}
        for node in nodes:
            if node.op == "call_function" and node not in self._known:
                name = operator_name(node)
                if name not in CONVERTERS and name not in self.convert_map:
                    unknown.setdefault(name, []).append(node.name)
        if unknown:
            listed = "; ".join(
                f"{name} (node {found[0]!r}{f' and {len(found) - 1} more' if len(found) > 1 else ''})"
                for name, found in unknown.items()
            )
            raise HorqError(f"the model has operators that cannot be compiled: {listed}")

    def _translate_fx_graph(
        self, graph_module: Any, nodes: Sequence[fx.Node], inputs_vars: dict[str, relax.Var], custom_ops: Any = None
    ) -> tuple[relax.Expr, ...]:
        for node in nodes:
            try:
                if node.op == "output":
                    return self._flatten_output_args(self.retrieve_args(node)[0])
                if node in self._known:
                    self.env[node] = _literal(self._known[node])
                elif node.op == "placeholder":
                    self.env[node] = inputs_vars[node.name]
                elif node.op == "call_function":
                    self.env[node] = self._convert(node)
                else:
                    raise HorqError(f"found a node of kind {node.op}; accepted are calls of operators")
            except Exception as error:
                self.broken = True
                reason = str(error).strip().splitlines()
                raise HorqError(
                    f"{operator_name(node)} (node {node.name!r}) cannot be compiled: "
                    f"{reason[-1] if reason else type(error).__name__}"
                ) from error
        raise HorqError("the exported graph has no output node")

    def _convert(self, node: fx.Node) -> Any:
        name = operator_name(node)
        converter = CONVERTERS.get(name)
        if converter is not None:
            values = fx.node.map_arg(_arguments(node), lambda source: self.env[source])
            result = converter(Node(self._names.get(node, node.name), name, values, self.emit, self.trained))
            if result is not None:
                return result
        return self.convert_map[name](node)

    def emit(self, expr: relax.Expr) -> relax.Expr:
        """`expr` bound to a variable."""
        return self.block_builder.emit(expr)


def operator_name(node: fx.Node) -> str:
    """The name that converter maps know an operator by: "conv2d.default"."""
    return getattr(node.target, "__name__", str(node.target))


def _arguments(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by the schema's names, defaults filled in."""
    found: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):
        given = position < len(node.args) and not argument.kwarg_only
        default = node.kwargs.get(argument.name, argument.default_value)
        found[argument.name] = node.args[position] if given else default
    return found


def layer_names(graph: fx.Graph) -> dict[fx.Node, str]:
    """A unique name for each convolution and matrix product: the path of the module whose forward calls it.

    A call in the forward of the model itself has no path and takes its node's name; a second one in the same module, or
    a second call of the module, takes a number.
    """
    names: dict[fx.Node, str] = {}
    taken: set[str] = set()
    for node in graph.nodes:
        if node.op != "call_function" or operator_name(node) not in LAYERS:
            continue
        stack = list(node.meta.get("nn_module_stack", {}).values())
        wanted = (stack[-1][0] if stack else "") or node.name
        name, count = wanted, 1
        while name in taken:
            name, count = f"{wanted}_{count}", count + 1
        taken.add(name)
        names[node] = name
    return names


def _constants(program: ExportedProgram) -> dict[fx.Node, torch.Tensor]:
    """The value of every node that depends on parameters, buffers and constants alone."""
    signature = program.graph_signature
    stored: dict[str, torch.Tensor] = {**dict(program.named_parameters()), **dict(program.named_buffers())}
    stored |= {name: value for name, value in program.constants.items() if isinstance(value, torch.Tensor)}
    targets = signature.inputs_to_parameters | signature.inputs_to_buffers
    targets |= signature.inputs_to_lifted_tensor_constants
    known: dict[fx.Node, torch.Tensor] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in targets:
            known[node] = stored[targets[node.name]].detach()
        elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            random = torch.Tag.nondeterministic_seeded in node.target.tags
            if random or not all(source in known for source in node.all_input_nodes):
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: known[source])
            with torch.no_grad():
                value = node.target(*args, **kwargs)
            if isinstance(value, torch.Tensor):
                known[node] = value
    return known


def _literal(value: torch.Tensor) -> relax.Expr:
    return constant(value.cpu().numpy())
