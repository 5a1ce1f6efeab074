"""examples/rest.py: with an int8 rest a trained example sees the same digits, on as many images as it is told."""

from __future__ import annotations

import pytest

pytest.importorskip("tvm")

from examples import rest
from horq_tvm.errors import HorqError


@pytest.mark.slow
@pytest.mark.network
def test_digits() -> None:
    try:
        found = rest.measure(rest.PRETRAINED / "mnist-k2.onnx", 1000)
    except HorqError as error:
        pytest.skip(str(error))
    assert found["float32"] > 0.95
    assert abs(found["int8"] - found["float32"]) < 0.01
    assert found["alike"] > 0.99
