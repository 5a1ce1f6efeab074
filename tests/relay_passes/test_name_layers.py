"""NameLayers: which convolutions and products become layers, and what is left of the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from horq_tvm import ops
from horq_tvm.layers import NOT_CONSTANT, OPAQUE_LAYERS
from horq_tvm.relay_passes.name_layers import NameLayers
from horq_tvm.relay_passes.to_nhwc import ToNHWC
from horq_tvm.straightline import constant
from tests.relay_passes.program import module, names, run

RNG = np.random.default_rng(6)
op, nn = relax.op, relax.op.nn
X = (2, 6, 5, 4)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype("float32")


W = normal(6, 2, 3, 2)
NHWC = {"data_layout": "NHWC", "kernel_layout": "OHWI"}


def named(emit: Any, weight: relax.Expr, name: str = "layer") -> relax.Expr:
    return emit(ops.name(weight, name=name))


def opaque(mod: tvm.IRModule) -> list[list[str]]:
    return [[str(part) for part in entry] for entry in mod.attrs[OPAQUE_LAYERS]]


def without_list(mod: tvm.IRModule) -> tvm.IRModule:
    return mod.without_attr(OPAQUE_LAYERS)


def test_a_convolution_under_a_name_and_a_permute() -> None:
    def before(emit: Any, x: relax.Expr) -> relax.Expr:
        weight = emit(op.permute_dims(named(emit, constant(W)), [0, 2, 3, 1]))
        return emit(nn.conv2d(x, weight, (2, 1), (1, 0, 2, 3), (1, 2), 2, **NHWC))

    def after(emit: Any, x: relax.Expr) -> relax.Expr:
        weight = constant(W.transpose(0, 2, 3, 1))
        return emit(
            ops.conv2d(x, weight, name="layer", strides=(2, 1), padding=(1, 0, 2, 3), dilation=(1, 2), groups=2)
        )

    found = NameLayers()(module([X], before))
    assert opaque(found) == []
    tvm.ir.assert_structural_equal(without_list(found), module([X], after))


def test_a_product_becomes_a_dense_layer_with_its_filters_first() -> None:
    weight = normal(4, 3)

    def before(emit: Any, x: relax.Expr) -> relax.Expr:
        moved = emit(op.permute_dims(named(emit, emit(op.reshape(constant(weight.T), (3, 4)))), [1, 0]))
        return emit(op.matmul(x, moved))

    def after(emit: Any, x: relax.Expr) -> relax.Expr:
        return emit(ops.dense(x, constant(weight.T), name="layer"))

    found = NameLayers()(module([X], before))
    assert opaque(found) == []
    tvm.ir.assert_structural_equal(without_list(found), module([X], after))


def test_a_zero_padding_joins_the_convolution() -> None:
    weight = normal(3, 3, 3, 4)

    def before(emit: Any, x: relax.Expr) -> relax.Expr:
        padded = emit(nn.pad(x, [0, 0, 3, 1, 2, 0, 0, 0]))
        return emit(nn.conv2d(padded, named(emit, constant(weight)), padding=(1, 1, 0, 2), **NHWC))

    def after(emit: Any, x: relax.Expr) -> relax.Expr:
        return emit(ops.conv2d(x, constant(weight), name="layer", padding=(4, 3, 1, 2)))

    found = NameLayers()(module([X], before))
    tvm.ir.assert_structural_equal(without_list(found), module([X], after))


@pytest.mark.parametrize(
    ("widths", "mode", "value"),
    [
        ([0, 0, 1, 1, 1, 1, 0, 0], "constant", 0.5),
        ([0, 0, 1, 1, 1, 1, 0, 0], "reflect", 0.0),
        ([0, 0, 1, 1, 1, 1, 0, 4], "constant", 0.0),
        ([1, 0, 1, 1, 1, 1, 0, 0], "constant", 0.0),
    ],
)
def test_another_padding_stays(widths: list[int], mode: str, value: float) -> None:
    channels = 4 + widths[6] + widths[7]

    def body(emit: Any, x: relax.Expr) -> relax.Expr:
        padded = emit(nn.pad(x, widths, mode, value))
        return emit(nn.conv2d(padded, named(emit, constant(normal(3, 1, 1, channels))), **NHWC))

    assert names(NameLayers()(module([X], body))) == ["relax.nn.pad", "horq.conv2d"]


def test_a_padding_with_another_use_stays_for_that() -> None:
    def body(emit: Any, x: relax.Expr) -> Any:
        padded = emit(nn.pad(x, [0, 0, 1, 1, 1, 1, 0, 0]))
        layer = emit(nn.conv2d(padded, named(emit, constant(normal(3, 1, 1, 4))), **NHWC))
        return layer, emit(nn.max_pool2d(padded, (2, 2), layout="NHWC"))

    assert names(NameLayers()(module([X], body))) == ["relax.nn.pad", "horq.conv2d", "relax.nn.max_pool2d"]


def test_what_is_no_layer_is_listed_and_loses_its_name() -> None:
    def before(emit: Any, x: relax.Expr, kernel: relax.Expr) -> Any:
        conv = emit(nn.conv2d(x, named(emit, kernel, "computed"), **NHWC))
        turned = emit(op.permute_dims(x, [0, 1, 3, 2]))
        scores = emit(op.matmul(x, named(emit, turned, "scores")))
        batched = emit(op.matmul(x, named(emit, constant(np.ones((6, 4, 3), "float32")), "batched")))
        unnamed = emit(op.matmul(x, constant(np.ones((4, 2), "float32"))))
        return conv, scores, batched, unnamed

    def after(emit: Any, x: relax.Expr, kernel: relax.Expr) -> Any:
        conv = emit(nn.conv2d(x, kernel, **NHWC))
        scores = emit(op.matmul(x, emit(op.permute_dims(x, [0, 1, 3, 2]))))
        batched = emit(op.matmul(x, constant(np.ones((6, 4, 3), "float32"))))
        unnamed = emit(op.matmul(x, constant(np.ones((4, 2), "float32"))))
        return conv, scores, batched, unnamed

    shapes = [X, (3, 1, 1, 4)]
    found = NameLayers()(module(shapes, before))
    assert opaque(found) == [
        ["computed", "conv2d", NOT_CONSTANT],
        ["scores", "dense", NOT_CONSTANT],
        ["batched", "dense", "its weights have 3 axes, not 2"],
    ]
    tvm.ir.assert_structural_equal(without_list(found), module(shapes, after))


def test_from_the_imported_form_on_by_number() -> None:
    """The interpreter reads the layers, NumPy the definition of a convolution with groups and asymmetric padding."""
    weight, dense = normal(6, 2, 3, 2), normal(6, 3)

    def body(emit: Any, x: relax.Expr) -> Any:
        image = emit(op.permute_dims(x, [0, 3, 1, 2]))
        y = emit(nn.conv2d(image, named(emit, constant(weight), "conv"), (2, 1), (1, 0, 2, 1), groups=2))
        last = emit(op.permute_dims(y, [0, 2, 3, 1]))
        return last, emit(op.matmul(last, named(emit, constant(dense), "fc")))

    found = NameLayers()(ToNHWC()(module([(2, 5, 6, 4)], body)))
    assert names(found) == ["horq.conv2d", "horq.dense"]

    x = normal(2, 5, 6, 4)
    padded = np.pad(x, ((0, 0), (1, 2), (0, 1), (0, 0))).astype("float64")
    wanted = np.zeros((2, 3, 6, 6))
    for n, i, j, f in np.ndindex(wanted.shape):
        group = f // 3
        window = padded[n, 2 * i : 2 * i + 3, j : j + 2, 2 * group : 2 * group + 2]
        wanted[n, i, j, f] = (window * weight[f].transpose(1, 2, 0)).sum()
    conv, fc = run(without_list(found), x)
    np.testing.assert_allclose(conv, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(fc, wanted @ dense, rtol=1e-5, atol=1e-5)
