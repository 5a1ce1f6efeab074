"""ExposeInputs: each value that a listed layer reads is a result once, behind the model's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

from horq_tvm import ops
from horq_tvm.relay_passes.expose_inputs import EXPOSED_INPUTS, ExposeInputs
from horq_tvm.straightline import constant
from tests.relay_passes.program import module, run


def test_values_are_handed_out_once_in_the_order_of_their_readers() -> None:
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((3, 3)).astype("float32") for name in ("a", "b", "c", "d")}

    def body(emit: Any, x: relax.Var) -> relax.Expr:
        y = emit(relax.op.nn.relu(emit(ops.dense(x, constant(weights["a"]), name="a"))))
        left, right = (emit(ops.dense(y, constant(weights[name]), name=name)) for name in ("b", "c"))
        return emit(ops.dense(emit(relax.op.add(left, right)), constant(weights["d"]), name="d"))

    plain = module([(2, 3)], body)
    mod = tvm.transform.Sequential([ExposeInputs(["a", "c", "b"])])(plain)
    assert [[str(name) for name in readers] for readers in mod.attrs[EXPOSED_INPUTS]] == [["a"], ["b", "c"]]
    x = rng.standard_normal((2, 3)).astype("float32")
    output, of_a, of_both = run(mod, x)
    np.testing.assert_array_equal(output, run(plain, x)[0])
    np.testing.assert_array_equal(of_a, x)
    np.testing.assert_array_equal(of_both, np.maximum(x.astype("float64") @ weights["a"].T.astype("float64"), 0))
