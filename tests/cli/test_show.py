"""Tables and shapes as people see them."""

from __future__ import annotations

from horq_tvm.cli.show import shape_text, table


def test_table_aligns_numbers_to_the_right() -> None:
    text = table(("name", "n"), [("a", 5), ("bcdef", None), ("c", 100)])
    assert text.splitlines() == ["name     n", "a        5", "bcdef    -", "c      100"]
    assert table(("a", "b"), []) == "a  b"


def test_shapes() -> None:
    assert shape_text((1, 3, 224, 224)) == "1x3x224x224"
    assert shape_text(()) == "scalar"
