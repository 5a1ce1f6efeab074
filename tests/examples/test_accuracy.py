"""Tables and picture from made-up results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from examples import accuracy
from horq_tvm.errors import HorqError, UsageError

ROOT = Path(__file__).parent.parent.parent
PAGE = """Text.

<!-- cifar10 -->
old
<!-- /cifar10 -->
<!-- mnist --><!-- /mnist -->
<!-- estimators --><!-- /estimators -->
<!-- errors --><!-- /errors -->
<!-- engines --><!-- /engines -->
<!-- layers --><!-- /layers -->
<!-- steps --><!-- /steps -->
End.
"""


def _found(dataset: str, order: int | str, right: float, **changed: Any) -> dict[str, Any]:
    scale, seed = changed.get("scale", "static"), changed.get("seed", 0)
    errors = {"static": 0.5, "sample": 0.25, "patch": 0.125}
    points = [{"order": k, "scale": s, "error": e**k} for s, e in errors.items() for k in (1, 2)]
    return {
        "dataset": dataset,
        "network": "resnet20" if dataset == "cifar10" else "mnist",
        "order": order,
        "scale": "static",
        "seed": 0,
        "epochs": 3,
        "accuracy": right,
        "start": None,
        "approximation": points if order == "bw" else [],
        "command": f"train {dataset} --order {order} --scale {scale} --seed {seed}",
        "hardware": "a machine, 1 threads",
        "tag": "",
        **changed,
    }


RESULTS = {
    "resnet20-float-seed0": _found("cifar10", "float", 0.9),
    "resnet20-bw-seed0": _found("cifar10", "bw", 0.89, start="resnet20-float-seed0.pt"),
    "resnet20-k3-static-seed0": _found("cifar10", 3, 0.88, start="resnet20-float-seed0.pt"),
    "resnet20-k2-static-seed0": _found("cifar10", 2, 0.871, start="resnet20-k3-static-seed0.pt", epochs=2),
    "mnist-k1-static-seed0": _found("mnist", 1, 0.98),
    "mnist-k1-static-seed1": _found("mnist", 1, 0.982, seed=1),
    "mnist-k1-patch-seed0": _found("mnist", 1, 0.985, scale="patch"),
    "mnist-float-seed0": _found("mnist", "float", 0.99),
}


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "accuracy.md").write_text(PAGE)
    return folder


def _files(folder: Path, results: dict[str, Any]) -> list[Path]:
    for name, found in results.items():
        (folder / f"{name}.json").write_text(json.dumps(found))
    return [folder / f"{name}.json" for name in results]


def test_tables(docs: Path, tmp_path: Path) -> None:
    assert accuracy.update(_files(tmp_path, RESULTS), docs) == len(RESULTS)
    page = (docs / "accuracy.md").read_text()
    assert page.startswith("Text.\n\n<!-- cifar10 -->\n\n| network |")
    assert page.endswith("<!-- /steps -->\nEnd.\n")
    assert "old" not in page
    rows = [line for line in page.splitlines() if line.startswith("| resnet20")]
    assert rows == [
        "| resnet20 | float | 90.00 |  |  | 3 (3) |",
        "| resnet20 | binary weights, float activations (K → ∞) | 89.00 | 1.00 |  | 3 (6) |",
        "| resnet20 | HORQ K=3, static | 88.00 | 2.00 | ≤ 1.5 | 3 (6) |",
        "| resnet20 | HORQ K=2, static | 87.10 | 2.90 | ≤ 2.0 | 2 (8) |",
    ]
    # 2.0 and 1.8: mean 1.9, deviation 0.1·√2
    assert "| K=1 | 1.90 ± 0.14 (2) | – | 1.50 (1) | 1.96 |" in page
    assert "| float | 1.00 (1) | | | |" in page
    assert "| K=2 | 25.0 | 6.2 | 1.6 |" in page
    # Three of the four of two scales and two seeds: not all that a pattern would say.
    assert "train mnist --order 1 --scale patch --seed 0\n" in page
    assert "train mnist --order 1 --scale static --seed 1\n" in page
    assert "train cifar10 --order ORDER --scale static --seed 0\n    # ORDER: 2, 3\n" in page
    assert page.count("On a machine, 1 threads:") == 2


def test_estimators_stand_in_a_table_of_their_own() -> None:
    """At equal epochs and from the same start; what was made for it is in no other table and in no line."""
    found = {
        **RESULTS,
        "a": _found("mnist", 2, 0.99),
        "b": _found("mnist", 2, 0.98, ste="tanh"),
        "c": _found("mnist", 2, 0.97, ste="tanh", seed=1),
        "d": _found("mnist", 2, 0.96, beta="running"),
        "e": _found("cifar10", 2, 0.7, tag="ste", epochs=1),
        "f": _found("cifar10", 2, 0.6, tag="ste", epochs=1, ste="window"),
    }
    results = [accuracy.result(name, values) for name, values in found.items()]
    assert accuracy.estimators(results)[:6] == [
        "| test error, % | mnist, K=2, static, 3 epochs | resnet20, K=2, static, 1 epochs |",
        "|---|--:|--:|",
        "| `residual` | 1.00 (1) | 30.00 (1) |",
        "| `window` | – | 40.00 (1) |",
        "| `tanh` | 2.50 ± 0.71 (2) | – |",
        "| `residual`, running β | 4.00 (1) | – |",
    ]
    usual = [accuracy.result(name, values) for name, values in RESULTS.items()]
    assert accuracy.cifar10(results) == accuracy.cifar10(usual)
    assert [row for row in accuracy.mnist(results) if row.startswith("| K=2")] == ["| K=2 | 1.00 (1) | – | – | 1.25 |"]
    assert accuracy.estimators(usual) == ["No results yet."]


def test_made_again_from_what_it_keeps(docs: Path, tmp_path: Path) -> None:
    """The same bytes, picture included, without the files of the runs."""
    accuracy.update(_files(tmp_path, RESULTS), docs)
    first = {path.name: path.read_bytes() for path in docs.iterdir()}
    assert sorted(first) == ["accuracy.json", "accuracy.md", "accuracy.png"]
    assert first["accuracy.png"].startswith(b"\x89PNG")
    assert len(first["accuracy.png"]) < 100_000
    accuracy.update([], docs)
    assert {path.name: path.read_bytes() for path in docs.iterdir()} == first


def test_a_newer_result_takes_the_place_of_the_older(docs: Path, tmp_path: Path) -> None:
    accuracy.update(_files(tmp_path, RESULTS), docs)
    better = {"mnist-float-seed0": _found("mnist", "float", 0.995)}
    assert accuracy.update(_files(tmp_path, better), docs) == len(RESULTS)
    assert "| float | 0.50 (1) | | | |" in (docs / "accuracy.md").read_text()


def test_what_was_trained_for_longest_is_drawn_and_measured_against(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not averaged with what was not."""
    longer = _found("cifar10", "float", 0.95, start="resnet20-float-seed0.pt", epochs=4)
    again = _found("cifar10", 2, 0.94, tag="longer", epochs=9)
    found = {**RESULTS, "resnet20-float-seed0-longer": longer, "resnet20-k2-static-seed0-longer": again}
    results = [accuracy.result(name, values) for name, values in found.items()]
    levels: dict[str, float] = {}
    lines: dict[str, list[float]] = {}
    axis = type("Axis", (), {"set_title": lambda *a, **k: None})()
    axis.plot = lambda x, y, style, color, label: lines.update({label: y})
    axis.axhline = lambda y, label, **style: levels.update({label: y})
    accuracy._draw_cifar10(axis, [r for r in results if r.dataset == "cifar10"])
    assert levels == pytest.approx({"resnet20, float": 95, "resnet20, bw": 89})
    assert lines == {"resnet20, static": pytest.approx([94, 88])}
    rows = "\n".join(accuracy.cifar10(results))
    assert "| resnet20 | HORQ K=2, static | 87.10 | 7.90 |" in rows
    assert "| resnet20 | float | 95.00 |  |  | 4 (7) |" in rows


@pytest.mark.parametrize("content", ["", "[]", '{"dataset": "mnist"}'])
def test_file_that_is_no_result(docs: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(HorqError, match="x.json: found no measurements"):
        accuracy.update([tmp_path / "x.json"], docs)
    assert (docs / "accuracy.md").read_text() == PAGE


def test_mistakes(docs: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="found no results: .*accuracy.json is not there"):
        accuracy.update([], docs)
    with pytest.raises(UsageError, match="nothing.json: cannot be read"):
        accuracy.update([tmp_path / "nothing.json"], docs)
    with pytest.raises(UsageError, match="accuracy.md: there is no such page"):
        accuracy.update([], tmp_path)


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        (
            "<!-- svhn --><!-- /svhn -->",
            "a table 'svhn'; accepted: cifar10, mnist, estimators, errors, engines, layers, steps",
        ),
        ("<!-- mnist -->", "found 1 marks of tables of which 0 are closed"),
    ],
)
def test_marks(docs: Path, tmp_path: Path, mark: str, message: str) -> None:
    (docs / "accuracy.md").write_text(mark)
    with pytest.raises(UsageError, match=message):
        accuracy.update(_files(tmp_path, RESULTS), docs)


def test_the_page_is_what_its_results_make() -> None:
    """The committed tables are not edited by hand."""
    page = (ROOT / "docs/accuracy.md").read_text()
    assert accuracy.with_tables(page, accuracy.load(ROOT / "docs/accuracy.json")) == page


def test_engines_and_steps(docs: Path, tmp_path: Path) -> None:
    counts = {"images": 200, "equal_predictions": 199, "flipped": 4, "equal_predictions_unflipped": 196}
    engines: list[dict[str, Any]] = [{"network": "n", "engines": ["a", "b"], **counts, "worst": 2e-7}]
    signs = {"signs": 2_000_000, "doubtful": 7, "differing": 3, "wrong": 1}
    outputs = {"outputs": 1000, "outside": 0, "worst": 0.5, "means": 1e-7}
    engines.append({"network": "n", "engine": "b", "images": 200, **signs, **outputs})
    common = {"network": "n", "batch": 64, "threads": 1, "bf16": False, "compile": False}
    variants = [("float", None, 10.0), ("bw", None, 11.0), (2, "patch", 25.0)]
    steps = [{**common, "order": order, "scale": scale, "median_ms": ms} for order, scale, ms in variants]
    steps += [{**steps[0], "compile": True, "median_ms": 5.0}]
    files = _files(tmp_path, {"engines": engines, "steps": steps, **RESULTS})
    accuracy.update(files, docs)
    page = (docs / "accuracy.md").read_text()
    assert "| n | a and b | 99.50 % | 2.00 % | 196 of 196, 2.0e-07 |" in page
    assert "| n | b | 2.00e+06 | 7 | 2 | 1 | 1.00e+03 | 0 | 0.50 |" in page
    assert "| a training step | n, batch 64, 1 thread, float32 | n, batch 64, 1 thread, float32, compiled |" in page
    assert "| float | 10 ms (1.00 ×) | 5 ms (1.00 ×) |" in page
    assert "| binary weights, float activations | 11 ms (1.10 ×) | – |" in page
    assert "| K=2, patch | 25 ms (2.50 ×) | – |" in page
    accuracy.update(_files(tmp_path, {"engines": [{**engines[0], "flipped": 2}]}), docs)
    assert "| n | a and b | 99.50 % | 1.00 % | 196 of 198, 2.0e-07 |" in (docs / "accuracy.md").read_text()


def test_command_line(docs: Path) -> None:
    command = [sys.executable, "examples/accuracy.py", "nothing.json", "--docs", str(docs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "accuracy.py: nothing.json: cannot be read: No such file or directory\n"
