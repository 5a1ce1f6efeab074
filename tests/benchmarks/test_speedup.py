"""The sweep of the talk's figure: what is varied, what theory says, one record a point."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("tvm")
pytest.importorskip("onnxruntime")

from benchmarks import speedup
from benchmarks.fragments import Conv


def test_each_point_varies_one_thing() -> None:
    found = list(speedup.points(tuple(speedup.SWEEPS)))
    assert len(found) == sum(map(len, speedup.SWEEPS.values()))
    for point in found:
        changed = [
            point.order != speedup.MIDDLE_ORDER,
            *(getattr(point.conv, name) != getattr(speedup.MIDDLE, name) for name in ("channels", "kernel", "filters")),
        ]
        assert sum(changed) <= 1
        varied = {"order": point.order, "channels": point.conv.channels, "kernel": point.conv.kernel}
        assert {**varied, "outputs": point.conv.filters}[point.sweep] == point.value


def test_theory_by_hand() -> None:
    """C = 64, k = 3, F = 128: 73728 MACs against 1152 words, 128 scalings and 64 residuals a plane."""
    conv = Conv(14, 64, 128)
    assert speedup.theory(conv, 1) == pytest.approx(73728 / (1152 + 128 + 64))
    assert speedup.theory(conv, 4) == pytest.approx(speedup.theory(conv, 1) / 4)
    assert 63 < speedup.theory(Conv(14, 10**6, 10**6), 1) < 64  # the limit of wide layers is the word


def test_a_record_a_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(speedup, "MIDDLE", Conv(6, 32, 32))
    monkeypatch.setattr(speedup, "SWEEPS", {**speedup.SWEEPS, "order": (1, 2)})
    out = tmp_path / "speedup.json"
    assert speedup.main(["--sweeps", "order", "--seconds", "0.001", "--json", str(out)]) == 0
    records = json.loads(out.read_text())
    assert [(r["sweep"], r["value"], r["order"]) for r in records] == [("order", 1, 1), ("order", 2, 2)]
    for record in records:
        macs = record["plain_ms"] * record["ghz"] * 1e6
        size, _, channels = map(int, record["layer"].split("x"))
        assert macs == pytest.approx(size**2 * channels * record["filters"] * record["kernel"] ** 2)
        assert record["over_plain"] == pytest.approx(record["plain_ms"] / record["median_ms"])
    assert "1 MAC/cycle" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [("--sweeps depth", "accepted: order, channels, kernel, outputs"), ("--target zen6", "unknown target 'zen6'")],
)
def test_mistakes_in_the_call(words: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert speedup.main(words.split()) == 2
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert captured.err.count("\n") == 1
