"""The walk over an ONNX graph: constants folded on the way, our converters first, TVM's for the rest."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import tvm
from tvm import relax
from tvm.relax.frontend.onnx import onnx_frontend

from ...errors import HorqError
from ...specs import LayerConfig
from ...straightline import Array, constant
from ..imported import ImportedModel, result_specs, static_shape, tensor_spec
from . import linear
from . import model as onnx_model
from .converters import CONVERTERS, Node


def import_onnx(
    model: str | Path | onnx.ModelProto, input_shapes: Mapping[str, tuple[int, ...]] | None = None
) -> ImportedModel:
    """An ONNX model as Relax with named layers.

    `input_shapes` gives the shape of inputs whose dimensions are open in the model, by input name.

    Raises UsageError for a missing file, a missing or wrong input shape; HorqError for a file that is not ONNX, an
    opset that we do not read, and operators (all, with node and domain) or forms of them that cannot be compiled.
    """
    proto = onnx_model.read(model)
    opset = onnx_model.standard_opset(proto)
    proto = onnx_model.inline_functions(proto)
    onnx_model.check_operators(proto.graph)
    onnx_model.check_nodes(proto)
    onnx_model.set_input_shapes(proto.graph, input_shapes or {})
    onnx_model.name_nodes(proto.graph)
    onnx_model.pair_quantisations(proto.graph)

    inputs = onnx_model.model_inputs(proto.graph)
    del proto.graph.input[:]  # old files list every initialiser here as well
    proto.graph.input.extend(inputs)
    importer = _GraphImporter(proto)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TVM warns that it renames inputs; `inputs` keeps the model's names
        try:
            mod = importer.from_onnx(proto.graph, opset)
        finally:
            if importer.broken:
                importer.bb._end_block()  # TVM would log to standard error that it was left open
    mod["main"] = mod["main"].without_attr("num_input")
    specs = tuple(tensor_spec(i.name, p) for i, p in zip(inputs, mod["main"].params, strict=True))
    results = result_specs(mod, [o.name for o in proto.graph.output])
    return ImportedModel(mod, specs, results, importer.trained, importer.weight_scales)


class _GraphImporter(onnx_frontend.ONNXGraphImporter):
    """TVM's importer with another walk over the nodes.

    TVM's own loses domains and node names, prints to standard output when a converter fails, and leaves arithmetic on
    constants and shapes in the graph, which then hides weights and reshapes from it.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        super().__init__(shape_dict={}, dtype_dict={}, keep_params_in_input=False, sanitize=True)
        self.trained: dict[str, LayerConfig] = {}
        self.weight_scales: dict[str, Array] = {}
        self.broken = False
        self._grids: dict[str, Grid] = {}
        self._opsets = list(proto.opset_import)
        self._used = {name for node in proto.graph.node for name in node.input}
        self._used.update(output.name for output in proto.graph.output)

    def _parse_graph_initializers(self, graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            self._nodes[tensor.name] = constant(_in_whole_bytes(onnx.numpy_helper.to_array(tensor)))

    def _check_for_unsupported_ops(self, graph: onnx.GraphProto) -> None:
        """Done before, with node names."""

    def _construct_nodes(self, graph: onnx.GraphProto) -> None:
        for node in graph.node:
            try:
                results = self._convert(node)
            except Exception as error:
                self.broken = True
                reason = str(error).strip().splitlines()
                raise HorqError(
                    f"{node.op_type} (node {node.name!r}) cannot be compiled: "
                    f"{reason[-1] if reason else type(error).__name__}"
                ) from error
            for position, name in enumerate(node.output):
                if position < len(results):
                    self._nodes[name] = results[position]
                elif name in self._used:
                    raise HorqError(
                        f"{node.op_type} (node {node.name!r}): found a use of output {position}, {name!r}; "
                        f"accepted are {len(results)} outputs"
                    )
        missing = [output.name for output in graph.output if output.name not in self._nodes]
        if missing:
            raise HorqError(f"output {missing[0]!r}: found no node that computes it")

    def _convert(self, node: onnx.NodeProto) -> list[relax.Expr]:
        unknown = [name for name in node.input if name and name not in self._nodes]
        if unknown:
            raise HorqError(f"found no value {unknown[0]!r} before it; accepted is a graph in topological order")
        inputs = onnx_frontend.onnx_input([self._nodes[name] if name else None for name in node.input])
        folded = self._fold(node, inputs)
        if folded is not None:
            if node.op_type == "DequantizeLinear":
                self._grids[node.output[0]] = Grid.of(node, inputs)
            return folded
        if node.op_type in onnx_model.WEIGHTED and node.input[1] in self._grids:
            scale = self._grids[node.input[1]].filters(node)
            if scale is not None:
                self.weight_scales[node.name] = scale
        domain = "" if node.domain == "ai.onnx" else node.domain
        converter = CONVERTERS.get((domain, node.op_type))
        if converter is not None:
            result = converter(
                Node(node.name, node.op_type, inputs, _attributes(node), self.opset, self.emit, self.trained)
            )
        else:
            attrs = self._parse_attr(a for a in node.attribute if _is_given(a))
            attrs["tvm_custom"] = {"name": node.name, "num_outputs": len(node.output)}
            result = self._convert_operator(node.op_type, inputs, attrs, self.opset)
        return self._emit_results(result)

    def _emit_results(self, result: relax.Expr) -> list[relax.Expr]:
        """Binds what a converter returned to variables. Raises HorqError for a shape that depends on data."""
        if not isinstance(result, relax.Tuple) and isinstance(result.ty, relax.TupleType):
            whole = self.bb.emit(result)
            result = relax.Tuple([relax.TupleGetItem(whole, i) for i in range(len(result.ty.fields))])
        fields = list(result) if isinstance(result, relax.Tuple) else [result]
        results = [self.emit(field) for field in fields]
        for value in results:
            if static_shape(value) is None:
                raise HorqError(f"found a result of type {value.ty}; accepted are tensors of static shape")
        return results

    def emit(self, expr: relax.Expr) -> relax.Expr:
        """`expr` bound to a variable; variables and constants stay themselves."""
        if isinstance(expr, relax.Var | tvm.ir.GenericConst):
            return expr
        if isinstance(expr, relax.ShapeExpr):
            return constant(np.array([int(extent) for extent in expr.values], "int64"))
        return self.bb.emit(expr)

    def _fold(self, node: onnx.NodeProto, inputs: list[relax.Expr | None]) -> list[relax.Expr] | None:
        """The results of a node that is known now: a shape, a constant, anything computed from constants alone."""
        if node.op_type == "Shape" and not node.domain:
            attrs = _attributes(node)
            extents = np.array(static_shape(inputs[0]), "int64")
            return [constant(extents[attrs.get("start", 0) : attrs.get("end", len(extents))])]
        known = [value for value in inputs if value is not None]
        if not known and node.op_type != "Constant":
            return None
        if not all(isinstance(value, tvm.ir.GenericConst) for value in known):
            return None
        if node.domain not in ("", "ai.onnx"):
            return None
        values = [value.value.numpy() for value in known]
        if (
            node.op_type in linear.OPERATORS
            and (found := linear.evaluate(node.op_type, values, _attributes(node))) is not None
        ):
            return [constant(found)]
        return [constant(value) for value in self._evaluate(node, values)]

    def _evaluate(self, node: onnx.NodeProto, values: list[Array]) -> list[Array]:
        """Runs one node by ONNX's reference implementation."""
        names = [name for name in node.input if name]
        feeds = dict(zip(names, values, strict=True))
        declared = [
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for name, v in feeds.items()
        ]
        wanted = [onnx.ValueInfoProto(name=name) for name in node.output if name]
        graph = onnx.helper.make_graph([node], node.name, declared, wanted)
        single = onnx.helper.make_model(graph, opset_imports=self._opsets)
        results = onnx.reference.ReferenceEvaluator(single).run(None, feeds)
        return [_in_whole_bytes(np.asarray(value)) for value in results]


def _in_whole_bytes(array: Array) -> Array:
    """The array; integers of less than 8 bits, which neither NumPy nor TVM has, as those of 8."""
    narrow = re.fullmatch(r"(u?int)[24]", str(array.dtype))
    return array.astype(f"{narrow[1]}8") if narrow else array


@dataclass(frozen=True)
class Grid:
    """The steps that a constant was dequantised by: one for all of it, or one for each index along `axis`."""

    steps: Array
    axis: int
    shape: tuple[int, ...]

    @classmethod
    def of(cls, node: onnx.NodeProto, inputs: list[relax.Expr | None]) -> Grid:
        """Of a DequantizeLinear of constants."""
        values, steps = (operand.value.numpy() for operand in inputs[:2] if operand is not None)
        return cls(steps, _attributes(node).get("axis", 1), values.shape)

    def filters(self, node: onnx.NodeProto) -> Array | None:
        """The step of each filter of the layer that `node` is, None where they differ within a filter."""
        rank = len(self.shape)
        first = node.op_type == "Conv" or (node.op_type == "Gemm" and _attributes(node).get("transB", 0))
        axis = 0 if first else rank - 1
        if self.steps.size == 1:
            return np.full(self.shape[axis], float(self.steps.reshape(())))
        return self.steps.ravel() if self.steps.ndim == 1 and self.axis % rank == axis else None


def _is_given(attribute: onnx.AttributeProto) -> bool:
    """Whether the attribute says anything: TVM refuses an empty list, which is the same as none."""
    value = onnx.helper.get_attribute_value(attribute)
    return not (isinstance(value, list) and not value)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes by name, strings decoded."""
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if _is_given(a)}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}
