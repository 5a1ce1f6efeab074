"""An ONNX file as the importer wants it: read, checked, its operators known, its inputs static, its nodes named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from tvm.relax.frontend.onnx import onnx_frontend

from ...errors import HorqError, UsageError
from ..shapes import OpenShape, fix_shapes
from .converters import CONVERTERS, FAKE_QUANTIZE, INTERNAL
from .linear import kind_without_zero_point

OLDEST_OPSET = 7
"""Opset 7 brought NumPy's broadcasting; before it Add and Mul take an axis that no exporter of today writes."""

STANDARD, HORQ = "", "horq"

WEIGHTED = ("Conv", "Gemm", "MatMul")
"""Layers whose input 1 is a weight."""

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")

# Control flow, sequences and optionals: a network whose shape is decided while it runs cannot be laid out in memory.
_DYNAMIC = {"If", "Loop", "Scan", "NonZero", "Unique", "Compress", "NonMaxSuppression", "AllClassNMS"}


def read(model: str | Path | onnx.ModelProto) -> onnx.ModelProto:
    """The model, a copy if it is a proto. Raises UsageError for a missing file, HorqError for one that is not ONNX."""
    if isinstance(model, onnx.ModelProto):
        proto = onnx.ModelProto()
        proto.CopyFrom(model)
        where = "the given ONNX model"
    else:
        where = str(model)
        if Path(model).suffix in TORCH_SUFFIXES:
            raise UsageError(
                f"{where}: found a PyTorch file of the kind {Path(model).suffix}, which need not hold a network;"
                " accepted: an .onnx file, an ExportedProgram saved as .pt2, or in Python an nn.Module"
            )
        if not Path(model).is_file():
            raise UsageError(f"{where}: found no such file; accepted is the path of an ONNX model")
        try:
            proto = onnx.load(str(model))
        except Exception as error:  # protobuf and onnx raise many kinds, for a broken file or missing external data
            raise HorqError(f"{where}: not a readable ONNX model ({_first_line(error)})") from error
    if not proto.graph.node and not proto.graph.output:
        raise HorqError(f"{where}: not a readable ONNX model (found no graph in it)")
    if not proto.graph.output:
        raise HorqError(f"{where}: found a graph of no outputs; accepted is a graph with one or more")
    return proto


def standard_opset(model: onnx.ModelProto) -> int:
    """The ai.onnx opset of the model. Raises HorqError outside the range that we read."""
    versions = [opset.version for opset in model.opset_import if _domain(opset.domain) == STANDARD]
    newest = onnx.defs.onnx_opset_version()
    found = versions[0] if versions else 1
    if not OLDEST_OPSET <= found <= newest:
        raise HorqError(f"the model uses ai.onnx opset {found}; accepted are {OLDEST_OPSET} to {newest}")
    return found


def inline_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replaces the calls of model-local functions by their bodies, those of HORQ layers excepted: they are ours."""
    others = [f for f in model.functions if f.domain != HORQ]
    del model.functions[:]
    if not others:
        return model
    model.functions.extend(others)
    try:
        return onnx.inliner.inline_local_functions(model)
    except Exception as error:
        raise HorqError(f"the model's own functions cannot be inlined ({_first_line(error)})") from error


def check_operators(graph: onnx.GraphProto) -> None:
    """Raises HorqError that lists every operator we have no converter for, each with its node and domain."""
    known = onnx_frontend._get_convert_map().keys() - _DYNAMIC
    unknown: dict[tuple[str, str], list[str]] = {}
    for node in graph.node:
        domain = _domain(node.domain)
        supported = (domain, node.op_type) in CONVERTERS or (
            domain == STANDARD and (node.op_type in known or node.op_type == "Constant")
        )
        if not supported:
            unknown.setdefault((node.op_type, domain or "ai.onnx"), []).append(label(node))
    if unknown:
        listed = "; ".join(
            f"{op} (domain {domain}, node {nodes[0]!r}{f' and {len(nodes) - 1} more' if len(nodes) > 1 else ''})"
            for (op, domain), nodes in unknown.items()
        )
        raise HorqError(f"the model has operators that cannot be compiled: {listed}")


def check_nodes(model: onnx.ModelProto) -> None:
    """Raises HorqError with ONNX's own words for a node that breaks the standard, an unknown attribute say.

    The whole model is not checked: ONNX's checker refuses much that every runtime takes, outputs without a shape say.
    """
    context = onnx.checker.C.CheckerContext()
    context.ir_version = model.ir_version
    context.opset_imports = {_domain(opset.domain): opset.version for opset in model.opset_import}
    for node in model.graph.node:
        if _domain(node.domain) == STANDARD:
            try:
                onnx.checker.check_node(node, context)
            except onnx.checker.ValidationError as error:
                reason = _first_line(error)
                raise HorqError(f"{node.op_type} (node {label(node)!r}): not valid ONNX ({reason})") from error


def model_inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """The graph's inputs that no initialiser answers for."""
    constants = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in constants]


def set_input_shapes(graph: onnx.GraphProto, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Writes `shapes` into the graph's inputs. Raises UsageError where a shape is missing, unknown or contradicts."""
    inputs = {value.name: value for value in model_inputs(graph)}
    for name, value in inputs.items():
        if not value.type.HasField("tensor_type"):
            raise HorqError(f"input {name!r}: found {value.type.WhichOneof('value')}; accepted are tensors")
    fixed = fix_shapes({name: _open_shape(value.type.tensor_type) for name, value in inputs.items()}, shapes)
    for name, value in inputs.items():
        dims = value.type.tensor_type.shape.dim
        del dims[:]
        for extent in fixed[name]:
            dims.add().dim_value = extent
        value.type.tensor_type.shape.SetInParent()


def _open_shape(tensor: onnx.TypeProto.Tensor) -> OpenShape | None:
    if not tensor.HasField("shape"):
        return None
    return [dim.dim_value if dim.dim_value > 0 else dim.dim_param or "?" for dim in tensor.shape.dim]


def name_nodes(graph: onnx.GraphProto) -> None:
    """Gives every node a unique name: its own, or its first output's where that is empty (interface.md)."""
    taken: set[str] = set()
    for node in graph.node:
        wanted = node.name or next((out for out in node.output if out), node.op_type)
        node.name = wanted
        count = 1
        while node.name in taken:
            node.name = f"{wanted}_{count}"
            count += 1
        taken.add(node.name)


def pair_quantisations(graph: onnx.GraphProto) -> None:
    """A DequantizeLinear of what a QuantizeLinear gives, by the same scale and zero point → one node FakeQuantize.

    Those of initialisers stay two: they fold. So do those of one scale a channel, and those whose operands differ.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    constants |= {
        node.output[0]: attribute.t
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    }
    quantised = {node.output[0]: node for node in graph.node if _is(node, "QuantizeLinear")}
    for node in graph.node:
        source = quantised.get(node.input[0]) if _is(node, "DequantizeLinear") else None
        if source is None or source.input[0] in constants:
            continue
        kind = _zero_point_kind(source, constants)
        operands = [_scale_and_zero_point(pair, constants, kind) for pair in (source, node)]
        if _same_scalars(*operands):
            if len(_given(node)) == 2:
                graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((), kind), f"{node.output[0]}.zero"))
                node.input[2:] = [graph.initializer[-1].name]
            node.op_type, node.domain = FAKE_QUANTIZE, INTERNAL
            node.input[0] = source.input[0]
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    kept = [node for node in graph.node if not (_is(node, "QuantizeLinear") and node.output[0] not in read)]
    del graph.node[:]
    graph.node.extend(kept)


def _is(node: onnx.NodeProto, op: str) -> bool:
    return node.op_type == op and _domain(node.domain) == STANDARD


def _given(node: onnx.NodeProto) -> list[str]:
    """The node's operands without an empty name at the end."""
    return list(node.input[:-1] if node.input and not node.input[-1] else node.input)


def _zero_point_kind(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> np.dtype[Any]:
    """The integers that a QuantizeLinear gives: its zero point's, else those of its output_dtype, else uint8."""
    given = _given(node)[2:]
    if given and given[0] in constants:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(constants[given[0]].data_type))
    return kind_without_zero_point({a.name: a.i for a in node.attribute if a.name == "output_dtype"})


def _scale_and_zero_point(
    node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto], kind: np.dtype[Any]
) -> list[onnx.TensorProto | None]:
    """Both as constants, None for what is none; a zero point that is not given is 0 of `kind`."""
    found = [constants.get(name) for name in _given(node)[1:]]
    return found if len(found) > 1 else [*found, onnx.numpy_helper.from_array(np.zeros((), kind))]


def _same_scalars(first: Sequence[onnx.TensorProto | None], second: Sequence[onnx.TensorProto | None]) -> bool:
    """Whether scale and zero point are known, of one element, and the same."""
    if len(first) != 2 or len(second) != 2:
        return False
    for a, b in zip(first, second, strict=True):
        if a is None or b is None or a.data_type != b.data_type:
            return False
        left, right = onnx.numpy_helper.to_array(a), onnx.numpy_helper.to_array(b)
        if left.size != 1 or not np.array_equal(left.ravel(), right.ravel()):
            return False
    return True


def label(node: onnx.NodeProto) -> str:
    """What to call a node in a message."""
    return node.name or next((out for out in node.output if out), "?")


def _domain(domain: str) -> str:
    return STANDARD if domain in ("", "ai.onnx") else domain


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
