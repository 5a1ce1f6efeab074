"""Tuning from end to end: what is asked for is measured, kept, gone on with, confirmed and built with.

Most of it runs with a worker whose times are made up from the kernel, so that it takes no time and no noise.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("tvm")
pytest.importorskip("xgboost")

import tvm_ffi
from tvm import tirx

import horq_tvm
from horq_tvm import pipeline, targets
from horq_tvm.cli import main
from horq_tvm.errors import HorqError, UsageError
from horq_tvm.schedules.decisions import Recorded
from horq_tvm.tuning import api, candidates, confirm, tasks
from horq_tvm.tuning.database import Database, Record
from horq_tvm.tuning.measure import Worker, without_outliers
from horq_tvm.tuning.search import Search
from horq_tvm.tuning.worker import Answer
from tests.end_to_end.drawn import Drawn, canonical
from tests.schedules.test_decisions import float_network

NATIVE = targets.resolve("native")
TRIALS = 26


def made_up(func: tirx.PrimFunc) -> float:
    """Seconds that depend on the schedule alone, within a factor of 2."""
    return (1 + (tvm_ffi.structural_hash(func) & 0xFFFF) / 0xFFFF) * 1e-3


class Fake:
    """A Worker without a process. `fail_after` measurements it is interrupted; `slow` makes every pick lose."""

    fail_after = 10**9
    slow = False
    measured = 0

    def __init__(self, *_: Any) -> None: ...
    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *_: object) -> None: ...

    def measure(self, func: tirx.PrimFunc) -> Answer:
        if Fake.measured >= Fake.fail_after:
            raise KeyboardInterrupt
        Fake.measured += 1
        return Answer([[made_up(func)] * 3], 0.1, 0.1)

    def compare(self, funcs: Sequence[tirx.PrimFunc]) -> Answer:
        times = [made_up(func) for func in funcs]
        return Answer([[t] * 3 for t in (sorted(times, reverse=True) if Fake.slow else times)])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    monkeypatch.setattr(api, "Worker", Fake)
    monkeypatch.setattr(Fake, "measured", 0)
    monkeypatch.setattr(Fake, "fail_after", 10**9)
    monkeypatch.setattr(Fake, "slow", False)
    return Fake


def lines(folder: Path) -> list[dict[str, Any]]:
    """Every record, in the order of files and lines."""
    return [json.loads(line) for path in sorted(folder.glob("*/*.jsonl")) for line in path.read_text().splitlines()]


def measurements(folder: Path) -> list[dict[str, Any]]:
    return [record for record in lines(folder) if record["kind"] == "measurement"]


def tune(folder: Path, trials: int = TRIALS, **options: Any) -> api.TuneReport:
    return horq_tvm.tune(float_network(), order="float", trials=trials, database=folder, **options)


def test_as_many_measurements_as_asked_for_and_no_point_twice(fake: type[Fake], tmp_path: Path) -> None:
    report = tune(tmp_path / "db")
    found = measurements(tmp_path / "db")
    assert len(found) == report.added == TRIALS
    points = [(r["rule"], json.dumps(r["decisions"]), r["seconds"][0]) for r in found]
    assert len(set(points)) == TRIALS
    assert sum(task.records for task in report.tasks) == TRIALS
    assert all(task.records >= 1 for task in report.tasks)
    assert {layer for task in report.tasks for layer in task.layers} >= {"stem", "dw", "pw"}
    by_workload = {task.workload: task for task in report.tasks}
    for path in (tmp_path / "db").glob("*/*.jsonl"):
        records = [Record.from_line(line) for line in path.read_text().splitlines()]
        best = min((r for r in records if r.kind == "measurement"), key=lambda r: r.median)
        task = by_workload[path.stem]
        assert task.best_ms == pytest.approx(best.median * 1e3)
        assert task.used == (best.median < confirm.FASTER * records[0].median)
    assert any(task.used for task in report.tasks)


def test_the_same_seed_measures_the_same_and_another_does_not(fake: type[Fake], tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        tune(tmp_path / name, seed=seed)
    first, second, third = (lines(tmp_path / name) for name in "abc")
    assert first == second
    assert [r["decisions"] for r in first] != [r["decisions"] for r in third]


def test_an_interrupted_run_goes_on_where_it_was(fake: type[Fake], tmp_path: Path) -> None:
    fake.fail_after = 11
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path)
    assert len(measurements(tmp_path)) == 11
    fake.fail_after = 10**9
    assert tune(tmp_path).added == TRIALS - 11
    assert fake.measured == TRIALS == len(measurements(tmp_path))
    assert tune(tmp_path).added == 0


def test_a_build_takes_what_was_confirmed_and_says_so(fake: type[Fake], tmp_path: Path) -> None:
    report = tune(tmp_path / "db")
    x = np.random.default_rng(0).standard_normal((1, 3, 44, 60)).astype("float32")
    model = float_network()
    plain = horq_tvm.build(model, order="float")
    tuned = horq_tvm.build(model, order="float", database=tmp_path / "db")
    np.testing.assert_allclose(tuned(x)["y"], plain(x)["y"], rtol=1e-4, atol=1e-3)
    assert tuned.library.read_bytes() != plain.library.read_bytes()
    assert all(layer["schedule"] == "default" and layer["records"] == 0 for layer in plain.report["layers"])
    by_layer = {layer: task for task in report.tasks for layer in task.layers}
    for layer in tuned.report["layers"]:
        task = by_layer[layer["name"]]
        assert (layer["schedule"] == "tuned", layer["records"]) == (task.used, task.records), layer


def test_a_pick_that_is_not_faster_is_not_used(fake: type[Fake], tmp_path: Path) -> None:
    fake.slow = True
    assert not any(task.used for task in tune(tmp_path).tasks)
    confirmed = [record for record in lines(tmp_path) if record["kind"] == "confirmation"]
    assert confirmed
    assert not any(record["used"] for record in confirmed)
    built = horq_tvm.build(float_network(), order="float", database=tmp_path)
    assert {layer["schedule"] for layer in built.report["layers"]} == {"default"}
    assert built.library.read_bytes().count(b"default") == len(built.report["layers"])


def test_faster_is_faster_at_its_best_too() -> None:
    quick, slow, disturbed = (1.0, 1.01, 1.02), (1.1, 1.11, 1.12), (1.0, 3.0, 3.1)
    assert confirm.faster(quick, slow)
    assert not confirm.faster(slow, quick)
    assert not confirm.faster(quick, disturbed)
    assert not confirm.faster(disturbed, slow)


def test_a_stale_record_is_reported_and_the_default_taken(fake: type[Fake], tmp_path: Path) -> None:
    tune(tmp_path)
    for path in tmp_path.glob("*/*.jsonl"):
        path.write_text(path.read_text().replace('"px":', '"pixels":'))
    with pytest.warns(UserWarning, match="kernels of the tuning database were measured with other schedules"):
        built = horq_tvm.build(float_network(), order="float", database=tmp_path)
    assert {layer["schedule"] for layer in built.report["layers"] if layer["name"] in ("stem", "pw")} == {"default"}


def test_minutes_end_a_run(fake: type[Fake], tmp_path: Path) -> None:
    assert tune(tmp_path, minutes=1e-9).added == 0


def test_progress_tells_the_task_the_best_and_what_is_left(fake: type[Fake], tmp_path: Path) -> None:
    seen: list[api.Progress] = []
    tune(tmp_path, progress=seen.append)
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert seen[-1].done == TRIALS
    measured = [p for p in seen if p.best_ms is not None and p.default_ms is not None]
    assert measured
    assert all(p.best_ms <= p.default_ms for p in measured if p.best_ms and p.default_ms)
    assert any(p.left_s is not None for p in seen)


def test_a_task_is_the_same_whatever_its_names_and_each_kind_once() -> None:
    def extracted(layers: Sequence[Drawn]) -> list[tasks.Task]:
        configs = {f"L{i}": layer.config(unit=False) for i, layer in enumerate(layers)}
        mod = pipeline.rewrite(configs)(canonical(layers, unit=False))
        with NATIVE.tvm_target():
            return tasks.extract(pipeline.kernels(NATIVE)(pipeline.optimise(NATIVE)(mod)), NATIVE, {})

    small, large = (Drawn(32, 32, 1, "static", size=(1, s, s), kernel=(3, 3)) for s in (6, 9))
    alone, both = extracted([small]), extracted([large, small, small])
    keys = {task.workload: task.calls for task in both}
    assert {task.workload for task in alone} <= keys.keys()
    conv = next(task for task in alone if "bitserial" in task.name)
    assert keys[conv.workload] == 2
    assert both[0].work * both[0].calls == max(task.work * task.calls for task in both)


def test_the_model_finds_what_is_fast(tmp_path: Path) -> None:
    """Seconds that grow with every step away from one tile: the search does better than as many draws at random."""
    layers = [Drawn(64, 64, 1, "static", size=(1, 14, 14), kernel=(3, 3))]
    mod = pipeline.rewrite({"L0": layers[0].config(unit=False)})(canonical(layers, unit=False))
    with NATIVE.tvm_target():
        found = tasks.extract(pipeline.kernels(NATIVE)(pipeline.optimise(NATIVE)(mod)), NATIVE, {})
    conv = next(task for task in found if task.rule == "direct_convolution")

    def seconds(decisions: Any) -> float:
        return 1e-3 * (1 + abs(decisions["px"] * decisions["q"] - 12) + 0.1 * decisions["rows"])

    search = Search([conv], NATIVE, Database.open(tmp_path, create=True), seed=0)
    while len(search.states[0].measured) < 40:
        state, batch = search.next(40 - len(search.states[0].measured)) or pytest.fail("the space is small")
        search.add(state, [(c, Record(dict(c.decisions), (seconds(c.decisions),) * 3)) for c in batch])
    rng = random.Random(0)
    at_random = [seconds(candidates.sampled(conv.func, NATIVE, rng).decisions) for _ in range(40)]
    assert search.states[0].best is not None
    later = list(search.states[0].measured.values())[20:]
    assert np.median([r.median for r in later]) < np.median(at_random)
    assert search.states[0].best.median <= min(at_random)


# --- Measuring --------------------------------------------------------------------------------------------------------


def test_outliers_are_discarded_and_the_rest_is_kept() -> None:
    assert without_outliers([1.0, 1.01, 0.99, 1.02, 9.0, 1.0]) == (1.0, 1.01, 0.99, 1.02, 1.0)
    assert without_outliers([1.0, 1.0, 1.0, 1.009, 1.5]) == (1.0, 1.0, 1.0, 1.009)
    assert without_outliers([2.0]) == (2.0,)


def kernel() -> candidates.Candidate:
    layers = [Drawn(32, 32, 1, "static", size=(1, 8, 8), kernel=(3, 3))]
    mod = pipeline.rewrite({"L0": layers[0].config(unit=False)})(canonical(layers, unit=False))
    with NATIVE.tvm_target():
        algorithms = pipeline.kernels(NATIVE)(pipeline.optimise(NATIVE)(mod))
    func = next(f for g, f in algorithms.functions_items() if "bitserial" in g.name_hint)
    return candidates.default(func, NATIVE)


def test_one_process_measures_and_another_takes_over_when_it_is_killed() -> None:
    made = kernel()
    with Worker(NATIVE) as worker:
        first, second = worker.measure(made.func), worker.compare([made.func, made.func])
        assert first.error is second.error is None
        assert [len(samples) > 3 for samples in second.seconds] == [True, True]
        assert worker.starts == 1
        assert worker._process is not None
        os.kill(worker._process.pid, signal.SIGKILL)
        assert worker.measure(made.func).error == "the measuring process ended (9)"
        again = worker.measure(made.func)
        assert again.error is None
        assert worker.starts == 2


def test_what_takes_too_long_is_a_failed_measurement() -> None:
    with Worker(NATIVE, timeout_s=0.01) as worker:
        assert "took longer than 0.01 s" in str(worker.measure(kernel().func).error)


# --- Mistakes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> str:
    onnx.save(float_network(), tmp_path / "m.onnx")
    return str(tmp_path / "m.onnx")


def complaint(words: Sequence[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_damaged_database_fails_a_build_and_a_run_and_stays(
    fake: type[Fake], tmp_path: Path, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "db"
    tune(folder)
    damaged = max(folder.glob("*/*.jsonl"), key=lambda p: p.stat().st_size)
    text = damaged.read_text()[:-30] + "\n"
    damaged.write_text(text)
    words = [path, "--order", "float", "--database", str(folder)]
    assert "no record" in complaint(["build", *words, "-o", str(tmp_path / "m.so")], 1, capsys)
    assert "no record" in complaint(["tune", *words, "--trials", "50"], 1, capsys)
    assert damaged.read_text() == text


def test_nothing_to_tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "schedule", lambda func, target, decide: tasks_schedule(func, target, Recorded({})))
    with pytest.raises(UsageError, match="nothing to tune"):
        tune(tmp_path)


tasks_schedule = tasks.schedule


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 0}, "trials: found 0; accepted: a number from 1"),
        ({"minutes": 0}, "minutes: found 0"),
        ({"target": "aarch64-or-so"}, "unknown target"),
        ({"rpc": "localhost"}, "an address and a key go together"),
        ({"rpc": "localhost", "key": "board"}, "found 'localhost'; accepted: HOST:PORT"),
    ],
)
def test_mistaken_calls(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        tune(tmp_path / "db", **options)
    assert not (tmp_path / "db").exists()


def test_no_tracker() -> None:
    with pytest.raises(HorqError, match="no RPC tracker answers at 127.0.0.1:9"):
        tune(Path("never"), rpc="127.0.0.1:9", key="board")


# --- Whole runs -------------------------------------------------------------------------------------------------------


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.05)


@pytest.mark.slow
def test_killed_twice_and_resumed_nothing_is_missing(tmp_path: Path, path: str) -> None:
    folder = tmp_path / "db"
    words = ["tune", path, "--order", "float", "--trials", "20", "--database", str(folder)]
    command = [sys.executable, "-m", "horq_tvm", *words]
    for least in (5, 12):
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        wait_for(lambda least=least, run=run: len(measurements(folder)) >= least or run.poll() is not None)  # type: ignore[misc]
        run.kill()
        run.communicate()
    subprocess.run(command, check=True, capture_output=True)
    assert len(measurements(folder)) == 20
