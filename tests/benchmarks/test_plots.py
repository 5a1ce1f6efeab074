"""Pictures of records: what is drawn is what the records say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from benchmarks import plots


def network(order: int, **more: Any) -> dict[str, Any]:
    spent = {name: float(i + 1) for i, name in enumerate(plots.COLOURS)}
    setting = {"network": "net", "threads": 1, "batch": 1, "order": order, "scale": "static", "rest": "float32"}
    times = {"median_ms": 28.0, "speedup": {"onnxruntime": 2.0}, "floor_ms": {"binary": 4.0, "float32": 5.0}}
    return {**setting, "activation": "signed", "breakdown_ms": spent, **times, **more}


def point(sweep: str, value: int) -> dict[str, Any]:
    return {
        "sweep": sweep,
        "value": value,
        "theory": 60 / value,
        "over_plain": 600 / value,
        "over_onnxruntime": 20 / value,
    }


def test_bars_stack_the_classes_beside_the_floor() -> None:
    peer = {"network": "net", "threads": 1, "batch": 1, "engine": "onnxruntime"}
    (axis,) = plots.bars([network(1), peer, network(2)]).axes
    widths = {container.get_label(): [bar.get_width() for bar in container] for container in axis.containers}
    assert widths == {name: [i + 1.0] * 2 for i, name in enumerate(plots.COLOURS)}
    ends = [bar.get_x() + bar.get_width() for bar in axis.containers[-1]]
    assert ends == [28.0, 28.0]
    assert [line.get_xdata()[0] for line in axis.lines] == [9.0, 9.0]
    assert next(label.get_text() for label in axis.get_yticklabels()).startswith("K=1 static")


def test_a_panel_a_setting_and_no_bar_to_the_left_of_zero() -> None:
    figure = plots.bars(
        [network(1), network(1, threads=2, breakdown_ms=dict.fromkeys(plots.COLOURS, 1.0) | {"other": -1})]
    )
    assert len(figure.axes) == 2
    assert all(bar.get_width() >= 0 for axis in figure.axes for container in axis.containers for bar in container)


def test_a_panel_a_sweep_with_theory_and_both_measurements() -> None:
    figure = plots.speedup([point("order", 1), point("order", 2), point("kernel", 3), point("kernel", 5)])
    assert [axis.get_xlabel() for axis in figure.axes] == ["order K", "kernel size"]
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [[60, 30], [600, 300], [20, 10]]


def test_every_sweep_and_class_that_is_measured_can_be_drawn() -> None:
    pytest.importorskip("tvm")
    from benchmarks.networks.breakdown import CLASSES
    from benchmarks.speedup import SWEEPS

    assert set(plots.COLOURS) == set(CLASSES)
    assert set(plots.SWEEP_TITLES) == set(SWEEPS)


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "records.json").write_text(json.dumps([network(1), network(2)]))
    pictures = []
    for name in ("a.png", "b.png"):
        assert plots.main(["bars", str(tmp_path / "records.json"), str(tmp_path / name)]) == 0
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] == pictures[1]
    assert pictures[0].startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("kind", "text", "complaint"),
    [
        ("bars", "[]", "no record with breakdown_ms"),
        ("bars", "{}", "found a dict; accepted: a list of records"),
        ("speedup", "[{}]", "records without sweep"),
        ("speedup", "no json", "cannot be read"),
        ("pie", "[]", "invalid choice: 'pie'"),
    ],
)
def test_mistakes_in_the_call(
    kind: str, text: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "records.json").write_text(text)
    assert plots.main([kind, str(tmp_path / "records.json"), str(tmp_path / "out.png")]) == 2
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out.png").exists()
