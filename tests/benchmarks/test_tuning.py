"""The tuning benchmark: a curve of what a database holds, and its report as text."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")

from benchmarks import tuning
from horq_tvm import targets
from horq_tvm.tuning.database import Database, Record


def test_a_curve_of_the_workloads_with_enough_measurements(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    store, native = Database.open(tmp_path / "db", create=True), targets.resolve("native")
    for number in range(5):
        store.append(native, "a" * 16, Record({"px": number}, (1e-3 / (number + 1),), rule="direct_convolution"))
    store.append(native, "b" * 16, Record({"px": 1}, error="failed"))
    words = ["--database", str(tmp_path / "db"), "--curve", str(tmp_path / "curve.png")]
    assert tuning.main(words) == 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_database_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tuning.main(["--database", str(tmp_path / "none"), "--curve", str(tmp_path / "c.png")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_what_is_used_is_shipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Database.open(tmp_path / "db", create=True)
    pick = Record({"px": 7}, (1e-3,), kind="confirmation", default_seconds=(2e-3,), used=True)
    store.append(targets.resolve("x86-64-v3"), "key", pick)
    assert tuning.main(["--database", str(store.folder), "--ship", str(tmp_path / "out")]) == 0
    assert "1 records of 1 kernels" in capsys.readouterr().out
    assert Database.open(tmp_path / "out").records(targets.resolve("x86-64-v3"), "key") == (pick,)


def test_the_report_has_the_ratios_and_the_heaviest_step_first() -> None:
    layers = [
        {
            "step": name,
            "schedule": "tuned",
            "default_us": us,
            "tuned_us": us / 2,
            "over_default": 0.5,
            "floor_us": floor,
        }
        for name, us, floor in (("pad", 1.0, None), ("conv", 9.0, 3.0))
    ]
    record = {"network": "n", "order": 1, "target": "t", "rounds": 9, "default_ms": 2.0, "tuned_ms": 1.0}
    text = tuning.describe([{**record, "over_default": 0.5, "floor_ms": 0.8, "layers": layers}])
    assert "0.500" in text
    assert "1.25" in text
    assert text.index("conv") < text.index("pad ")
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith(("conv", "pad"))}
    assert rows["conv"][-2:] == ["3.0", "1.50"]
    assert rows["pad"][-2:] == ["-", "-"]
