"""`horq-tvm merge`: what is new is counted, what is wrong is one line, and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from horq_tvm import targets
from horq_tvm.cli import main
from horq_tvm.tuning.database import Database, Record

TARGET, KEY = targets.resolve("x86-64-v3"), "0123456789abcdef"


def database(folder: Path, *seeds: int) -> Database:
    found = Database.open(folder, create=True)
    for seed in seeds:
        found.append(TARGET, KEY, Record({"px": 7}, (1e-3,), seed=seed))
    return found


def test_two_into_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    database(tmp_path / "a", 1, 2)
    database(tmp_path / "b", 2, 3)
    call = ["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--into", str(tmp_path / "all")]
    assert main(call) == 0
    assert [record.seed for record in Database.open(tmp_path / "all").records(TARGET, KEY)] == [1, 2, 3]
    assert "2 new records of 1 kernels" in capsys.readouterr().out
    assert main([*call, "--json", "-"]) == 0
    assert [found["records"] for found in json.loads(capsys.readouterr().out)["merged"]] == [0, 0]


@pytest.mark.parametrize("what", ["nothing there", "itself", "another version", "a line that is no record"])
def test_what_is_wrong_changes_nothing(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, into = database(tmp_path / "a", 1), database(tmp_path / "all", 5)
    before = into.path(TARGET, KEY).read_bytes()
    given = {"nothing there": tmp_path / "none", "itself": into.folder}.get(what, source.folder)
    if what == "another version":
        (source.folder / "format.json").write_text('{"format": "horq-tvm tuning database", "version": 2}')
    if what == "a line that is no record":
        with source.path(TARGET, KEY).open("a") as file:
            file.write("oops\n")
    assert main(["merge", str(given), "--into", str(into.folder)]) in (1, 2)
    error = capsys.readouterr().err
    assert str(given) in error
    assert len(error.splitlines()) == 1
    assert into.path(TARGET, KEY).read_bytes() == before
