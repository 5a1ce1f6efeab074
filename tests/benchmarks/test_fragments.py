"""What is timed computes what its name says: against NumPy for bits, against ONNX Runtime for floats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnxruntime as ort

from benchmarks import fragments, onnx_layers
from benchmarks.fragments import Conv, Fragment
from horq_tvm import targets
from horq_tvm.runtime.loader import load
from horq_tvm.straightline import array_of, op_name, read_main

CONV = Conv(6, 64, 32)


def run(fragment: Fragment, folder: Path) -> list[np.ndarray]:
    library = folder / "fragment.so"
    fragment.compile(targets.resolve("native"), library)
    return list(load(library)(**fragment.feeds).values())


def signs(words: np.ndarray, channels: int) -> np.ndarray:
    """uint32 [N,H,W,1,P,words] → ±1 float64 [P,N,H,W,C]."""
    bits = np.unpackbits(words.view("uint8"), axis=-1, bitorder="little")[..., :channels]
    return np.moveaxis(np.where(bits[:, :, :, 0], 1.0, -1.0), 3, 0)


def constants_of(fragment: Fragment, op: str) -> list[np.ndarray]:
    (call,) = [value for _, value in read_main(fragment.mod).bindings if op_name(value) == op]
    return [array for array in map(array_of, call.args) if array is not None]


def sums(fragment: Fragment, conv: Conv) -> np.ndarray:
    """S of every stored plane, float64 [P,N,HO,WO,F]."""
    weight = constants_of(fragment, "horq.bitserial_conv2d")[0].astype("float64")
    planes = np.pad(signs(fragment.feeds["planes"], conv.channels), [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)])
    return sum(
        planes[:, :, dy : dy + conv.size, dx : dx + conv.size] @ weight[:, dy, dx].T
        for dy in range(3)
        for dx in range(3)
    )


@pytest.mark.parametrize("order", [1, 2])
def test_the_bare_conv_stores_its_integers(order: int, tmp_path: Path) -> None:
    fragment = fragments.bare_conv(CONV, order, batch=1)
    (out,) = run(fragment, tmp_path)
    np.testing.assert_array_equal(out.view("int32"), -sums(fragment, CONV).sum(0) / 2)


def test_the_affine_form_adds_alpha_and_beta(tmp_path: Path) -> None:
    fragment = fragments.bare_conv(CONV, 2, batch=1, integer=False)
    (out,) = run(fragment, tmp_path)
    _, alpha, bias, beta = constants_of(fragment, "horq.bitserial_conv2d")
    np.testing.assert_allclose(out, np.tensordot(beta[0], sums(fragment, CONV), 1) * alpha + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("relu", [False, True])
def test_the_epilogue_is_one_kernel_with_both_results(relu: bool, tmp_path: Path) -> None:
    order = 2
    fragment = fragments.conv_with_epilogue(CONV, order, batch=1, relu=relu, shortcut=True)
    library = tmp_path / "fragment.so"
    fragment.compile(targets.resolve("native"), library)
    model = load(library)
    steps = [step.name.split("_")[0] for step in model.profile(**fragment.feeds)]
    assert sorted(steps) == ["fused", "pad", "tir", "tir"]  # tir_negative
    planes, negated = model(**fragment.feeds).values()
    assert planes.shape == (1, 6, 6, 1, order - relu, 1)
    assert np.all(negated <= 0)
    bits = signs(planes, CONV.filters)[0] > 0
    assert 0.1 < bits.mean() < 0.9
    # The last plane's thresholds have to part the values: whatever is binarised, equal values have equal bits.
    (alone,) = run(fragments.conv_with_epilogue(CONV, order, batch=1, relu=relu, shortcut=False), tmp_path)
    np.testing.assert_array_equal(alone, planes)


def test_packing_keeps_the_signs(tmp_path: Path) -> None:
    fragment = fragments.pack(CONV, 1, batch=1)
    (planes,) = run(fragment, tmp_path)
    np.testing.assert_array_equal(signs(planes, CONV.channels)[0] > 0, fragment.feeds["x"] >= 0)


FLOATS = {
    "strided": Conv(9, 3, 32, kernel=7, stride=2),
    "pointwise": Conv(5, 32, 16, kernel=1),
    "depthwise": Conv(8, 32, 32, groups=32),
}


@pytest.mark.parametrize("name", [*FLOATS, "dense", "pool"])
def test_both_engines_run_the_same_float_layer(name: str, tmp_path: Path) -> None:
    rng, path = np.random.default_rng(3), tmp_path / "layer.onnx"
    if name == "dense":
        weight, bias = rng.standard_normal((10, 32), "float32"), rng.standard_normal(10, "float32")
        fragment = fragments.float_dense(32, 2, weight, bias)
        onnx_layers.dense_model(path, 2, weight, bias)
    elif name == "pool":
        conv = Conv(9, 32, 32, stride=2)
        fragment = fragments.max_pool(conv, 1)
        onnx_layers.pool_model(path, conv, 1)
    else:
        conv = FLOATS[name]
        shape = (conv.filters, conv.kernel, conv.kernel, conv.channels // conv.groups)
        weight, bias = rng.standard_normal(shape, "float32"), rng.standard_normal(conv.filters, "float32")
        fragment = fragments.float_conv(conv, 1, weight, bias)
        onnx_layers.conv_model(path, conv, 1, weight, bias)
    (ours,) = run(fragment, tmp_path)
    x = fragment.feeds["x"]
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {"x": np.moveaxis(x, -1, 1) if x.ndim == 4 else x})
    np.testing.assert_allclose(ours, np.moveaxis(theirs, 1, -1) if x.ndim == 4 else theirs, rtol=1e-4, atol=1e-4)


def test_macs_are_logical() -> None:
    assert Conv(56, 64, 64).macs(batch=1) == 56 * 56 * 64 * 64 * 9
    assert Conv(56, 64, 64).macs(batch=2, planes=3) == 6 * Conv(56, 64, 64).macs(batch=1)
    assert Conv(112, 32, 32, groups=32).macs(batch=1) == 112 * 112 * 32 * 9
    assert Conv(224, 3, 64, kernel=7, stride=2).macs(batch=1) == 112 * 112 * 64 * 3 * 49
