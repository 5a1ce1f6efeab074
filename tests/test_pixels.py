"""Images of bytes: how a normalisation folds into the first layer, on every x86 level and against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")
pytest.importorskip("onnxruntime")

import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from tvm import relax

import horq_tvm
from horq_tvm import ops, pipeline, reference_int8
from horq_tvm.ops.int8 import Activation
from horq_tvm.pixels import pixels_of
from horq_tvm.relay_passes.quantize_rest import QuantizeRest
from horq_tvm.straightline import constant, op_name, read_main
from tests.end_to_end.drawn import compile_module
from tests.relay_passes.program import Array, module, names
from tests.schedules.test_int8 import TARGETS, runnable

MEAN = np.array([123.675, 116.28, 103.53])  # ImageNet's, of 255 levels
DEVIATION = np.array([58.395, 57.12, 57.375])


def c(values: Any, *shape: int) -> relax.Expr:
    return constant(np.asarray(values, "float32").reshape(shape or np.shape(values)))


# --- The normalisation ------------------------------------------------------------------------------------------------

Steps = Callable[[Any, relax.Expr], relax.Expr]
op = relax.op

NORMALISATIONS: dict[str, tuple[Steps, Any, Any]] = {
    "none": (lambda emit, x: x, 1, 0),
    "by 255": (lambda emit, x: emit(op.divide(x, c(255.0))), 1 / 255, 0),
    "mean and deviation": (
        lambda emit, x: emit(op.divide(emit(op.subtract(x, c(MEAN))), c(DEVIATION, 1, 1, 1, 3))),
        1 / DEVIATION,
        -MEAN / DEVIATION,
    ),
    "the other way round": (
        lambda emit, x: emit(op.add(c([1.0, 2.0, 3.0]), emit(op.multiply(c(0.5), x)))),
        0.5,
        [1, 2, 3],
    ),
    "negated": (lambda emit, x: emit(op.subtract(c(255.0), x)), -1, 255),
}


def normalised(steps: Steps, dtype: str = "uint8", shape: tuple[int, ...] = (1, 4, 5, 3)) -> Any:
    """What `pixels_of` says of steps(float32(pixels))."""

    def body(emit: Any, pixels: relax.Var) -> relax.Expr:
        return emit(op.exp(steps(emit, emit(op.astype(pixels, "float32")))))

    program = read_main(module([shape], body, dtype))
    (read,) = (value.args[0] for _, value in program.bindings if op_name(value) == "relax.exp")
    return pixels_of(program, read), program


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_factor_and_addend(name: str) -> None:
    steps, factor, addend = NORMALISATIONS[name]
    found, program = normalised(steps)
    assert found.source == program.params[0]
    assert not found.planar
    np.testing.assert_allclose(found.factor, np.broadcast_to(factor, 3), rtol=1e-6)
    np.testing.assert_allclose(found.addend, np.broadcast_to(addend, 3), rtol=1e-6)


@pytest.mark.parametrize(
    "steps",
    [
        lambda emit, x: emit(op.add(x, c(np.ones((5, 1))))),  # along the width
        lambda emit, x: emit(op.multiply(x, x)),
        lambda emit, x: emit(op.multiply(x, c(0.0))),
        lambda emit, x: emit(op.divide(c(1.0), x)),
        lambda emit, x: emit(op.nn.relu(x)),
        lambda emit, x: emit(op.permute_dims(x, [0, 2, 1, 3])),
    ],
)
def test_what_is_no_normalisation(steps: Steps) -> None:
    assert normalised(steps)[0] is None


def test_a_zero_point_may_be_subtracted_among_integers() -> None:
    def body(emit: Any, pixels: relax.Var) -> relax.Expr:
        wide = emit(op.subtract(emit(op.astype(pixels, "int32")), constant(np.int32([7, 8, 9]))))
        return emit(op.exp(emit(op.multiply(emit(op.astype(wide, "float32")), c(0.5)))))

    program = read_main(module([(1, 4, 5, 3)], body, "uint8"))
    (read,) = (value.args[0] for _, value in program.bindings if op_name(value) == "relax.exp")
    found = pixels_of(program, read)
    assert found is not None
    assert found.zero_points == (7, 8, 9)
    np.testing.assert_array_equal(found.factor, [0.5] * 3)


def test_other_integers_are_no_bytes() -> None:
    assert normalised(NORMALISATIONS["none"][0], "int32")[0] is None


def test_planes_are_normalised_along_their_own_axis() -> None:
    def steps(emit: Any, x: relax.Expr) -> relax.Expr:
        return emit(op.permute_dims(emit(op.subtract(x, c(MEAN, 3, 1, 1))), [0, 2, 3, 1]))

    found, _ = normalised(steps, shape=(1, 3, 4, 5))
    assert found.planar
    np.testing.assert_allclose(found.zeros, MEAN, rtol=1e-6)
    assert found.zero_points == (124, 116, 104)
    assert found.can_pad()


# --- The pass ---------------------------------------------------------------------------------------------------------


def quantised(addend: float, padding: int, groups: int = 1) -> list[str]:
    """The operators for a convolution of p + addend."""

    def body(emit: Any, pixels: relax.Var) -> relax.Expr:
        x = emit(op.add(emit(op.astype(pixels, "float32")), c(addend)))
        weight = constant(np.ones((4, 3, 3, 4 // groups), "float32"))
        return emit(ops.conv2d(x, weight, name="stem", padding=(padding,) * 4, groups=groups))

    return names(QuantizeRest({"stem": Activation(1.0, 0)})(module([(1, 6, 6, 4)], body, "uint8")))


def test_which_images_are_read_as_they_are() -> None:
    assert quantised(-7.0, 1)[-1] == "horq.int8_image"
    assert quantised(-7.25, 1)[-2:] == ["horq.int8_image", "relax.add"]
    assert quantised(40.0, 0)[-2:] == ["horq.int8_image", "relax.add"]
    assert quantised(40.0, 1)[-1] == "horq.int8_conv2d"  # 0 is 40 below the darkest level: no byte can pad
    assert quantised(-7.0, 1, groups=2)[-1] == "horq.int8_conv2d"


# --- The kernels ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stem:
    """A convolution of factor·p + addend, pixels [N,H,W,C] or, `planar`, [N,C,H,W]."""

    channels: int
    filters: int
    kernel: tuple[int, int] = (3, 3)
    size: tuple[int, int, int] = (1, 9, 11)
    window: dict[str, Any] = field(default_factory=dict)
    planar: bool = False
    factor: Any = 1 / 128
    addend: Any = -127 / 128

    def drawn(self) -> tuple[Array, Array]:
        """pixels uint8 [N,C,H,W], weight float32 [F,C,kh,kw]."""
        rng = np.random.default_rng(self.channels + self.filters)
        pixels = rng.integers(0, 256, (self.size[0], self.channels, *self.size[1:]), dtype="uint8")
        return pixels, rng.standard_normal((self.filters, self.channels, *self.kernel)).astype("float32")

    def vectors(self) -> tuple[Array, Array]:
        factor, addend = (np.broadcast_to(np.asarray(v, "float32"), self.channels) for v in (self.factor, self.addend))
        return factor, addend


SAME = {"padding": (1, 1, 1, 1)}
IMAGENET = {"factor": 1 / DEVIATION, "addend": -MEAN / DEVIATION}
STEMS = [
    *(
        Stem(3, 16, (7, 7), (1, 20, 22), {"strides": (2, 2), "padding": (3, 3, 3, 3)}, planar, **how)
        for planar in (True, False)
        for how in ({}, IMAGENET)
    ),
    Stem(3, 20, (3, 3), (2, 9, 10), {"strides": (2, 1), "padding": (0, 1, 2, 3)}, True, **IMAGENET),
    Stem(3, 20, (3, 3), (2, 9, 10), {"strides": (2, 1), "padding": (0, 1, 2, 3)}, False, **IMAGENET),
    Stem(1, 8, window=SAME, planar=True),
    Stem(1, 8, window=SAME, factor=1 / 255, addend=0.0),
    Stem(4, 8, size=(1, 9, 12), factor=-2.0, addend=(100.0, 200.5, 300.0, 400.0)),  # not padded: read where it is
    Stem(5, 8, planar=True, window={"dilation": (2, 2), "padding": (2, 2, 2, 2)}),
    Stem(6, 8, (1, 1), window={"strides": (2, 2)}, addend=3.0),
]


@pytest.mark.parametrize("target", TARGETS)
def test_integers_are_exact(target: str) -> None:
    drawn = [stem.drawn() for stem in STEMS]

    def body(emit: Any, *images: relax.Var) -> list[relax.Expr]:
        outputs = []
        for i, (stem, image, (_, weight)) in enumerate(zip(STEMS, images, drawn, strict=True)):
            along = (stem.channels, 1, 1) if stem.planar else (stem.channels,)
            factor, addend = (c(vector, *along) for vector in stem.vectors())
            x = emit(op.add(emit(op.multiply(emit(op.astype(image, "float32")), factor)), addend))
            x = emit(op.permute_dims(x, [0, 2, 3, 1])) if stem.planar else x
            filters = constant(np.ascontiguousarray(weight.transpose(0, 2, 3, 1)))
            outputs.append(emit(ops.conv2d(x, filters, name=f"L{i}", **stem.window)))
        return outputs

    arriving = [
        np.ascontiguousarray(pixels if stem.planar else np.moveaxis(pixels, 1, 3))
        for stem, (pixels, _) in zip(STEMS, drawn, strict=True)
    ]
    mod = module([image.shape for image in arriving], body, "uint8")
    mod = pipeline.quantize_rest({f"L{i}": Activation(1.0, 0) for i in range(len(STEMS))})(mod)
    found = runnable(compile_module(mod, target=target), target)(*arriving)
    for i, (stem, (pixels, weight)) in enumerate(zip(STEMS, drawn, strict=True)):
        sums, expected = reference_int8.image_conv2d(pixels, weight, *stem.vectors(), **stem.window)
        assert np.abs(sums).max() > 1000
        close = {"rtol": 1e-6, "atol": 1e-6 * np.abs(expected).max()}  # of a product and an addition; sums are integers
        np.testing.assert_allclose(np.moveaxis(found[f"y{i}"], 3, 1), expected, err_msg=str(stem), **close)


def test_the_oracle_is_the_float_convolution_but_for_the_weights_steps() -> None:
    stem = STEMS[2]
    pixels, weight = stem.drawn()
    factor, addend = stem.vectors()
    _, found = reference_int8.image_conv2d(pixels, weight, factor, addend, padding=(0, 0, 0, 0), strides=(2, 2))
    x = pixels * factor[:, None, None] + addend[:, None, None]
    rows = np.lib.stride_tricks.sliding_window_view(x, stem.kernel, (2, 3))[:, :, ::2, ::2]
    expected = np.einsum("nchwij,fcij->nfhw", rows, weight)
    assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max()


# --- Whole models -----------------------------------------------------------------------------------------------------


def network(layout: str, padding: int = 1) -> onnx.ModelProto:
    """uint8 image → Cast → Sub, Mul → Transpose for NHWC → Conv 3×3, ReLU, GlobalAveragePool, Flatten, MatMul."""
    rng = np.random.default_rng(3)
    last = layout == "NHWC"
    along = (1, 1, 1, 3) if last else (1, 3, 1, 1)
    weights = {
        "mean": MEAN.reshape(along),
        "factor": 1 / DEVIATION.reshape(along),
        "w": rng.standard_normal((8, 3, 3, 3)),
        "b": rng.standard_normal(8),
        "head": rng.standard_normal((8, 5)),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["cast", "mean"], ["centred"]),
        helper.make_node("Mul", ["centred", "factor"], ["normal"]),
        helper.make_node("Transpose", ["normal"], ["planes"], perm=[0, 3, 1, 2] if last else [0, 1, 2, 3]),
        helper.make_node("Conv", ["planes", "w", "b"], ["c"], name="stem", pads=[padding] * 4),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("MatMul", ["f", "head"], ["scores"], name="head"),
    ]
    shape = [1, 12, 14, 3] if last else [1, 3, 12, 14]
    graph = helper.make_graph(
        nodes,
        "image",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 5])],
        [numpy_helper.from_array(value.astype("float32"), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("padding", [0, 1])
def test_an_image_of_bytes_against_onnxruntime(layout: str, padding: int) -> None:
    """float32: equal but for rounding. int8: within its steps, and the stem is one kernel behind at most one copy."""
    proto = network(layout, padding)
    shape = [axis.dim_value for axis in proto.graph.input[0].type.tensor_type.shape.dim]
    samples = np.random.default_rng(4).integers(0, 256, (4, *shape[1:]), dtype="uint8")
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    given: dict[str, Any] = {"order": "float", "calibration": {"image": samples}}
    plain = horq_tvm.build(proto, **given).load()
    quantised = horq_tvm.build(proto, rest="int8", **given).load()
    assert [(spec.name, spec.dtype) for spec in plain.inputs] == [("image", "uint8")]
    for image in samples:
        (expected,) = session.run(None, {"image": image[None]})
        largest = np.abs(expected).max()
        np.testing.assert_allclose(plain(image[None])["scores"], expected, atol=1e-5 * largest)
        np.testing.assert_allclose(quantised(image[None])["scores"], expected, atol=0.02 * largest)
    steps = [step.name.split("_")[0] for step in quantised.profile(samples[:1], runs=1)]
    assert steps[:2] == ["quantize", "fused"], steps


def test_bytes_without_padding_are_not_even_copied() -> None:
    """VNNI reads NHWC rows beyond whose ends no window goes; PMADDWD wants 16 bits an element."""
    proto = network("NHWC", 0)
    (stem,) = (node for node in proto.graph.node if node.name == "stem")
    stem.attribute.append(helper.make_attribute("strides", [2, 2]))
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 16
    samples = np.random.default_rng(4).integers(0, 256, (4, 12, 16, 3), dtype="uint8")
    given: dict[str, Any] = {"order": "float", "rest": "int8", "calibration": {"image": samples}}
    if horq_tvm.schedules.int8.style(horq_tvm.targets.resolve("native")) != "quads":
        pytest.skip("this CPU has no VNNI")
    steps = [step.name for step in horq_tvm.build(proto, **given).load().profile(samples[:1], runs=1)]
    assert steps[0].endswith(" stem"), steps


def test_calibration_data_that_are_no_bytes() -> None:
    with pytest.raises(horq_tvm.UsageError, match=r"'image' has dtype float32 and values that uint8 cannot hold"):
        horq_tvm.build(
            network("NCHW"), order="float", rest="int8", calibration={"image": np.full((1, 3, 12, 14), 0.5, "float32")}
        )
    whole = np.full((1, 3, 12, 14), 7.0)
    horq_tvm.build(network("NCHW"), order="float", rest="int8", calibration={"image": whole})


def test_a_grey_image_that_becomes_three_channels_is_no_normalisation() -> None:
    found, _ = normalised(lambda emit, x: emit(op.divide(x, c(DEVIATION, 1, 1, 1, 3))), shape=(1, 4, 5, 1))
    assert found is None
