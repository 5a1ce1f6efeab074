"""main as a straight line: what reading resolves, who uses what, and what writing keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from horq_tvm.errors import HorqError
from horq_tvm.straightline import Writer, array_of, constant, fields_of, op_name, read_main, substitute, vars_of
from tests.relay_passes.program import module, names, run

op = relax.op
X = (2, 3)


def diamond(emit: Any, x: relax.Expr) -> Any:
    """relu(x), read twice, and the sum of both readings."""
    first = emit(op.nn.relu(x))
    return emit(op.add(emit(op.negative(first)), first))


@pytest.mark.parametrize("dtype", ["int64", "int8", "float64", "uint32", "bool"])
def test_a_constant_keeps_its_dtype_and_values(dtype: str) -> None:
    array = np.array([[0, 1], [1, 0]], dtype).T  # not contiguous
    found = array_of(constant(array))
    assert found is not None
    assert found.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(found, array)


def test_only_constants_have_a_value_and_only_operators_a_name() -> None:
    x = relax.Var("x", relax.TensorType(X, "float32"))
    assert array_of(x) is None
    assert (op_name(op.negative(x)), op_name(x)) == ("relax.negative", "")


def test_users_and_sole_users() -> None:
    program = read_main(module([X], diamond))
    (x,) = program.params
    relu, negative, total = (var for var, _ in program.bindings)
    assert program.users[x] == [relu]
    assert program.users[relu] == [negative, total]
    assert program.sole_user(negative) == total
    assert program.sole_user(relu) is None  # two readers
    assert program.sole_user(total) is None  # the result reads it
    assert program.returned == {total}


def test_a_reader_that_the_result_has_too_is_not_sole() -> None:
    def body(emit: Any, x: relax.Expr) -> Any:
        first = emit(op.nn.relu(x))
        return emit(op.negative(first)), first

    program = read_main(module([X], body))
    assert program.sole_user(program.bindings[0][0]) is None


def test_aliases_and_tuples_are_resolved() -> None:
    def body(emit: Any, x: relax.Expr) -> Any:
        same = emit(x)
        pair = emit(relax.Tuple([emit(op.nn.relu(same)), same]))
        return emit(op.add(emit(relax.TupleGetItem(pair, 0)), emit(relax.TupleGetItem(pair, 1))))

    program = read_main(module([X], body))
    assert [op_name(value) for _, value in program.bindings] == ["relax.nn.relu", "relax.add"]
    (x,) = program.params
    assert list(vars_of(program.bindings[1][1])) == [program.bindings[0][0], x]


def test_control_flow_is_refused() -> None:
    x = relax.Var("x", relax.TensorType(X, "float32"))
    flag = relax.Var("flag", relax.TensorType((), "bool"))
    builder = relax.BlockBuilder()
    with builder.function("main", [flag, x]):
        chosen = builder.emit(relax.If(flag, op.nn.relu(x), x), "chosen")
        builder.emit_func_output(chosen)
    with pytest.raises(HorqError, match="binds chosen to control flow; a model has to be a straight line"):
        read_main(builder.get())


def test_substitute_returns_the_same_object_where_nothing_changes() -> None:
    x, y = (relax.Var(name, relax.TensorType(X, "float32")) for name in "xy")
    call = op.add(x, x)
    assert substitute(call, {y: x}) is call
    assert list(vars_of(substitute(call, {x: y}))) == [y, y]


def test_writing_maps_binds_and_keeps_names_attributes_and_other_functions() -> None:
    before = module([X], diamond).with_attr("kept", ["a"])
    before["helper"] = module([X], diamond)["main"].with_attr("global_symbol", "helper")
    program = read_main(before)
    relu, negative, total = program.bindings
    with Writer(before, program) as writer:
        writer.map(relu[0], program.params[0])  # the relu is gone, what read it reads x
        writer.bind(*negative)
        writer.bind(*total)
        after = writer.finish(program.result)
    assert names(after) == ["relax.negative", "relax.add"]
    assert read_main(after).bindings[0][0].name == negative[0].name
    assert [str(name) for name in after.attrs["kept"]] == ["a"]
    tvm.ir.assert_structural_equal(after["helper"], before["helper"])
    x = np.array([[-1, 2, -3], [4, -5, 6]], "float32")
    np.testing.assert_array_equal(run(after, x)[0], 0 * x)


def test_an_error_while_writing_leaves_the_builders_usable() -> None:
    mod = module([X], diamond)
    with pytest.raises(ValueError, match="on purpose"), Writer(mod, read_main(mod)):
        raise ValueError("on purpose")
    assert names(module([X], diamond)) == names(mod)


def test_results_one_by_one() -> None:
    x = relax.Var("x", relax.TensorType(X, "float32"))
    assert fields_of(x) == [x]
    assert fields_of(relax.Tuple([x, x])) == [x, x]
