"""What stands around a benchmark's work: mistakes before it, records after it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from benchmarks.command import deliver, execute


def with_json() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json")
    return parser


def test_a_json_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[argparse.Namespace] = []
    assert execute("any", with_json(), ran.append, ["--json", str(tmp_path / "nowhere" / "out.json")]) != 0
    assert ran == []
    assert capsys.readouterr().err.startswith("benchmarks.any: error: ")


@pytest.mark.parametrize("to_file", [True, False])
def test_records_go_to_the_file_or_alone_to_standard_output(
    to_file: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    deliver([{"a": 1}], str(out) if to_file else "-", lambda records: f"{len(records)} record")
    printed = capsys.readouterr().out
    assert json.loads(out.read_text() if to_file else printed) == [{"a": 1}]
    assert ("1 record" in printed) == to_file
