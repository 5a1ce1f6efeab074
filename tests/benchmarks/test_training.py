"""The training benchmark on the smallest network: a record a variant, and steps that learn."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from benchmarks import training
from horq_tvm import zoo


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("how", [[], ["--compile"]])
def test_records(how: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    compile_, compiled = torch.compile, []

    def traced(model: torch.nn.Module, **options: Any) -> Any:
        compiled.append(model)
        return compile_(model, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", traced)
    call = ["--network", "mnist", "--orders", "1,2", "--batch", "2", "--seconds", "0.01", "--json", "-", *how]
    assert training.main(call) == 0
    records = json.loads(capsys.readouterr().out)
    assert [(r["order"], r["scale"]) for r in records] == [
        ("float", None),
        ("bw", None),
        *((order, scale) for order in (1, 2) for scale in ("patch", "sample", "static")),
    ]
    assert all(0 < r["min_ms"] <= r["median_ms"] and r["threads"] == 1 and r["batch"] == 2 for r in records)
    assert len(compiled) == (len(records) if how else 0)
    assert all(r["compile"] == bool(how) for r in records)


def test_table_divides_by_float() -> None:
    common = {"batch": 50, "scale": None}
    records = [
        {**common, "order": "float", "median_ms": 100.0},
        {**common, "order": 2, "scale": "patch", "median_ms": 250.0},
    ]
    assert training.table(records).splitlines()[2:] == [
        "| float | 100 | 1.00 | 500 |",
        "| K=2, patch | 250 | 2.50 | 200 |",
    ]


def test_a_step_moves_every_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    models = []
    build = zoo.build
    monkeypatch.setattr(zoo, "build", lambda *call: models.append(build(*call)) or models[0])
    step = training.step("mnist", 2, "static", training.How(4, bf16=False, compile=False))
    before = {name: value.clone() for name, value in models[0].named_parameters()}
    step()
    assert all(not torch.equal(before[name], value) for name, value in models[0].named_parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (["--orders", "0"], "found '0'; accepted: orders from 1 to 8, as in 1,2"),
        (["--network", "lenet"], "network 'lenet'; accepted: mnist"),
        (["--batch", "0"], "found '0'; accepted: a number from 1"),
        (["--seconds", "soon"], "found 'soon'; accepted: a number of seconds above 0"),
    ],
)
def test_mistakes(call: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert training.main([*call, "--json", "-"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("benchmarks.training: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
