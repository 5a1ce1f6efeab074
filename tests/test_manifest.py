"""The manifest: interface.md's keys, there and back, and refusals."""

from __future__ import annotations

import json

import pytest

from horq_tvm.errors import HorqError
from horq_tvm.manifest import ByteCounts, LayerRecord, Manifest
from horq_tvm.specs import TensorSpec

MANIFEST = Manifest(
    inputs=(TensorSpec("image", (1, 3, 8, 8), "float32"), TensorSpec("scale", (), "float32")),
    outputs=(TensorSpec("ünï", (1, 10), "float32"),),
    target="zen5",
    cpu_features=("avx2", "popcnt"),
    layers=(
        LayerRecord("conv1", "conv2d", reason="a model input reaches it", rest="int8"),
        LayerRecord("conv2", "conv2d", 2, "sample", schedule="tuned", records=3),
    ),
    bytes=ByteCounts(1, 2, 3, 4),
)


def test_the_keys_are_those_of_the_interface() -> None:
    found = json.loads(MANIFEST.to_json())
    assert list(found) == ["version", "inputs", "outputs", "target", "cpu_features", "layers", "bytes"]
    assert found["inputs"][0] == {"name": "image", "shape": [1, 3, 8, 8], "dtype": "float32"}
    assert found["layers"][1] == {
        "name": "conv2",
        "op": "conv2d",
        "order": 2,
        "scale": "sample",
        "reason": None,
        "schedule": "tuned",
        "records": 3,
        "rest": None,
    }
    assert found["layers"][0]["rest"] == "int8"
    assert found["layers"][0]["order"] is None
    assert found["bytes"] == {"code": 1, "weights_packed": 2, "weights_float": 3, "manifest": 4}


def test_there_and_back() -> None:
    assert Manifest.from_json(MANIFEST.to_json()) == MANIFEST
    assert MANIFEST.to_json().isascii()


def test_keys_of_a_later_build_are_passed_over() -> None:
    found = MANIFEST.to_dict() | {"agreement": 0.5}
    found["layers"][0]["colour"] = "red"
    found["bytes"]["more"] = 5
    assert Manifest.from_json(json.dumps(found)) == MANIFEST


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": 1}', '{"version": 1, "inputs": 3}'])
def test_what_is_no_manifest(text: str) -> None:
    with pytest.raises(HorqError, match="manifest cannot be read"):
        Manifest.from_json(text)


def test_another_version() -> None:
    with pytest.raises(HorqError, match="version 2; this horq-tvm reads version 1"):
        Manifest.from_json(json.dumps(MANIFEST.to_dict() | {"version": 2}))
