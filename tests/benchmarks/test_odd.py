"""The network of odd channel counts: that they are odd, and that it is what the benchmarks take."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")

from benchmarks.networks import odd, subjects
from benchmarks.networks.arithmetic import layer_work
from horq_tvm.nn import HorqLayer

SMALLEST_VECTOR = 4


def test_no_vector_divides_the_channels_of_a_binary_layer() -> None:
    network = subjects.built(odd.NAME, 1, "static")
    filters = [layer.weight.shape[0] for layer in network.modules() if isinstance(layer, HorqLayer)]
    assert len(filters) == 27
    assert not any(count % SMALLEST_VECTOR == 0 for count in filters)


def test_it_is_a_subject_with_binary_and_float_layers(tmp_path: Path) -> None:
    (subject,) = subjects.find(odd.NAME, 1, ("signed",), "deployed", tmp_path)
    work = layer_work(subject, 2, "static", {})
    assert sum(layer.binary for layer in work.values()) == 27
    assert not work["blocks.0.body.depthwise"].binary
