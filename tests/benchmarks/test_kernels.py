"""The command: records as interface.md fixes them, tables, and mistakes in the call. No test asks for a speed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("tvm")
pytest.importorskip("onnxruntime")

from benchmarks import kernels
from benchmarks.fragments import Conv

COMMON = {"layer", "engine", "order", "scale", "rest", "threads", "batch", "activation", "median_ms", "min_ms", "gmacs"}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "STAGES", (Conv(8, 64, 32),))
    monkeypatch.setattr(kernels, "FLOAT_CONVS", {"1x1": Conv(8, 32, 32, kernel=1)})
    monkeypatch.setattr(kernels, "MAX_POOL", Conv(8, 32, 32, stride=2))
    monkeypatch.setattr(kernels, "DENSE", (32, 16))


@pytest.mark.usefixtures("small")
def test_records_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kernels.json"
    words = ["--orders", "2", "--activations", "signed,relu", "--seconds", "0.001", "--json", str(out)]
    assert kernels.main(words) == 0
    records = json.loads(out.read_text())
    assert all(set(record) >= COMMON | {"kernel"} for record in records)
    bits = [(r["kernel"], r["activation"], r.get("outputs")) for r in records if r["kernel"] != "float_conv"]
    epilogues = [("conv+epilogue", "planes"), ("conv+epilogue", "planes+float")]
    assert bits == [
        ("conv", "signed", None),
        *((kernel, "signed", outputs) for kernel, outputs in epilogues),
        ("pack", "signed", None),
        ("conv", "relu", None),
        *((kernel, "relu", outputs) for kernel, outputs in epilogues),
    ]
    assert all(("fraction_of_peak" in record) == (record["kernel"] == "conv") for record in records)
    assert all(record["layer"] == "8x8x64" and record["order"] == 2 for record in records[:7])
    conv = records[0]
    assert conv["gmacs"] == pytest.approx(2 * 8 * 8 * 32 * 64 * 9 / conv["median_ms"] / 1e6)
    assert 0 < conv["min_ms"] <= conv["median_ms"]
    assert conv["macs_per_cycle"] > 0 < conv["ghz"]
    floats = [(record["layer"], record["engine"]) for record in records[7:]]
    assert floats == [(layer, e) for layer in ("8x8x32", "1x1x32", "8x8x32") for e in ("horq-tvm", "onnxruntime")]
    printed = capsys.readouterr().out
    assert "% of peak" in printed
    assert " a cycle" in printed
    assert "as fast as onnxruntime" in printed


@pytest.mark.usefixtures("small")
def test_json_to_standard_output_is_all_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep = tmp_path / "kept"
    words = ["--orders", "1", "--activations", "signed,relu", "--kinds", "bits", "--seconds", "0.001"]
    assert kernels.main([*words, "--json", "-", "--keep", str(keep)]) == 0
    records = json.loads(capsys.readouterr().out)
    assert {record["activation"] for record in records} == {"signed"}  # order 1 behind a ReLU computes nothing
    assert "8x8x64-K1-signed-conv.so" in {path.name for path in keep.iterdir()}


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--orders 0", "found '0'; accepted: orders from 1 to 8"),
        ("--orders 1,x", "found '1,x'"),
        ("--activations tanh", "found 'tanh'; accepted: signed, relu"),
        ("--kinds int8", "accepted: bits, float"),
        ("--threads 0", "found '0'"),
        ("--batch -1", "-1"),
        ("--seconds nan", "found 'nan'"),
        ("--target zen6", "unknown target 'zen6'"),
        ("--scales static", "--scales"),
    ],
)
def test_mistakes_in_the_call(words: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(words.split()) == 2
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_target_that_this_machine_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("version: 1\ntargets:\n  odd: {description: None has it, extends: x86-64, features: [xop]}\n")
    assert kernels.main(["--target", f"{own}:odd"]) == 2
    assert "lacks xop" in capsys.readouterr().err
