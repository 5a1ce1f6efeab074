"""The ONNX importer against ONNX Runtime, operator form by operator form, and its errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from horq_tvm.errors import HorqError, UsageError
from horq_tvm.frontend.onnx import import_onnx
from horq_tvm.straightline import op_name, read_main

RNG = np.random.default_rng(7)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype("float32")


def node(op: str, *operands: str, out: str = "y", **attrs: Any) -> onnx.NodeProto:
    return helper.make_node(
        op, list(operands), [out], name=attrs.pop("name", ""), domain=attrs.pop("domain", ""), **attrs
    )


def make(
    nodes: list[onnx.NodeProto],
    x: tuple[int | str, ...],
    constants: dict[str, np.ndarray] | None = None,
    opset: int = 17,
    outputs: tuple[str, ...] = ("y",),
    listed: bool = False,
) -> onnx.ModelProto:
    """A model of one input `x`; `listed` names the initialisers among the graph's inputs, as old exporters do."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)]
    initialisers = [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()]
    if listed:
        inputs += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in initialisers]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "g", inputs, results, initialisers)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("horq", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10 if opset >= 15 else 6)


def peer(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})


def chain(*specs: tuple[Any, ...]) -> list[onnx.NodeProto]:
    """Nodes in a row from x to y; each spec is (op, more operands..., attributes)."""
    nodes, last = [], "x"
    for position, (op, *rest) in enumerate(specs):
        attrs = rest.pop() if rest and isinstance(rest[-1], dict) else {}
        out = "y" if position == len(specs) - 1 else f"t{position}"
        nodes.append(node(op, last, *rest, out=out, **attrs))
        last = out
    return nodes


X = (2, 4, 9, 8)
W3 = normal(6, 4, 3, 3)
CASES: dict[str, onnx.ModelProto] = {
    "conv asymmetric pads": make(
        chain(("Conv", "w", "b", {"pads": [0, 1, 2, 1], "strides": [2, 1]})), X, {"w": W3, "b": normal(6)}
    ),
    "conv same upper": make(chain(("Conv", "w", {"auto_pad": "SAME_UPPER", "strides": [2, 2]})), X, {"w": W3}),
    "conv same lower": make(chain(("Conv", "w", {"auto_pad": "SAME_LOWER", "strides": [2, 3]})), X, {"w": W3}),
    "conv valid, dilated": make(chain(("Conv", "w", {"auto_pad": "VALID", "dilations": [2, 3]})), X, {"w": W3}),
    "conv groups": make(chain(("Conv", "w", {"group": 2})), X, {"w": normal(6, 2, 3, 2)}),
    "conv depthwise": make(chain(("Conv", "w", {"group": 4, "pads": [1] * 4})), X, {"w": normal(8, 1, 3, 3)}),
    "conv 1d": make(
        chain(("Conv", "w", "b", {"pads": [2, 0], "strides": [2], "dilations": [2]}), ("Relu",)),
        (2, 4, 11),
        {"w": normal(5, 4, 3), "b": normal(5)},
    ),
    "initialisers listed as inputs, opset 7": make(
        chain(("Conv", "w", "b"), ("Relu",), ("Dropout",)), X, {"w": W3, "b": normal(6)}, opset=7, listed=True
    ),
    "bn after and before conv": make(
        chain(
            ("BatchNormalization", "g", "h", "m", "v", {"epsilon": 1e-3}),
            ("Conv", "w"),
            ("BatchNormalization", "g6", "h6", "m6", "v6"),
        ),
        X,
        {k: normal(4) for k in "ghm"}
        | {"v": np.abs(normal(4)), "w": W3, "v6": np.abs(normal(6))}
        | {k: normal(6) for k in ("g6", "h6", "m6")},
    ),
    "bn of a matrix": make(
        chain(("Flatten",), ("BatchNormalization", "g", "h", "m", "v")),
        (3, 2, 2),
        {k: normal(4) for k in "ghm"} | {"v": np.abs(normal(4))},
    ),
    "gemm": make(
        chain(("Flatten",), ("Gemm", "w", "b", {"transB": 1, "alpha": 0.5, "beta": 2.0})),
        (2, 3, 4),
        {"w": normal(5, 12), "b": normal(5)},
    ),
    "gemm, untransposed, no addend": make(chain(("Gemm", "w")), (3, 4), {"w": normal(4, 5)}),
    "gemm, transposed x": make(chain(("Gemm", "w", {"transA": 1})), (4, 3), {"w": normal(4, 5)}),
    "matmul 3d": make(chain(("MatMul", "w"), ("Add", "b")), (2, 3, 4), {"w": normal(4, 5), "b": normal(5)}),
    "matmul of a vector": make(chain(("MatMul", "w"), ("Add", "b")), (4,), {"w": normal(4, 5), "b": normal(5)}),
    "matmul of activations": make([node("Transpose", "x", out="t", perm=[1, 0]), node("MatMul", "x", "t")], (3, 4)),
    "average pool counts padding": make(
        chain(("AveragePool", {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1], "count_include_pad": 1})), X
    ),
    "average pool, ceil": make(
        chain(("AveragePool", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 0, 0, 0], "ceil_mode": 1})),
        X,
        opset=19,
    ),
    "average pool, ceil, counts padding": make(
        chain(
            (
                "AveragePool",
                {
                    "kernel_shape": [3, 3],
                    "strides": [2, 3],
                    "pads": [1, 1, 1, 1],
                    "ceil_mode": 1,
                    "count_include_pad": 1,
                },
            )
        ),
        X,
        opset=19,
    ),
    "average pool same upper": make(
        chain(("AveragePool", {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"})), X
    ),
    "max pool": make(chain(("MaxPool", {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 0, 1]})), X),
    "max pool, ceil": make(chain(("MaxPool", {"kernel_shape": [2, 3], "strides": [2, 2], "ceil_mode": 1})), X),
    "max pool, dilated": make(chain(("MaxPool", {"kernel_shape": [2, 2], "dilations": [3, 2]})), X),
    "max pool same lower": make(
        chain(("MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_LOWER"})), X
    ),
    "pool 1d": make(
        chain(("MaxPool", {"kernel_shape": [3], "strides": [2]}), ("AveragePool", {"kernel_shape": [2]})), (2, 3, 12)
    ),
    "global pools": make(
        [
            node("GlobalAveragePool", "x", out="a"),
            node("GlobalMaxPool", "x", out="m"),
            node("Concat", "a", "m", out="c", axis=1),
            node("Flatten", "c"),
        ],
        X,
    ),
    "clip by attribute": make(
        chain(
            ("Clip", {"min": -0.5, "max": 1.0}),
        ),
        X,
        opset=9,
    ),
    "clip by input": make(
        chain(("Clip", "lo", "hi"), ("Clip", "", "top")),
        X,
        {"lo": np.float32(0), "hi": np.float32(6), "top": np.float32(0.5)},
    ),
    "pointwise": make(
        chain(
            ("Relu",),
            ("Sub", "c"),
            ("LeakyRelu", {"alpha": 0.2}),
            ("Mul", "v"),
            ("Div", "s"),
            ("PRelu", "v"),
            ("Sigmoid",),
            ("Sub", "h"),
            ("HardSwish",),
            ("Sign",),
        ),
        X,
        {"c": normal(4, 1, 1), "v": normal(1, 4, 1, 1), "s": np.float32(3.0), "h": np.float32(0.5)},
    ),
    "prelu of one slope": make(chain(("PRelu", "s")), X, {"s": np.float32([0.3])}),
    "prelu of every element": make(chain(("PRelu", "s")), X, {"s": normal(4, 9, 1)}),
    "hard sigmoid": make(
        chain(
            ("HardSigmoid", {"alpha": 0.4, "beta": 0.3}),
        ),
        X,
    ),
    "sum, mean, max": make(
        [
            node("Sum", "x", "c", "x", out="s"),
            node("Mean", "s", "x", out="m"),
            node("Max", "m", "c", out="u"),
            node("Min", "u", "x"),
        ],
        X,
        {"c": normal(1, 4, 1, 1)},
    ),
    "pad, opset 10": make(chain(("Pad", {"pads": [0, 0, 1, 2, 0, 0, 0, 1], "value": 0.5})), X, opset=10),
    "pad by inputs": make(
        chain(("Pad", "p", "v"), ("Pad", "q", {"mode": "reflect"})),
        X,
        {"p": np.array([0, 0, 1, 0, 0, 0, 0, 2]), "v": np.float32(-1), "q": np.array([0, 0, 1, 1, 0, 0, 2, 1])},
    ),
    "pad by amounts that PyTorch's exporter computes": make(
        [
            node("ConstantOfShape", "two", out="zeros", value=numpy_helper.from_array(np.array([0]))),
            node("Concat", "widths", "zeros", out="all", axis=0),
            node("Reshape", "all", "pairs", out="rows"),
            node("Slice", "rows", "minus", "least", "zero", "minus", out="reversed"),
            node("Transpose", "reversed", out="columns", perm=[1, 0]),
            node("Reshape", "columns", "minus", out="pads"),
            node("Pad", "x", "pads"),
        ],
        X,
        {
            "two": np.array([2]),
            "widths": np.array([0, 0, 3, 1, 2, 0]),
            "pairs": np.array([-1, 2]),
            "minus": np.array([-1]),
            "least": np.array([-(2**63) + 1]),
            "zero": np.array([0]),
        },
    ),
    "transpose, squeeze, unsqueeze": make(
        chain(("Transpose", {"perm": [0, 2, 3, 1]}), ("Unsqueeze", "a"), ("Squeeze", "a"), ("Identity",)),
        X,
        {"a": np.array([1])},
    ),
    "squeeze by attribute": make(chain(("ReduceMean", {"axes": [2, 3]}), ("Squeeze", {"axes": [2, 3]})), X, opset=11),
    "reduce mean by input": make(chain(("ReduceMean", "a", {"keepdims": 0})), X, {"a": np.array([-1, 2])}, opset=18),
    "softmax, opset 9": make(chain(("Softmax",)), (2, 3, 4), opset=9),
    "softmax, opset 13": make(
        chain(
            ("Softmax", {"axis": 1}),
        ),
        X,
    ),
    "split": make([helper.make_node("Split", ["x"], ["a", "b"], axis=1), node("Mul", "a", "b")], X, opset=12),
    "slice": make(
        chain(("Slice", "a", "b", "c")), X, {"a": np.array([1, 0]), "b": np.array([9, 4]), "c": np.array([2, 3])}
    ),
    "resize by scales": make(chain(("Resize", "", "s")), X, {"s": np.float32([1, 1, 2, 2])}),
    "resize by sizes": make(
        chain(("Resize", "", "", "z", {"mode": "linear", "coordinate_transformation_mode": "align_corners"})),
        X,
        {"z": np.array([2, 4, 5, 12])},
    ),
    "upsample, opset 9": make(
        chain(("Upsample", "s", {"mode": "nearest"})), X, {"s": np.float32([1, 1, 2, 3])}, opset=9
    ),
    "weights computed from constants": make(
        [
            helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(np.float32(2.0))),
            node("Mul", "w", "k", out="w2"),
            node("Conv", "x", "w2"),
        ],
        X,
        {"w": W3},
    ),
    "view of a size taken from the shape": make(
        [
            node("Shape", "x", out="s"),
            node("Gather", "s", "zero", out="n", axis=0),
            node("Unsqueeze", "n", "axis", out="n1"),
            node("Concat", "n1", "rest", out="t", axis=0),
            node("Reshape", "x", "t"),
        ],
        X,
        {"zero": np.array(0), "axis": np.array([0]), "rest": np.array([-1])},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_same_as_onnxruntime(case: str, execute: Any) -> None:
    model = CASES[case]
    shape = tuple(d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim)
    x = normal(*shape)
    imported = import_onnx(model)
    assert [(s.name, s.shape, s.dtype) for s in imported.inputs] == [("x", shape, "float32")]
    (found,) = execute(imported, [x])
    (wanted,) = peer(model, x)
    assert imported.outputs[0].shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_layers_keep_their_names(layer_names: Any) -> None:
    nodes = [
        node("Conv", "x", "w", out="a", name="stem"),
        node("Conv", "a", "v", out="/b/out"),
        node("Conv", "/b/out", "v", out="c", name="stem"),
        node("Flatten", "c", out="f"),
        node("Gemm", "f", "u", name="head"),
    ]
    constants = {"w": W3, "v": normal(6, 6, 1, 1), "u": normal(6 * 7 * 6, 3)}
    imported = import_onnx(make(nodes, X, constants))
    assert layer_names(imported) == ["stem", "/b/out", "stem_1", "head"]
    assert imported.trained == {}


def test_outputs_in_order_under_their_names(execute: Any) -> None:
    model = make([node("Relu", "x", out="r"), node("Neg", "r", out="n")], (2, 3), outputs=("n", "r"))
    imported = import_onnx(model)
    assert [s.name for s in imported.outputs] == ["n", "r"]
    x = normal(2, 3)
    for found, wanted in zip(execute(imported, [x]), peer(model, x), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_input_names_that_are_no_identifiers() -> None:
    model = make([node("Relu", "x")], (2, 3))
    model.graph.input[0].name = "data.0:1"
    model.graph.node[0].input[0] = "data.0:1"
    assert import_onnx(model).inputs[0].name == "data.0:1"


def test_the_given_model_is_not_changed() -> None:
    model = make([node("Relu", "x")], ("n", 3))
    before = model.SerializeToString()
    import_onnx(model, {"x": (2, 3)})
    assert model.SerializeToString() == before


def _horq_model(scale: str, beta: np.ndarray | None, order: int = 2) -> onnx.ModelProto:
    signs = np.where(normal(6, 4, 3, 3) >= 0, 1, -1).astype("float32")
    linear = np.where(normal(5, 6) >= 0, 1, -1).astype("float32")
    constants = {"w": signs, "a": np.abs(normal(6)), "u": linear, "au": np.abs(normal(5)), "bu": normal(5)}
    if beta is not None:
        constants["beta"] = beta
    b = "beta" if beta is not None else ""
    nodes = [
        node(
            "HorqConv2d",
            "x",
            "w",
            "a",
            b,
            "",
            out="c",
            name="c1",
            domain="horq",
            order=order,
            scale=scale,
            pads=[1] * 4,
        ),
        node("GlobalAveragePool", "c", out="p"),
        node("Flatten", "p", out="f"),
        node("HorqLinear", "f", "u", "au", "", "bu", name="fc", domain="horq", order=1, scale="sample"),
    ]
    return make(nodes, X, constants)


def test_horq_nodes_speak_for_their_layers(execute: Any, layer_names: Any) -> None:
    model = _horq_model("static", np.float32([0.75, 0.25]))
    imported = import_onnx(model)
    assert layer_names(imported) == ["c1", "fc"]
    assert (imported.trained["c1"].order, imported.trained["c1"].scale) == (2, "static")
    assert imported.trained["c1"].betas == (0.75, 0.25)
    assert (imported.trained["fc"].order, imported.trained["fc"].scale, imported.trained["fc"].betas) == (
        1,
        "sample",
        None,
    )

    # The float form of the same layers: alpha per filter, the ±1 weight as it is.
    plain = make(
        [
            node("Conv", "x", "w", out="c", pads=[1] * 4),
            node("Mul", "c", "a4", out="s"),
            node("GlobalAveragePool", "s", out="p"),
            node("Flatten", "p", out="f"),
            node("Gemm", "f", "u", out="g", transB=1),
            node("Mul", "g", "au", out="h"),
            node("Add", "h", "bu"),
        ],
        X,
        {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.name not in ("a", "beta")}
        | {"a4": numpy_helper.to_array(model.graph.initializer[1]).reshape(1, 6, 1, 1)},
    )
    x = normal(*X)
    np.testing.assert_allclose(execute(imported, [x])[0], peer(plain, x)[0], rtol=1e-5, atol=1e-5)


def test_alpha_and_bias_of_a_node_are_the_layers_own() -> None:
    model = make(
        chain(("HorqLinear", "w", "a", "", "b", {"domain": "horq", "order": 1, "scale": "sample"}), ("Gemm", "u", "c")),
        (3, 4),
        {"w": np.ones((5, 4), "float32"), "a": normal(5), "b": normal(5), "u": normal(5, 6), "c": normal(6)},
    )
    bindings = read_main(import_onnx(model).mod).bindings
    assert [int(value.attrs["affines"]) for _, value in bindings if op_name(value) == "horq.name"] == [2, 1]


@pytest.mark.parametrize(
    ("scale", "beta", "order", "words"),
    [
        ("static", None, 2, ["none constant betas", "accepted are 2"]),
        ("static", np.float32([1.0]), 2, ["1 constant betas"]),
        ("layer", None, 2, ["'layer'", "patch, sample, static"]),
        ("sample", None, 9, ["order 9", "1 to 8"]),
    ],
)
def test_a_horq_node_that_breaks_the_contract(scale: str, beta: Any, order: int, words: list[str]) -> None:
    with pytest.raises(HorqError) as caught:
        import_onnx(_horq_model(scale, beta, order))
    assert all(word in str(caught.value) for word in [*words, "'c1'"])


def test_horq_weights_must_be_signs() -> None:
    model = _horq_model("sample", None)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(W3, "w"))
    with pytest.raises(HorqError, match="not constant ±1"):
        import_onnx(model)


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_a_file_of_weights_is_told_from_a_broken_model(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(b"PK")
    with pytest.raises(UsageError, match=rf"found a PyTorch file of the kind \{suffix}.*accepted: an \.onnx"):
        import_onnx(path)


def test_functions_of_other_domains_are_inlined(execute: Any) -> None:
    body = [helper.make_node("Neg", ["a"], ["t"]), helper.make_node("Relu", ["t"], ["b"])]
    function = helper.make_function("mine", "NegRelu", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    model = make([node("NegRelu", "x", domain="mine")], (2, 3))
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("mine", 1))
    x = normal(2, 3)
    np.testing.assert_array_equal(execute(import_onnx(model), [x])[0], np.maximum(-x, 0))


def test_every_unsupported_operator_is_named() -> None:
    nodes = [
        node("Foo", "x", out="a", name="first", domain="com.acme"),
        node("Relu", "a", out="b"),
        node("Foo", "b", out="c", domain="com.acme"),
        node("STFT", "c", name="last"),
    ]
    with pytest.raises(HorqError) as caught:
        import_onnx(make(nodes, X))
    for words in ("Foo (domain com.acme, node 'first' and 1 more)", "STFT (domain ai.onnx, node 'last')"):
        assert words in str(caught.value)
    assert "Relu" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_form_that_cannot_be_compiled_names_its_node(capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [node("Conv", "x", "w", name="volume")]
    with pytest.raises(HorqError, match=r"Conv \(node 'volume'\).*accepted are 1-D and 2-D") as caught:
        import_onnx(make(nodes, (1, 2, 4, 4, 4), {"w": normal(3, 2, 2, 2, 2)}))
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_a_second_output_that_is_used_is_an_error() -> None:
    pool = helper.make_node("MaxPool", ["x"], ["y", "where"], name="pool", kernel_shape=[2, 2])
    with pytest.raises(HorqError, match=r"MaxPool \(node 'pool'\): found a use of output 1, 'where'"):
        import_onnx(make([pool, node("Cast", "where", out="z", to=1)], X, outputs=("y", "z")))


def test_open_dimensions_need_a_shape() -> None:
    model = make([node("Relu", "x")], ("batch", 3, 8, 8))
    with pytest.raises(UsageError) as caught:
        import_onnx(model)
    assert all(words in str(caught.value) for words in ("'x'", "batch,3,8,8", "--input x=1,3,8,8"))
    assert import_onnx(model, {"x": (4, 3, 8, 8)}).outputs[0].shape == (4, 3, 8, 8)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"z": (1, 3)}, ["--input z", "accepted are x"]),
        ({"x": (2, 4)}, ["--input x", "found 2,4", "fits n,3"]),
        ({"x": (0, 3)}, ["found 0,3"]),
        ({"x": (3,)}, ["found 3;"]),
    ],
)
def test_a_shape_that_does_not_fit(given: dict[str, tuple[int, ...]], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        import_onnx(make([node("Relu", "x")], ("n", 3)), given)
    assert all(word in str(caught.value) for word in words)


def test_files_that_are_not_onnx(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        import_onnx(tmp_path / "absent.onnx")
    for name, content in {
        "text.onnx": b"hello, world\n",
        "empty.onnx": b"",
        "elf.onnx": b"\x7fELF" + bytes(300),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(HorqError) as caught:
            import_onnx(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_opset_that_we_do_not_read() -> None:
    with pytest.raises(HorqError, match=r"opset 6; accepted are 7 to \d+"):
        import_onnx(make([node("Relu", "x")], (2, 3), opset=6))


LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


@pytest.mark.parametrize(
    ("network", "layers"), [("resnet50", 54), ("squeezenet", 26), ("shufflenet", 50), ("densenet121", 121)]
)
def test_the_topologies_in_the_onnx_package(network: str, layers: int, layer_names: Any) -> None:
    imported = import_onnx(LIGHT / f"light_{network}.onnx")
    assert len(layer_names(imported)) == layers
    assert np.prod(imported.outputs[0].shape) == 1000
