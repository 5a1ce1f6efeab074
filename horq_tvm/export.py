"""From a trained PyTorch model to a file that `horq-tvm build` takes: an `ExportedProgram` or ONNX.

An ONNX file has a node `horq.HorqConv2d` for each HORQ layer, named by the layer's qualified module name. It carries
the functions that say in standard operators what such a node computes, so that any ONNX runtime can run it. Weights are
±1 and α stands beside them: nothing is left to be computed again.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxscript
import torch
from onnxscript import ir, optimizer
from torch import Tensor, nn

from horq_tvm import onnx_functions
from horq_tvm.errors import HorqError, UsageError
from horq_tvm.nn import freeze

# What a plan may speak of: these, and the HORQ nodes.
_NAMED_OPS = ("Conv", "Gemm", "MatMul")
_PROTOBUF_LIMIT = 1 << 31


def export_program(
    model: nn.Module, example_inputs: Tensor | Sequence[Tensor], *, dynamic_batch: bool = False
) -> torch.export.ExportedProgram:
    """The frozen model as a graph in which every HORQ layer is one `torch.ops.horq` node, for `torch.export.save`.

    `model` itself stays as it is, training mode included. With `dynamic_batch`, axis 0 of every input is free; else all
    shapes are those of `example_inputs`.

    Raises:
        UsageError: the example inputs are not tensors, or a `static` layer has no β yet.
        HorqError: `torch.export` cannot trace the model; it says why.
    """
    inputs = _tensors(example_inputs)
    shapes = None
    if dynamic_batch:
        # torch.export takes a batch of one for a constant.
        inputs = tuple(torch.cat([x, x]) if x.shape[0] == 1 else x for x in inputs)
        batch = torch.export.Dim("batch")
        shapes = tuple({0: batch} for _ in inputs)
    try:
        return torch.export.export(freeze(model), inputs, dynamic_shapes=shapes)
    except HorqError:
        raise
    except Exception as error:  # torch.export raises whatever the model's own code and its tracer raise.
        raise HorqError(f"{type(model).__name__}: torch.export cannot trace it: {_first_line(error)}") from error


def to_onnx(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    path: str | Path,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    *,
    dynamic_batch: bool = False,
) -> onnx.ModelProto:
    """Write the model in eval mode to `path` (in whole or not at all) and return what was written.

    Conv, Gemm and MatMul nodes bear the qualified name of their module, as the HORQ nodes do (`layer1.0.conv1`); a
    second one in the same module is `layer1.0.conv1_1`.

    Raises:
        UsageError, HorqError: as `export_program`; an operator that torch.onnx cannot translate; an unwritable path.
    """
    program = export_program(model, example_inputs, dynamic_batch=dynamic_batch)
    with _quiet():
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                input_names=input_names,
                output_names=output_names,
                custom_translation_table=_translations(),
                # The optimiser would fold a batch normalisation into its convolution, and the node's name with it.
                optimize=False,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise HorqError(f"{type(model).__name__}: torch.onnx cannot translate it: {_cause(error)}") from error
    assert exported is not None
    graph_model = exported.model
    _name_layers(graph_model.graph)
    optimizer.fold_constants(graph_model)
    optimizer.remove_unused_nodes(graph_model)
    _strip_metadata(graph_model)
    proto = onnx_functions.add_functions(ir.to_proto(graph_model))
    _write(proto, Path(path))
    return proto


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """torch operator → one plain node of domain horq. (A function would be inlined; it is added to the file later.)"""
    conv2d = _operator(
        "HorqConv2d", order="INT", scale="STRING", strides="INTS", pads="INTS", dilations="INTS", group="INT"
    )
    linear = _operator("HorqLinear", order="INT", scale="STRING")

    def horq_conv2d(x, weight, alpha, beta, bias, order, scale, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
        window = {"strides": stride, "pads": padding, "dilations": dilation, "group": groups}
        return conv2d(x, weight, alpha, beta, bias, order=order, scale=scale, **window)

    def horq_linear(x, weight, alpha, beta, bias, order, scale):  # type: ignore[no-untyped-def]
        return linear(x, weight, alpha, beta, bias, order=order, scale=scale)

    ops = torch.ops.horq
    return {ops.horq_conv2d.default: horq_conv2d, ops.horq_linear.default: horq_linear}


def _operator(name: str, **attributes: str) -> onnxscript.values.Op:
    """An operator that onnxscript can emit a node of, without a schema registered for the whole process."""
    Schema = onnx.defs.OpSchema
    optional = Schema.FormalParameterOption.Optional
    return onnxscript.values.Op(
        onnxscript.values.Opset(onnx_functions.DOMAIN, 1),
        name,
        Schema(
            name,
            onnx_functions.DOMAIN,
            1,
            inputs=[
                *(Schema.FormalParameter(operand, "T") for operand in ("X", "W", "alpha")),
                *(Schema.FormalParameter(operand, "T", param_option=optional) for operand in ("beta", "bias")),
            ],
            outputs=[Schema.FormalParameter("Y", "T")],
            type_constraints=[("T", ["tensor(float)"], "")],
            attributes=[
                Schema.Attribute(key, Schema.AttrType[kind], required=False) for key, kind in attributes.items()
            ],
        ),
    )


def _name_layers(graph: ir.Graph) -> None:
    """Name the nodes a plan may speak of as `frontend.torch` does: after the modules they come from, and uniquely."""
    taken: set[str] = set()
    for node in graph:
        # ["", "layer1", "layer1.0", "layer1.0.conv1", <the torch node>]
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        if scopes and (node.domain == onnx_functions.DOMAIN or node.op_type in _NAMED_OPS):
            # What the model's own forward calls has no module's name to bear.
            wanted = "".join(scopes[-2:-1]) or scopes[-1]
            numbered = (f"{wanted}_{count}" for count in itertools.count(1))
            node.name = next(name for name in itertools.chain([wanted], numbered) if name not in taken)
            taken.add(node.name)


def _strip_metadata(model: ir.Model) -> None:
    """Leave out what speaks of the exporting machine, as stack traces do."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def _write(proto: onnx.ModelProto, path: Path) -> None:
    """Write to a temporary file beside `path` and rename it, so that no reader meets half a file."""
    if proto.ByteSize() >= _PROTOBUF_LIMIT:
        raise HorqError(
            f"{path}: the model has {proto.ByteSize()} bytes; an ONNX file holds less than {_PROTOBUF_LIMIT}"
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(proto.SerializeToString(deterministic=True))
        temporary.replace(path)
    except OSError as error:
        raise HorqError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _tensors(example_inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    wrong = [type(x).__name__ for x in inputs if not isinstance(x, Tensor)]
    if wrong or not inputs:
        found = f"holds {wrong[0]}" if wrong else "is empty"
        raise UsageError(f"example_inputs {found}; accepted: a tensor, or a sequence of one or more")
    return inputs


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what torch.onnx tells its own developers: that torchvision is absent, what it deprecates in itself."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        log.setLevel(level)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _cause(error: BaseException) -> str:
    """The first line of the error at the bottom: the ones above it only say which step it happened in."""
    while error.__cause__ is not None:
        error = error.__cause__
    return _first_line(error)
