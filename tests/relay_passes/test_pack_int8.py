"""PackInt8: where a window's runs are, what is folded into the quantisation, and the layout of weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from horq_tvm import ops
from horq_tvm.errors import HorqError
from horq_tvm.ops.int8 import Activation, Int8Style, Rows, rows_of
from horq_tvm.relay_passes.pack_int8 import Int8Target, PackInt8, pack_filters, starts
from horq_tvm.straightline import array_of, constant, op_name, read_main
from tests.relay_passes.program import Array, module, names

G = ops.Geometry
STEM = G((7, 7), (2, 2), (3, 3, 3, 3))


# --- Rows -------------------------------------------------------------------------------------------------------------


def words(rows: Rows, kernel_rows: int) -> int:
    return kernel_rows * rows.taps * rows.words


def test_a_stem_reads_42_dwords_a_window_and_not_49() -> None:
    joined = Rows.of((224, 224), 3, STEM, "quads")
    planar = Rows.of((224, 224), 3, STEM, "quads", planar=True)
    assert (words(joined, 7), words(planar, 7)) == (42, 42)
    assert (joined.step, joined.words, joined.height) == (6, 6, 230)
    assert (planar.step, planar.taps, planar.words, planar.tap) == (2, 3, 2, planar.plane)
    assert planar.length == 3 * planar.plane


def test_taps_and_groups_begin_at_whole_dwords() -> None:
    dilated = Rows.of((9, 9), 10, G((3, 3), dilation=(1, 2)), "quads")
    assert (dilated.taps, dilated.words, dilated.pixel, dilated.tap, dilated.step) == (3, 3, 12, 24, 12)
    grouped = Rows.of((9, 9), 10, G((3, 3), groups=2), "pairs")
    assert (grouped.taps, grouped.words, grouped.group, grouped.pixel) == (3, 3, 6, 12)


@pytest.mark.parametrize("style", ["quads", "pairs"])
@pytest.mark.parametrize("kernel", [1, 2, 3, 5, 7])
@pytest.mark.parametrize(
    ("stride", "dilation", "groups", "planar"),
    [
        (1, 1, 1, False),
        (2, 1, 1, False),
        (3, 2, 1, False),
        (1, 1, 3, False),
        (2, 2, 3, False),
        (1, 1, 1, True),
        (3, 1, 1, True),
    ],
)
def test_every_run_ends_inside_its_row(
    style: Int8Style, kernel: int, stride: int, dilation: int, groups: int, planar: bool
) -> None:
    geometry = G((1, kernel), (1, stride), (0, 2, 0, 1), (1, dilation), groups)
    for width in range(12, 17):
        rows = Rows.of((4, width), 15 if groups > 1 else 3, geometry, style, planar=planar)
        per_word, outputs = {"quads": 4, "pairs": 2}[style], geometry.output_size(4, width)[1]
        last = (outputs - 1) * rows.step + (groups - 1) * rows.group + (rows.taps - 1) * rows.tap
        assert last + rows.words * per_word <= rows.length
        assert rows.length % per_word == 0
        channels = 3 if planar else 1
        assert (channels - 1) * rows.plane + (2 + width + 1) * rows.pixel <= rows.length


# --- Weights ----------------------------------------------------------------------------------------------------------


def test_the_dwords_of_a_filter_lie_side_by_side() -> None:
    weight = np.random.default_rng(0).integers(-127, 128, (6, 2, 3, 5)).astype("int8")
    rows = Rows.of((4, 4), 5, G((2, 3)), "quads")
    packed = pack_filters(weight, 1, 4, rows, "quads")
    assert (packed.shape, packed.dtype) == ((1, 2, 2, 1, 4, 16), np.int8)
    row = weight[4, 1].ravel()  # of filter 4, lane 0 of vector 1
    np.testing.assert_array_equal(packed[0, 1, 1, 0, :, 0:4].ravel()[:15], row)
    assert packed[0, 1, 1, 0, 3, 3] == 0  # beyond the kernel row
    assert not packed[0, 1, :, :, :, 8:].any()  # filters 6 and 7


def test_planes_are_runs_of_their_own() -> None:
    weight = np.random.default_rng(0).integers(-127, 128, (4, 2, 3, 2)).astype("int8")
    rows = Rows.of((4, 4), 2, G((2, 3)), "pairs", planar=True)
    packed = pack_filters(weight, 1, 4, rows, "pairs", planar=True)
    assert (packed.shape, packed.dtype) == ((1, 1, 2, 2, 2, 8), np.int16)
    np.testing.assert_array_equal(packed[0, 0, 1, 1, :, 6:8].ravel(), [*weight[3, 1, :, 1], 0])


def test_the_start_takes_the_zero_points_out() -> None:
    weight = np.random.default_rng(0).integers(-127, 128, (6, 2, 3, 5)).astype("int8")
    zeros = [7, 0, 255, 3, 1]
    found = starts(weight, 1, 4, zeros)
    expected = [*(-(weight.astype(int) * zeros).reshape(6, -1).sum(1)), 0, 0]
    np.testing.assert_array_equal(found, [expected])
    assert found.dtype == np.int32


@pytest.mark.parametrize(("style", "zero"), [("quads", 9), ("pairs", 0)])
def test_elements_of_16_bits_have_no_zero_point_left(style: Int8Style, zero: int) -> None:
    mod = packed(lambda emit, x: emit(int8_conv(x, 8, G((1, 1)))), (1, 7, 6, 8), style=style)
    (conv,) = calls(mod, "horq.packed_int8")
    np.testing.assert_array_equal(array_of(conv.args[2]), [[-8 * zero] * 4])


# --- The pass ---------------------------------------------------------------------------------------------------------


def packed(body: Any, *shapes: tuple[int, ...], style: Int8Style | None = "quads") -> tvm.IRModule:
    target = Int8Target(style, lambda _filters, _groups: 4, 4)
    return tvm.transform.Sequential([PackInt8(target)])(module(shapes, body))


def int8_conv(x: relax.Expr, channels: int, geometry: ops.Geometry, name: str = "L") -> relax.Call:
    weight: Array = np.ones((4, *geometry.kernel, channels), "int8")
    factor = constant(np.ones(4, "float32"))
    return ops.int8_conv2d(x, constant(weight), factor, name=name, geometry=geometry, activation=Activation(1.0, 9))


def calls(mod: tvm.IRModule, op: str) -> list[relax.Call]:
    return [value for _, value in read_main(mod).bindings if op_name(value) == op]


def test_an_nchw_image_is_quantised_as_it_arrives() -> None:
    def body(emit: Any, x: relax.Var) -> relax.Expr:
        return emit(int8_conv(emit(relax.op.permute_dims(x, [0, 2, 3, 1])), 3, STEM))

    mod = packed(body, (1, 3, 32, 32))
    (quantize,) = calls(mod, "horq.quantize")
    assert quantize.args[0] == mod["main"].params[0]
    assert int(quantize.attrs["planar"]) == 1
    (conv,) = calls(mod, "horq.packed_int8")
    assert ops.shape_of(conv) == (1, 16, 16, 4)
    assert rows_of(conv.attrs) == rows_of(quantize.attrs)


@pytest.mark.parametrize(("channels", "axes"), [(5, [0, 2, 3, 1]), (3, [0, 3, 2, 1])])
def test_other_transpositions_stay(channels: int, axes: list[int]) -> None:
    def body(emit: Any, x: relax.Var) -> relax.Expr:
        return emit(int8_conv(emit(relax.op.permute_dims(x, axes)), channels, STEM))

    mod = packed(body, (1, channels, 32, 32))
    assert names(mod) == ["relax.permute_dims", "horq.quantize", "horq.packed_int8"]


def test_a_strided_pointwise_layer_quantises_the_pixels_that_it_reads() -> None:
    mod = packed(lambda emit, x: emit(int8_conv(x, 8, G((1, 1), (2, 2)))), (1, 7, 6, 8))
    (quantize,) = calls(mod, "horq.quantize")
    assert ops.shape_of(quantize) == (1, 4, 3 * 8)
    (conv,) = calls(mod, "horq.packed_int8")
    assert (ops.shape_of(conv), ops.Geometry.of(conv.attrs).strides) == ((1, 4, 3, 4), (1, 1))


def test_a_dense_layer_is_a_pointwise_one_between_reshapes() -> None:
    def body(emit: Any, x: relax.Var) -> relax.Expr:
        weight, factor = constant(np.ones((4, 6), "int8")), constant(np.ones(4, "float32"))
        return emit(ops.int8_dense(x, weight, factor, name="head", activation=Activation(1.0, 0)))

    mod = packed(body, (2, 3, 6))
    assert names(mod) == ["relax.reshape", "horq.quantize", "horq.packed_int8", "relax.reshape"]
    assert ops.shape_of(read_main(mod).result) == (2, 3, 4)
    (conv,) = calls(mod, "horq.packed_int8")
    assert array_of(conv.args[1]).shape == (1, 1, 1, 1, 2, 16)


def test_a_target_without_kernels_is_named_for_the_layer() -> None:
    with pytest.raises(HorqError, match="layer L: there are no int8 kernels for this target"):
        packed(lambda emit, x: emit(int8_conv(x, 8, G((1, 1)))), (1, 7, 6, 8), style=None)


def test_without_int8_layers_any_target_does() -> None:
    mod = packed(lambda emit, x: emit(relax.op.nn.relu(x)), (1, 2), style=None)
    assert names(mod) == ["relax.nn.relu"]
