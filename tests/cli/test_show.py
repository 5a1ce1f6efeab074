"""Tables and shapes as people see them."""

from __future__ import annotations

import numpy as np

from horq_tvm.cli.show import first_values, shape_text, table


def test_table_aligns_numbers_to_the_right() -> None:
    text = table(("name", "n"), [("a", 5), ("bcdef", None), ("c", 100)])
    assert text.splitlines() == ["name     n", "a        5", "bcdef    -", "c      100"]
    assert table(("a", "b"), []) == "a  b"


def test_shapes() -> None:
    assert shape_text((1, 3, 224, 224)) == "1x3x224x224"
    assert shape_text(()) == "scalar"


def test_first_values() -> None:
    assert first_values(np.array([1.0, 0.12345678], "float32")) == "1 0.123457"
    # Planes of bits and token numbers lose nothing.
    assert first_values(np.array([4294967295, 7], "uint32")) == "4294967295 7"
    assert first_values(np.array([True, False])) == "True False"
    assert first_values(np.zeros(9)) == "0 0 0 0 0 0 0 0 ..."
