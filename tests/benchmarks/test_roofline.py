"""The roofline on paper: bounds worked out by hand, and the layers that they are made for."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from benchmarks import roofline
from benchmarks.roofline import BINARY, CARDS, FLOAT16, INT8, Bound, Card, Shape, bounds, describe, horq_shapes

CARD = Card("card", binary=8.0, int8=1.0, float16=0.5, memory=100.0, source="made up")
LAYER = Shape("layer", inputs=8000, outputs=16000, weights=4000, macs=10**9)


@pytest.mark.parametrize(
    ("kind", "order", "shortcut", "moved"),
    [
        (BINARY, 1, False, 1000 + 2000 + 500),
        (BINARY, 3, False, 3 * (1000 + 2000) + 500),
        (BINARY, 2, True, 2 * (1000 + 2000) + 500 + 2 * 4 * 16000),
        (INT8, 1, False, 8000 + 4000 + 16000),
        (FLOAT16, 1, True, 2 * (8000 + 4000 + 2 * 16000)),
    ],
)
def test_a_bound_is_arithmetic_or_memory(kind: str, order: int, shortcut: bool, moved: int) -> None:
    bound = Bound.of(LAYER, CARD, kind, order, shortcut)
    terops = {BINARY: 8.0, INT8: 1.0, FLOAT16: 0.5}[kind]
    assert bound.tensor_us == pytest.approx(order * 2 * 10**9 / (terops * 1e12) * 1e6)
    assert bound.memory_us == pytest.approx(moved / 100e9 * 1e6)
    assert bound.us == max(bound.tensor_us, bound.memory_us)


def test_the_layers_are_the_networks_horq_layers(tmp_path: Path) -> None:
    shapes = horq_shapes("resnet20", 2, tmp_path)
    assert len(shapes) == 18
    first = shapes[0]
    assert first.label == "3×3 16→16, 32×32"
    assert (first.inputs, first.weights, first.macs) == (2 * 1024 * 16, 9 * 256, 2 * 1024 * 9 * 256)
    assert any(shape.label == "3×3/2 16→32, 16×16" for shape in shapes)


def test_the_sums_and_the_largest_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """By arithmetic alone, K planes at 8 times the rate of int8 take K/8 of its time."""
    monkeypatch.setattr(roofline, "CARDS", (Card("card", 4.0, 1.0, 0.5, 1e9, ""),))
    monkeypatch.setattr(roofline, "horq_shapes", lambda *_: [LAYER, LAYER])
    found = bounds("net", 1, (1, 2), Path())
    total = {r["order"]: r["us"] for r in found if r["layer"] == "all" and r["engine"] == BINARY and r["shortcut"]}
    assert total[2] == pytest.approx(2 * 2 * 2 * 10**9 / 4e12 * 1e6)
    text = describe(found, (1, 2))
    (row,) = [line.split() for line in text.splitlines() if line.startswith("card  yes")]
    assert row == ["card", "yes", "1e+03", "2e+03", "4e+03", "8e+03", "4"]


def test_binary_is_faster_than_int8_on_every_card() -> None:
    assert all(card.binary > card.int8 > card.float16 for card in CARDS)
    assert all(card.source for card in CARDS)
