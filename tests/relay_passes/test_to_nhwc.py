"""ToNHWC: what it makes of each operator, how few permutes stay, and that the numbers do not change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from horq_tvm import ops
from horq_tvm.relay_passes.to_nhwc import ToNHWC
from horq_tvm.straightline import constant
from tests.relay_passes.program import module, names

RNG = np.random.default_rng(5)
op, nn = relax.op, relax.op.nn
X = (2, 4, 6, 5)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype("float32")


W = normal(6, 4, 3, 3)
SCALE, SHIFT = normal(6), normal(6)


def execute(mod: tvm.IRModule, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    plain = relax.transform.LegalizeOps({"horq.name": lambda _builder, call: call.args[0]})(mod)
    machine = relax.VirtualMachine(tvm.compile(plain, tvm.target.Target({"kind": "llvm"})), tvm.cpu())
    result = machine["main"](*(tvm.runtime.tensor(value) for value in inputs))
    return [v.numpy() for v in ([result] if isinstance(result, tvm.runtime.Tensor) else result)]


def conv(emit: Any, x: relax.Expr, weight: np.ndarray, name: str = "c", **attrs: Any) -> relax.Expr:
    return emit(nn.conv2d(x, emit(ops.name(constant(weight), name=name)), **attrs))


def permutes(mod: tvm.IRModule) -> int:
    """Permutes of activations: those of a weight are not computed at run time."""
    found = 0

    def visit(expr: relax.Expr) -> None:
        nonlocal found
        if isinstance(expr, relax.Call) and getattr(expr.op, "name", "") == "relax.permute_dims":
            found += "horq.name" not in str(bindings.get(expr.args[0], ""))

    bindings = {b.var: b.value for block in mod["main"].body.blocks for b in block.bindings}
    relax.analysis.post_order_visit(mod["main"], visit)
    return found


def test_a_block_becomes_channels_last() -> None:
    def before(emit: Any, x: relax.Expr) -> relax.Expr:
        y = conv(emit, x, W, padding=(1, 0, 2, 1), strides=(2, 1))
        y = emit(op.multiply(y, constant(SCALE.reshape(1, 6, 1, 1))))
        y = emit(op.add(y, constant(SHIFT.reshape(6, 1, 1))))
        y = emit(op.subtract(y, constant(np.float32(0.5))))
        y = emit(nn.max_pool2d(emit(op.clip(y, 0, 6)), (2, 2), (1, 1), (0, 0, 1, 1)))
        return emit(op.mean(y, [2, 3], keepdims=False))

    def after(emit: Any, x: relax.Expr) -> relax.Expr:
        named = emit(ops.name(constant(W), name="c"))
        last = emit(op.permute_dims(x, [0, 2, 3, 1]))
        weight = emit(op.permute_dims(named, [0, 2, 3, 1]))
        y = emit(
            nn.conv2d(
                last,
                weight,
                padding=(1, 0, 2, 1),
                strides=(2, 1),
                data_layout="NHWC",
                kernel_layout="OHWI",
            )
        )
        y = emit(op.multiply(y, constant(SCALE)))
        y = emit(op.add(y, constant(SHIFT)))
        y = emit(op.add(y, constant(np.float32(-0.5))))
        y = emit(op.minimum(emit(nn.relu(y)), relax.const(6.0, "float32")))
        y = emit(nn.max_pool2d(y, (2, 2), (1, 1), (0, 0, 1, 1), layout="NHWC"))
        return emit(op.mean(y, [1, 2], keepdims=False))

    found = ToNHWC()(module([X], before))
    tvm.ir.assert_structural_equal(found, module([X], after))


def test_an_image_that_no_layer_asks_for_stays_as_it_is() -> None:
    def body(emit: Any, x: relax.Expr) -> relax.Expr:
        return emit(op.add(emit(nn.relu(x)), constant(normal(1, 4, 1, 1))))

    mod = module([X], body)
    tvm.ir.assert_structural_equal(ToNHWC()(mod), mod)


def test_a_convolution_in_channels_last_stays_as_it_is() -> None:
    def body(emit: Any, x: relax.Expr) -> relax.Expr:
        return emit(nn.conv2d(x, constant(normal(3, 1, 1, 5)), data_layout="NHWC", kernel_layout="OHWI"))

    mod = module([X], body)
    tvm.ir.assert_structural_equal(ToNHWC()(mod), mod)


def test_a_channels_last_input_loses_its_transpose() -> None:
    def body(emit: Any, x: relax.Expr) -> relax.Expr:
        y = conv(emit, emit(op.permute_dims(x, [0, 3, 1, 2])), W)
        return emit(op.permute_dims(y, [0, 2, 3, 1]))

    mod = module([(2, 6, 5, 4)], body)
    found = ToNHWC()(mod)
    assert permutes(mod) == 2
    assert permutes(found) == 0
    x = normal(2, 6, 5, 4)
    np.testing.assert_allclose(execute(found, [x])[0], execute(mod, [x])[0], rtol=1e-5, atol=1e-5)


def test_a_dense_layer_behind_a_flatten_takes_the_pixels_as_they_lie() -> None:
    weight = normal(72, 3)

    def before(emit: Any, x: relax.Expr) -> relax.Expr:
        flat = emit(op.reshape(conv(emit, x, W), (2, 72)))
        flat = emit(nn.relu(emit(op.add(flat, constant(normal(1, 72))))))
        return emit(op.matmul(flat, emit(ops.name(constant(weight), name="fc"))))

    mod = module([X], before)
    found = ToNHWC()(mod)
    assert permutes(found) == 1  # the model's input
    moved = [
        call.args[0].value.numpy()
        for block in found["main"].body.blocks
        for binding in block.bindings
        if getattr(getattr(call := binding.value, "op", None), "name", "") == "horq.name" and call.attrs["name"] == "fc"
    ]
    np.testing.assert_array_equal(moved[0], weight.reshape(6, 12, 3).transpose(1, 0, 2).reshape(72, 3))
    x = normal(*X)
    np.testing.assert_allclose(execute(found, [x])[0], execute(mod, [x])[0], rtol=1e-5, atol=1e-5)


def test_a_flatten_that_is_returned_is_in_the_old_order() -> None:
    def body(emit: Any, x: relax.Expr) -> relax.Expr:
        return emit(nn.softmax(emit(op.reshape(conv(emit, x, W), (2, 72)))))

    _same(body, [X])


def _shuffle(emit: Any, x: relax.Expr) -> relax.Expr:
    y = conv(emit, x, W, padding=(1, 1, 1, 1))
    y = emit(op.permute_dims(emit(op.reshape(y, (2, 2, 3, 6, 5))), [0, 2, 1, 3, 4]))
    return conv(emit, emit(op.reshape(y, (2, 6, 6, 5))), normal(6, 1, 3, 3), "d", groups=6)


def _squeeze_and_excite(emit: Any, x: relax.Expr) -> relax.Expr:
    y = conv(emit, x, W)
    s = emit(op.mean(y, [2, 3], keepdims=True))
    s = emit(op.sigmoid(conv(emit, emit(nn.relu(conv(emit, s, normal(2, 6, 1, 1), "r"))), normal(6, 2, 1, 1), "e")))
    return emit(op.multiply(y, s))


def _branches(emit: Any, x: relax.Expr) -> Any:
    y = conv(emit, x, W, padding=(1, 1, 1, 1))
    first = emit(op.split(y, 3, 1))
    parts = [emit(relax.TupleGetItem(first, i)) for i in range(3)]
    joined = emit(op.concat([parts[2], emit(op.negative(parts[0])), x], 1))
    return joined, emit(op.strided_slice(joined, [1, -1], [1, 0], [7, 4], [2, 1])), parts[1]


def _pointwise(emit: Any, x: relax.Expr) -> relax.Expr:
    y = conv(emit, x, W)
    y = emit(nn.leakyrelu(y, 0.2))
    y = emit(nn.prelu(y, constant(normal(6)), 1))
    y = emit(op.where(emit(op.less(y, constant(normal(6, 1, 1)))), y, emit(op.multiply(y, constant(normal(4, 3))))))
    y = emit(op.maximum(y, constant(normal(1, 6, 4, 1))))
    y = emit(nn.softmax(emit(op.clip(y, -1, 2)), 1))
    return emit(nn.pad(y, [0, 0, 1, 0, 2, 1, 0, 3], pad_value=0.25))


def _pools(emit: Any, x: relax.Expr) -> Any:
    y = emit(nn.avg_pool2d(x, (2, 2), (1, 2), (0, 1, 0, 0), count_include_pad=True))
    y = emit(nn.adaptive_avg_pool2d(emit(nn.max_pool2d(y, (2, 1), dilation=(2, 1))), (2, 3)))
    y = emit(relax.op.image.resize2d(y, (4, 6), method="nearest_neighbor", rounding_method="floor"))
    z = emit(nn.adaptive_avg_pool2d(y, (1, 1)))
    return y, emit(op.reshape(z, (2, 4))), emit(op.max(y, [1], keepdims=False)), emit(op.sum(y, [0, 3]))


def _lines(emit: Any, x: relax.Expr) -> relax.Expr:
    y = conv(emit, emit(op.reshape(x, (2, 4, 1, 30))), normal(3, 4, 1, 3), "a")
    y = emit(nn.relu(emit(op.add(emit(op.reshape(y, (2, 3, 28))), constant(normal(1, 3, 1))))))
    return emit(op.reshape(conv(emit, emit(op.reshape(y, (2, 3, 1, 28))), normal(5, 3, 1, 2), "b"), (2, 5, 27)))


def _vector_of_an_activation(emit: Any, x: relax.Expr) -> relax.Expr:
    gate = emit(op.mean(x, [0, 2, 3], keepdims=False))
    return emit(op.multiply(conv(emit, x, normal(4, 4, 1, 1)), emit(op.reshape(gate, (4, 1, 1)))))


NETWORKS = {
    "channel shuffle": (_shuffle, 3),
    "squeeze and excite": (_squeeze_and_excite, 2),
    "split, concat, slice": (_branches, 4),
    "pointwise": (_pointwise, 2),
    "pools": (_pools, 3),
    "lines": (_lines, 2),
    "a vector that is computed": (_vector_of_an_activation, 2),
}


def _same(body: Any, shapes: Sequence[tuple[int, ...]]) -> tvm.IRModule:
    mod = module(shapes, body)
    found = ToNHWC()(mod)
    inputs = [normal(*shape) for shape in shapes]
    for got, wanted in zip(execute(found, inputs), execute(mod, inputs), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    return found


@pytest.mark.parametrize("network", NETWORKS)
def test_same_numbers_and_few_permutes(network: str) -> None:
    body, most = NETWORKS[network]
    found = _same(body, [X])
    assert permutes(found) <= most
    layouts = {str(v.attrs.data_layout) for v in _values(found) if _name(v) == "relax.nn.conv2d"}
    assert layouts <= {"NHWC"}
    assert not {"relax.clip", "relax.nn.dropout"} & set(names(found))


def _values(mod: tvm.IRModule) -> list[relax.Expr]:
    return [binding.value for block in mod["main"].body.blocks for binding in block.bindings]


def _name(expr: relax.Expr) -> str:
    return expr.op.name if isinstance(expr, relax.Call) else ""


def test_an_image_of_one_pixel_is_reshaped_not_permuted() -> None:
    def body(emit: Any, x: relax.Expr) -> relax.Expr:
        return conv(emit, x, normal(3, 4, 1, 1))

    found = _same(body, [(2, 4, 1, 1)])
    assert permutes(found) == 0


def test_inputs_that_are_returned_keep_their_layout() -> None:
    def body(emit: Any, x: relax.Expr) -> Any:
        return x, conv(emit, x, W)

    found = _same(body, [X])
    assert [tuple(int(e) for e in field.shape) for field in found["main"].ret_ty.fields] == [X, (2, 6, 4, 3)]
