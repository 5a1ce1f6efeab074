"""The ONNX functions, run by ONNX Runtime, against the oracle; and what add_functions makes of a model."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from horq_tvm import onnx_functions, reference
from horq_tvm.errors import HorqError, UsageError
from horq_tvm.specs import MAX_ORDER, SCALES

F32 = np.float32


def _model(nodes, arrays, rank=4, opset=17, name="y"):
    """A model of input x and output `name`, both of free shape, with `arrays` as initialisers."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None] * rank)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank)],
        [numpy_helper.from_array(np.asarray(array, F32), key) for key, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("horq", 1)]
    return onnx_functions.add_functions(helper.make_model(graph, opset_imports=opsets, ir_version=8))


def _run(model, x):
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def _layer(rng, shape, scale, order, *, bias=True):
    """Weight, alpha, beta or None, bias or None of a layer."""
    weight, alpha = reference.binarize_weights(rng.standard_normal(shape))
    beta = (0.9 * 0.5 ** np.arange(order)).astype(F32) if scale == "static" else None
    return weight, alpha, beta, rng.standard_normal(shape[0]).astype(F32) if bias else None


def _inputs(layer):
    """The arrays of a layer by name, and the inputs of its node."""
    arrays = dict(zip(("w", "alpha", "beta", "bias"), layer, strict=True))
    present = {key: array for key, array in arrays.items() if array is not None}
    return present, ["x", *(key if key in present else "" for key in arrays)]


def _agree(y, expected):
    """Equal within the tolerance but for outputs whose window holds a doubtful sign, and those few."""
    assert y.shape == expected.output.shape
    clear = ~expected.doubtful
    assert (np.abs(y.astype(np.float64) - expected.output) <= expected.tolerance)[clear].all()
    assert clear.any()


def _convolve(rng, x, channels, filters, kernel, order, scale, geometry, *, bias=True, opset=17):
    layer = _layer(rng, (filters, channels // geometry["groups"], *kernel), scale, order, bias=bias)
    arrays, inputs = _inputs(layer)
    node = onnx_functions.make_node(
        "HorqConv2d",
        inputs,
        "y",
        order=order,
        scale=scale,
        strides=geometry["strides"],
        pads=geometry["padding"],
        dilations=geometry["dilation"],
        group=geometry["groups"],
    )
    y = _run(_model([node], arrays, opset=opset), x)
    _agree(y, reference.conv2d(x, *layer, order=order, scale=scale, **geometry))


PLAIN = {"strides": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1), "groups": 1}


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_drawn_convolutions_equal_the_oracle(data):
    draw = data.draw
    groups = draw(st.integers(1, 3))
    geometry = {
        "strides": draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        "padding": draw(st.tuples(*[st.integers(0, 3)] * 4)),
        "dilation": draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        "groups": groups,
    }
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    channels, filters = groups * draw(st.integers(1, 40)), groups * draw(st.integers(1, 20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = rng.standard_normal((draw(st.integers(1, 3)), channels, 9, 8)).astype(F32)
    if draw(st.booleans()):
        x = np.maximum(x, 0)
    order, scale = draw(st.integers(1, 4)), draw(st.sampled_from(SCALES))
    _convolve(rng, x, channels, filters, kernel, order, scale, geometry, bias=draw(st.booleans()))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("lead", [(3,), (2, 5), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_dense_layers_of_any_rank_equal_the_oracle(scale, lead, bias):
    rng = np.random.default_rng(len(lead))
    x = rng.standard_normal((*lead, 33)).astype(F32)
    for order in range(1, 5):
        layer = _layer(rng, (10, 33), scale, order, bias=bias)
        arrays, inputs = _inputs(layer)
        node = onnx_functions.make_node("HorqLinear", inputs, "y", order=order, scale=scale)
        y = _run(_model([node], arrays, rank=len(lead) + 1), x)
        _agree(y, reference.dense(x, *layer, order=order, scale=scale))


@pytest.mark.parametrize("scale", SCALES)
def test_a_vector_is_one_image(scale):
    rng = np.random.default_rng(4)
    x = rng.standard_normal(12).astype(F32)
    layer = _layer(rng, (5, 12), scale, 2)
    arrays, inputs = _inputs(layer)
    node = onnx_functions.make_node("HorqLinear", inputs, "y", order=2, scale=scale)
    _agree(_run(_model([node], arrays, rank=1), x), reference.dense(x, *layer, order=2, scale=scale))


@pytest.mark.parametrize("scale", SCALES)
def test_the_output_is_the_oracle_s_bit_for_bit_where_no_sign_is_doubtful(scale):
    """The body follows the same order of the same roundings; the tolerance is for engines that do not."""
    rng = np.random.default_rng(8)
    x = rng.standard_normal((2, 32, 7, 7)).astype(F32)
    layer = _layer(rng, (16, 32, 3, 3), scale, 3)
    arrays, inputs = _inputs(layer)
    node = onnx_functions.make_node("HorqConv2d", inputs, "y", order=3, scale=scale, pads=(1, 1, 1, 1))
    expected = reference.conv2d(x, *layer, order=3, scale=scale, padding=(1, 1, 1, 1))
    y = _run(_model([node], arrays), x)
    assert (y == expected.output)[~expected.doubtful].mean() > 0.999


@pytest.mark.parametrize("scale", SCALES)
def test_a_sum_of_zero_is_exactly_the_bias(scale):
    """It would not be if β or α were folded into the weights: 0.7 added and taken away is not always 0."""
    rng = np.random.default_rng(9)
    x = rng.standard_normal((1, 64, 6, 6)).astype(F32)
    weight = reference.sign(rng.standard_normal((32, 64, 3, 3)))
    layer = (weight, np.full(32, 0.3, F32), np.array([0.7], F32) if scale == "static" else None, np.full(32, 0.1, F32))
    arrays, inputs = _inputs(layer)
    node = onnx_functions.make_node("HorqConv2d", inputs, "y", order=1, scale=scale)
    nothing = reference.conv2d(x, *layer, order=1, scale=scale).sums[0] == 0
    assert nothing.sum() > 10
    np.testing.assert_array_equal(_run(_model([node], arrays), x)[nothing], F32(0.1))


@pytest.mark.parametrize("op", onnx_functions.OPS)
@pytest.mark.parametrize("scale", SCALES)
def test_nothing_stands_between_a_product_of_planes_and_its_rounding(op, scale):
    """What keeps a runtime from fusing scales into it."""
    nodes = onnx_functions.function(op, 3, scale).node
    planes = {node.output[0] for node in nodes if node.op_type == "Where"}
    products = {node.output[0] for node in nodes if node.op_type in ("Conv", "MatMul") and planes & set(node.input)}
    readers = [node.op_type for node in nodes if products & set(node.input)]
    assert len(products) == 3
    assert readers == ["Round"] * 3


@pytest.mark.parametrize("scale", ["patch", "sample"])
def test_zeros_of_either_sign_give_the_bias(scale):
    rng = np.random.default_rng(10)
    layer = _layer(rng, (4, 3, 3, 3), scale, 2)
    arrays, inputs = _inputs(layer)
    node = onnx_functions.make_node("HorqConv2d", inputs, "y", order=2, scale=scale, pads=(1, 1, 1, 1))
    for zero in (0.0, -0.0):
        y = _run(_model([node], arrays), np.full((1, 3, 4, 4), zero, F32))
        np.testing.assert_array_equal(y, np.broadcast_to(layer[3][:, None, None], y.shape))


@pytest.mark.parametrize("scale", SCALES)
def test_negative_zero_is_positive(scale):
    x = np.array([[[[-0.0, 1.0], [-1.0, -0.0]]]], F32)
    layer = (np.ones((1, 1, 1, 1)), np.ones(1), np.ones(1) if scale == "static" else None, None)
    arrays, inputs = _inputs(layer)
    node = onnx_functions.make_node("HorqConv2d", inputs, "y", order=1, scale=scale)
    y = _run(_model([node], arrays), x)
    np.testing.assert_array_equal(y, reference.conv2d(x, *layer, order=1, scale=scale).output)
    assert (y[0, 0, 0, 0] >= 0) & (y[0, 0, 1, 0] < 0)


@pytest.mark.parametrize("op", onnx_functions.OPS)
@pytest.mark.parametrize("scale", SCALES)
def test_every_function_is_valid_onnx(op, scale):
    for order in range(1, MAX_ORDER + 1):
        function = onnx_functions.function(op, order, scale)
        assert (function.domain, function.name, function.overload) == ("horq", op, f"{scale}_{order}")
        assert list(function.input) == ["X", "W", "alpha", "beta", "bias"]
        assert list(function.output) == ["Y"]
        assert {"order", "scale"} <= set(function.attribute)
        context = onnx.checker.C.CheckerContext()
        context.ir_version = onnx_functions.IR_VERSION
        context.opset_imports = {"": 17, "horq": 1}
        onnx.checker.check_function(function, context, onnx.checker.LEXICAL_SCOPE_CONTEXT)
        produced = [name for node in function.node for name in node.output]
        assert len(produced) == len(set(produced))


@pytest.mark.parametrize("opset", [17, 18, 21, 23])
@pytest.mark.parametrize("scale", SCALES)
def test_a_function_imports_its_model_s_opset(scale, opset):
    rng = np.random.default_rng(opset)
    x = rng.standard_normal((1, 6, 5, 5)).astype(F32)
    _convolve(rng, x, 6, 4, (3, 3), 2, scale, {**PLAIN, "groups": 2}, opset=opset)


def _node(**changes):
    values = {"order": 2, "scale": "sample"} | changes
    return onnx_functions.make_node("HorqConv2d", ["x", "w", "alpha", "", ""], "y", name="layer1.conv", **values)


ARRAYS = {"w": np.ones((2, 3, 1, 1)), "alpha": np.ones(2)}


def test_omitted_attributes_and_inputs_mean_conv_s_defaults():
    x = np.random.default_rng(0).standard_normal((1, 3, 4, 4)).astype(F32)
    node = helper.make_node("HorqConv2d", ["x", "w", "alpha"], ["y"], domain="horq", order=2, scale="sample")
    y = _run(_model([node], ARRAYS), x)
    _agree(y, reference.conv2d(x, ARRAYS["w"], ARRAYS["alpha"], order=2, scale="sample"))


def test_add_functions_adds_each_once_and_leaves_the_given_model_alone():
    first, second, third = _node(), _node(), _node(order=3)
    first.output[0], second.input[0], second.output[0], third.input[0] = "a", "a", "b", "b"
    arrays = {"w": np.ones((3, 3, 1, 1)), "alpha": np.ones(3)}
    model = _model([first, second, third], arrays)
    assert [f.overload for f in model.functions] == ["sample_2", "sample_3"]
    assert model.ir_version == 10
    assert [entry.version for entry in model.opset_import if entry.domain == "horq"] == [1]
    before = model.SerializeToString()
    again = onnx_functions.add_functions(model)
    assert again.SerializeToString() == before == model.SerializeToString()


def test_add_functions_fills_in_overload_import_and_ir_version():
    node = _node()
    node.overload = ""
    graph = _model([node], ARRAYS).graph
    graph.node[0].overload = ""
    bare = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model = onnx_functions.add_functions(bare)
    assert model.graph.node[0].overload == "sample_2"
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 17), ("horq", 1)}
    assert (model.ir_version, bare.ir_version) == (10, 8)
    assert not bare.graph.node[0].overload
    _run(model, np.ones((1, 3, 2, 2), F32))


def test_add_functions_finds_nodes_in_subgraphs():
    def branch(order):
        node = _node(order=order)
        node.output[0] = f"y{order}"
        output = helper.make_tensor_value_info(f"y{order}", TensorProto.FLOAT, [None] * 4)
        return helper.make_graph([node], f"branch{order}", [], [output])

    condition = helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True)))
    choice = helper.make_node("If", ["yes"], ["y"], then_branch=branch(1), else_branch=branch(2))
    model = _model([condition, choice], ARRAYS)
    assert [f.overload for f in model.functions] == ["sample_1", "sample_2"]
    x = np.random.default_rng(0).standard_normal((1, 3, 2, 2)).astype(F32)
    _agree(_run(model, x), reference.conv2d(x, ARRAYS["w"], ARRAYS["alpha"], order=1, scale="sample"))


def test_a_model_without_horq_nodes_stays_as_it_is():
    node = helper.make_node("Relu", ["x"], ["y"])
    graph = helper.make_graph([node], "g", [], [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    assert onnx_functions.add_functions(model).SerializeToString() == model.SerializeToString()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda n: setattr(n, "op_type", "HorqConv3d"), "found operator horq.HorqConv3d; accepted are HorqConv2d"),
        (lambda n: setattr(n, "overload", "sample_3"), "found overload 'sample_3'; accepted .* 'sample_2'"),
        (lambda n: n.attribute.pop(0), "found no attribute 'order'"),
        (lambda n: setattr(n.attribute[0], "i", 9), "order: found 9; accepted are 1 to 8"),
        (lambda n: setattr(n.attribute[1], "s", b"layer"), "scale: found 'layer'"),
        (lambda n: n.input.__setitem__(3, "alpha"), "found beta given with scale 'sample'"),
    ],
)
def test_a_node_that_contradicts_itself_is_named(change, says):
    node = _node()
    change(node)
    with pytest.raises(HorqError, match=f"node 'layer1.conv': .*{says}"):
        _model([node], ARRAYS)


def test_static_needs_its_beta():
    with pytest.raises(HorqError, match="node 'layer1.conv': found no beta with scale 'static'"):
        _model([_node(scale="static")], ARRAYS)


def test_an_old_opset_is_refused():
    with pytest.raises(HorqError, match="model: found ai.onnx 13; accepted with HORQ nodes are 17 and later"):
        _model([_node()], ARRAYS, opset=13)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("HorqConv1d", 1, "sample"), "op: found 'HorqConv1d'"),
        (("HorqConv2d", 0, "sample"), "order: found 0"),
        (("HorqConv2d", 1, "mean"), "scale: found 'mean'"),
        (("HorqConv2d", 1, "sample", 16), "opset: found ai.onnx 16"),
    ],
)
def test_a_function_that_there_is_not_is_refused(arguments, says):
    with pytest.raises(UsageError, match=says):
        onnx_functions.function(*arguments)
