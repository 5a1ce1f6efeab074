"""HORQ layers as model-local ONNX functions, so that any ONNX runtime runs a trained model and checks ours.

Domain `horq` version 1; one function an operator, order and scale, told apart by its overload, `sample_2`:

    HorqConv2d(X[N,C,H,W], W[F,C/g,kh,kw] ±1, alpha[F], beta[K] or "", bias[F] or "") → Y[N,F,HO,WO]
    HorqLinear(X[N,...,L], W[F,L] ±1, alpha[F], beta[K] or "", bias[F] or "") → Y[N,...,F]

The bodies are written in operators of ai.onnx that have not changed in meaning since version 17 (`ReduceMean` has), and
follow the arithmetic of `reference`: means in double, rounded once; planes convolved one by one with the ±1 weight, so
that the sums are integers; Σ in plane order, alpha, bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, helper, parser

from .errors import HorqError, UsageError
from .specs import MAX_ORDER, SCALES, Scale

DOMAIN = "horq"
VERSION = 1
OPS = ("HorqConv2d", "HorqLinear")
IR_VERSION = 10
"""The first in which functions have overloads."""
MIN_OPSET = 17

_CONV_ATTRIBUTES = "strides: ints = [1, 1], pads: ints = [0, 0, 0, 0], dilations: ints = [1, 1], group: int = 1"
_WINDOW = "strides: ints = @strides, pads: ints = @pads, dilations: ints = @dilations, group: int = @group"


def overload(order: int, scale: str) -> str:
    """The name that tells the functions of one operator apart. Raises UsageError for an order or scale there is not."""
    if not 1 <= order <= MAX_ORDER:
        raise UsageError(f"order: found {order}; accepted are 1 to {MAX_ORDER}")
    if scale not in SCALES:
        raise UsageError(f"scale: found {scale!r}; accepted are {', '.join(SCALES)}")
    return f"{scale}_{order}"


def function(op: str, order: int, scale: Scale, opset: int = MIN_OPSET) -> FunctionProto:
    """The function of `op` ("HorqConv2d" or "HorqLinear"), importing ai.onnx `opset`, which must be its model's."""
    name = overload(order, scale)
    if op not in OPS:
        raise UsageError(f"op: found {op!r}; accepted are {', '.join(OPS)}")
    if opset < MIN_OPSET:
        raise UsageError(f"opset: found ai.onnx {opset}; accepted are {MIN_OPSET} and later")
    attributes = "order, scale"
    if op == "HorqConv2d":
        attributes += f", {_CONV_ATTRIBUTES}"
        body = _conv_of_rows(order) if scale == "patch" else _conv_of_image(order, scale)
    else:
        body = _linear(order, scale)
    return parser.parse_function(
        f'<opset_import: ["" : {opset}], domain: "{DOMAIN}", overload: "{name}">\n'
        f"{op} <{attributes}> (X, W, alpha, beta, bias) => (Y) {{\n" + "\n".join(body) + "\n}"
    )


def make_node(
    op: str,
    inputs: Sequence[str],
    output: str,
    *,
    order: int,
    scale: Scale,
    name: str = "",
    strides: Sequence[int] = (1, 1),
    pads: Sequence[int] = (0, 0, 0, 0),
    dilations: Sequence[int] = (1, 1),
    group: int = 1,
) -> NodeProto:
    """A call of a HORQ function; `inputs` are X, W, alpha, beta or "", bias or "". The geometry is for HorqConv2d."""
    node = helper.make_node(op, list(inputs), [output], name, domain=DOMAIN, order=order, scale=scale)
    node.overload = overload(order, scale)
    if op == "HorqConv2d":
        geometry = {"strides": strides, "pads": pads, "dilations": dilations, "group": group}
        node.attribute.extend(helper.make_attribute(key, value) for key, value in geometry.items())
    return node


def add_functions(model: ModelProto) -> ModelProto:
    """A copy of `model` with the functions that its HORQ nodes call, the import of `horq` and IR version 10 or later.

    A node without an overload gets its own; functions that are there already are replaced. Raises HorqError for a node
    whose overload, attributes or inputs contradict each other, or a model of an ai.onnx before 17.
    """
    result = ModelProto()
    result.CopyFrom(model)
    wanted: dict[tuple[str, str], tuple[str, int, Scale]] = {}
    for node in _horq_nodes(result):
        order, scale = _complete(node)
        wanted[node.op_type, node.overload] = (node.op_type, order, scale)
    if not wanted:
        return result
    opset = next((entry.version for entry in result.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < MIN_OPSET:
        raise HorqError(
            f"model: found ai.onnx {opset or 'not imported'}; accepted with HORQ nodes are {MIN_OPSET} and later"
        )
    kept = [f for f in result.functions if f.domain != DOMAIN]
    del result.functions[:]
    result.functions.extend(kept)
    result.functions.extend(function(*wanted[key], opset) for key in sorted(wanted))
    if all(entry.domain != DOMAIN for entry in result.opset_import):
        result.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
    result.ir_version = max(result.ir_version, IR_VERSION)
    return result


# --- Bodies -----------------------------------------------------------------------------------------------------------

_SIGNS = [
    "zero = Constant <value_float: float = 0.0> ()",
    "plus = Constant <value_float: float = 1.0> ()",
    "minus = Constant <value_float: float = -1.0> ()",
]


def _conv_of_image(order: int, scale: Scale) -> list[str]:
    """`sample` and `static`: the planes of the image are convolved, with zeros around them."""
    return [
        "axes = Constant <value_ints: ints = [1, 2, 3]> ()",
        *_planes("X", order, scale, lambda plane: f"Conv <{_WINDOW}> ({plane}, W)"),
        *_conv_epilogue(f"T{order}"),
    ]


def _conv_of_rows(order: int) -> list[str]:
    """`patch`: im2col by a convolution with one-hot kernels, then a matrix product in each group.

    The kernels of a group are the identity [L,L] as [L,C/g,kh,kw]; the rows lie as [N,G,L,HO·WO].
    """
    return [
        "rest = Constant <value_ints: ints = [-1]> ()",
        "one = Constant <value_ints: ints = [1]> ()",
        "batch = Shape <start: int = 0, end: int = 1> (X)",
        "channels = Shape <start: int = 1, end: int = 2> (X)",
        "filters = Shape <start: int = 0, end: int = 1> (W)",
        "channels_of_group = Shape <start: int = 1, end: int = 2> (W)",
        "groups = Div (channels, channels_of_group)",
        "kernel = Shape <start: int = 1> (W)",
        "length = ReduceProd (kernel)",
        "square = Concat <axis: int = 0> (length, length)",
        "blank = ConstantOfShape (square)",
        "identity = EyeLike (blank)",
        "tiling = Concat <axis: int = 0> (groups, one)",
        "identities = Tile (identity, tiling)",
        "shape_of_selectors = Concat <axis: int = 0> (rest, kernel)",
        "selectors = Reshape (identities, shape_of_selectors)",
        f"columns = Conv <{_WINDOW}> (X, selectors)",
        "shape_of_rows = Concat <axis: int = 0> (batch, groups, length, rest)",
        "rows = Reshape (columns, shape_of_rows)",
        "shape_of_filters = Concat <axis: int = 0> (one, groups, rest, length)",
        "filters_by_group = Reshape (W, shape_of_filters)",
        "axes = Constant <value_ints: ints = [2]> ()",
        *_planes("rows", order, "patch", lambda plane: f"MatMul (filters_by_group, {plane})"),
        "extents = Shape <start: int = 2> (columns)",
        "shape_of_output = Concat <axis: int = 0> (batch, filters, extents)",
        f"total = Reshape (T{order}, shape_of_output)",
        *_conv_epilogue("total"),
    ]


def _linear(order: int, scale: Scale) -> list[str]:
    """Any number of axes: `patch` takes its means over the last one, `sample` over all but the first."""
    last = ["axes = Constant <value_ints: ints = [-1]> ()"]
    all_but_first = [
        "shape_of_input = Shape (X)",
        # Size would do, but ONNX Runtime infers from it the size of X, and warns of it.
        "extent_of_shape = Shape (shape_of_input)",
        "rank = Squeeze (extent_of_shape)",
        "first = Constant <value_int: int = 1> ()",
        "axes = Range (first, rank, first)",
    ]
    return [
        *(last if scale == "patch" else all_but_first),
        "transposed = Transpose <perm: ints = [1, 0]> (W)",
        *_planes("X", order, scale, lambda plane: f"MatMul ({plane}, transposed)"),
        f"scaled = Mul (T{order}, alpha)",
        # 0·0 + bias, a product that takes an absent bias for zero; see _conv_epilogue.
        "one = Constant <value_ints: ints = [1]> ()",
        "filters = Shape <start: int = 0, end: int = 1> (W)",
        "shape_of_nothing = Concat <axis: int = 0> (one, filters)",
        "nothing = ConstantOfShape (shape_of_nothing)",
        "shape_of_blank = Concat <axis: int = 0> (one, one)",
        "blank = ConstantOfShape (shape_of_blank)",
        "offset_of_row = Gemm (blank, nothing, bias)",
        "offset = Reshape (offset_of_row, filters)",
        "Y = Add (scaled, offset)",
    ]


def _planes(source: str, order: int, scale: Scale, product: Callable[[str], str]) -> Iterator[str]:
    """T<order> = Σ β_i·S_i over the planes of `source`, S_i being `product` of H_i; means are over the tensor `axes`.

    β·H is exact, so R is rounded once, by the subtraction. Round changes no integer, but keeps a runtime from fusing β
    into the product (ONNX Runtime would make one FusedMatMul of MatMul and Mul), and repairs a Winograd convolution.
    """
    yield from _SIGNS
    residual = source
    for i in range(1, order + 1):
        yield from _static_scale(i) if scale == "static" else _mean_scale(i, residual)
        yield f"positive{i} = GreaterOrEqual ({residual}, zero)"
        yield f"H{i} = Where (positive{i}, plus, minus)"
        yield f"inexact{i} = {product(f'H{i}')}"
        yield f"S{i} = Round (inexact{i})"
        term = f"term{i}" if i > 1 else "T1"
        yield f"{term} = Mul (beta{i}, S{i})"
        if i > 1:
            yield f"T{i} = Add (T{i - 1}, {term})"
        if i < order:
            yield f"step{i} = Mul (beta{i}, H{i})"
            yield f"R{i} = Sub ({residual}, step{i})"
            residual = f"R{i}"


def _static_scale(i: int) -> Iterator[str]:
    """beta<i> [1], an element of the input `beta`."""
    yield f"index{i} = Constant <value_ints: ints = [{i - 1}]> ()"
    yield f"beta{i} = Gather (beta, index{i})"


def _mean_scale(i: int, residual: str) -> Iterator[str]:
    """beta<i> = mean|residual| over `axes`, which it keeps; in double, rounded once."""
    yield f"magnitude{i} = Abs ({residual})"
    yield f"double{i} = Cast <to: int = 11> (magnitude{i})"
    yield f"sum{i} = ReduceSum <keepdims: int = 1> (double{i}, axes)"
    if i == 1:
        yield "values = Size (double1)"
        yield "means = Size (sum1)"
        yield "values_double = Cast <to: int = 11> (values)"
        yield "means_double = Cast <to: int = 11> (means)"
        yield "count = Div (values_double, means_double)"
    yield f"mean{i} = Div (sum{i}, count)"
    yield f"beta{i} = Cast <to: int = 1> (mean{i})"


def _conv_epilogue(total: str) -> list[str]:
    """Y = total·alpha + bias along axis 1.

    A body cannot ask whether its bias is there, but Conv can: the offset is 0·0 + bias, or 0 where `bias` is empty.
    """
    return [
        "along_channels = Constant <value_ints: ints = [1, -1, 1, 1]> ()",
        "factor = Reshape (alpha, along_channels)",
        f"scaled = Mul ({total}, factor)",
        "point = Constant <value_ints: ints = [1, 1, 1]> ()",
        "outputs = Shape <start: int = 0, end: int = 1> (W)",
        "shape_of_nothing = Concat <axis: int = 0> (outputs, point)",
        "nothing = ConstantOfShape (shape_of_nothing)",
        "dot = Constant <value_ints: ints = [1, 1, 1, 1]> ()",
        "blank_dot = ConstantOfShape (dot)",
        "offset = Conv (blank_dot, nothing, bias)",
        "Y = Add (scaled, offset)",
    ]


# --- Nodes ------------------------------------------------------------------------------------------------------------


def _horq_nodes(model: ModelProto) -> Iterator[NodeProto]:
    """The HORQ nodes of the graph, of its subgraphs and of the model's other functions."""
    scopes: list[GraphProto | FunctionProto] = [model.graph, *(f for f in model.functions if f.domain != DOMAIN)]
    while scopes:
        for node in scopes.pop().node:
            if node.domain == DOMAIN:
                yield node
            for attribute in node.attribute:
                scopes.extend([attribute.g] if attribute.HasField("g") else attribute.graphs)


def _complete(node: NodeProto) -> tuple[int, Scale]:
    """Order and scale of a HORQ node, whose overload is filled in where it is empty."""
    where = f"node {node.name or node.output[0]!r}"
    if node.op_type not in OPS:
        raise HorqError(f"{where}: found operator {DOMAIN}.{node.op_type}; accepted are {', '.join(OPS)}")
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    missing = [name for name in ("order", "scale") if name not in attributes]
    if missing:
        raise HorqError(f"{where}: found no attribute {missing[0]!r}; accepted are order and scale, both given")
    order, scale = attributes["order"], attributes["scale"].decode()
    try:
        name = overload(order, scale)
    except UsageError as error:
        raise HorqError(f"{where}: {error}") from None
    if node.overload not in ("", name):
        raise HorqError(f"{where}: found overload {node.overload!r}; accepted with its attributes is {name!r}")
    given = len(node.input) > 3 and bool(node.input[3])
    if given != (scale == "static"):
        found = "beta given" if given else "no beta"
        raise HorqError(f"{where}: found {found} with scale {scale!r}; accepted is a beta with 'static' and no other")
    node.overload = name
    return order, scale
