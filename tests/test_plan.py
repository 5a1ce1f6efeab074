"""The per-layer plan: what it means, and that every mistake is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from horq_tvm.errors import UsageError
from horq_tvm.plan import UNSET, layer_config, load_plan
from horq_tvm.specs import LayerConfig

EXAMPLE = """
version: 1
default: float            # or {order: 2, scale: sample}
layers:
  layer2.0.conv1: {order: 2, scale: static, betas: [0.8, 0.3]}     # betas optional
  head: float
"""


def test_the_documented_example(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(EXAMPLE)
    plan = load_plan(path)
    assert plan.default is None
    assert plan.layers == {"layer2.0.conv1": LayerConfig(2, "static", (0.8, 0.3)), "head": None}


def test_a_dict_is_as_good_as_a_file() -> None:
    plan = load_plan({"version": 1, "default": {"order": 3, "scale": "patch"}})
    assert plan.default == LayerConfig(3, "patch")
    assert plan.layers == {}


def test_no_default_is_not_float() -> None:
    assert load_plan({"version": 1}).default == UNSET
    assert load_plan({"version": 1, "default": "float"}).default is None


def test_names_are_kept_as_written(tmp_path: Path) -> None:
    """An unnamed ONNX node goes by its output, which is often a number; and YAML reads `on` and `1e3` as no strings."""
    path = tmp_path / "plan.yaml"
    path.write_text("version: 1\nlayers: {123: float, on: float, 1e3: float, 007: float, /conv/Conv: float}\n")
    assert list(load_plan(path).layers) == ["123", "on", "1e3", "007", "/conv/Conv"]


@pytest.mark.parametrize(
    ("layer", "complaint"),
    [
        ({"order": 0, "scale": "sample"}, r"plan: layers\.a\.order: found 0; accepted: 1 to 8"),
        ({"order": 100, "scale": "sample"}, r"plan: layers\.a\.order: found 100; accepted: 1 to 8"),
        ({"order": True, "scale": "sample"}, r"layers\.a: order: .*found True"),
        ({"order": "2", "scale": "sample"}, r"layers\.a: order: .*found '2'"),
        ({"order": 2, "scale": "smaple"}, r"layers\.a\.scale: found 'smaple'; accepted: patch, sample, static"),
        ({"order": 2}, r"layers\.a: scale: missing"),
        ({"ordr": 2, "scale": "sample"}, r"layers\.a: ordr: unknown key; accepted: order, scale, betas"),
        ({"order": 2, "scale": "static", "betas": [0.5]}, r"layers\.a\.betas: found 1 with order 2"),
        ({"order": 1, "scale": "static", "betas": [0.0]}, r"layers\.a\.betas: found 0\.0; accepted: .*above 0"),
        ({"order": 1, "scale": "static", "betas": [float("nan")]}, r"layers\.a\.betas: found nan"),
        ({"order": 1, "scale": "sample", "betas": [0.5]}, r"layers\.a\.betas: given with scale 'sample'"),
        (3, r"layers\.a: found 3; accepted: float, or a mapping"),
        (None, r"layers\.a: found None; accepted: float, or a mapping"),
        ("flaot", r"layers\.a: found 'flaot'; accepted: float, or a mapping"),
    ],
)
def test_mistakes_in_a_layer(layer: Any, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        load_plan({"version": 1, "layers": {"a": layer}})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("version: 2\n", "version: .*found 2"),
        ("default: float\n", "version: missing"),
        ("version: 1\nlayer: {}\n", "layer: unknown key; accepted: version, default, layers"),
        ("version: 1\nlayers: {a: float, a: float}\n", "the key 'a' stands twice"),
        ("version: 1\ndefault: {order: 1, scale: static, betas: [1.0]}\n", r"default\.betas: betas belong to a layer"),
        ("", "holds NoneType; accepted: a mapping"),
    ],
)
def test_mistakes_in_the_file_name_it(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=complaint) as caught:
        load_plan(path)
    assert str(caught.value).startswith(str(path))


def test_a_missing_file() -> None:
    with pytest.raises(UsageError, match=r"nowhere\.yaml: cannot be read: No such file"):
        load_plan("nowhere.yaml")


def test_unknown_layers_list_those_there_are_closest_first() -> None:
    plan = load_plan({"version": 1, "layers": {"layer1.con1": "float", "head": "float"}})
    plan.check_names(["layer1.con1", "head", "stem"])
    with pytest.raises(UsageError, match=r"no layer 'layer1\.con1' in the model; accepted: layer1\.conv1, stem, head"):
        plan.check_names(["stem", "head", "layer1.conv1"])


def test_order_boundaries() -> None:
    assert layer_config(1, "sample").order == 1
    assert layer_config(8, "sample").order == 8
    for order in (0, 9, 100, -1):
        with pytest.raises(UsageError, match="accepted: 1 to 8"):
            layer_config(order, "sample")
