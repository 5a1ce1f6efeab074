"""The database on disk: what is written is read, by several at once, and what is no record loses nothing."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest

from horq_tvm import targets
from horq_tvm.errors import HorqError, UsageError
from horq_tvm.tuning import database
from horq_tvm.tuning.database import Best, Database, Merged, Record, shipped_database, target_key

TARGET = targets.resolve("x86-64-v3")
KEY = "0123456789abcdef"
RECORD = Record({"px": 7, "order": "pixels"}, (1e-3, 2e-3, 1.5e-3), rule="direct_convolution", seed=3, compiler="tvm 1")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store = Database.open(tmp_path / "db", create=True)
    failed = Record({"px": 9}, error="kernel k allocates a workspace")
    store.append(TARGET, KEY, RECORD)
    store.append(TARGET, KEY, failed)
    assert Database.open(tmp_path / "db").records(TARGET, KEY) == (RECORD, failed)
    assert store.records(TARGET, "another") == ()
    assert store.records(targets.resolve("x86-64-v4"), KEY) == ()
    assert RECORD.median == 1.5e-3
    assert failed.median == float("inf")


def test_a_target_is_what_is_compiled_for_and_not_its_name() -> None:
    assert target_key(replace(TARGET, name="native:haswell", description="mine")) == target_key(TARGET)
    assert target_key(replace(TARGET, mattr=("+avx512f",))) != target_key(TARGET)
    assert target_key(replace(TARGET, vector_registers=32)) != target_key(TARGET)


def test_only_the_last_confirmed_pick_is_used(tmp_path: Path) -> None:
    store = Database.open(tmp_path, create=True)
    assert store.best(TARGET, KEY) == Best(0, None)
    store.append(TARGET, KEY, RECORD)
    assert store.best(TARGET, KEY) == Best(1, None)
    confirmed = replace(RECORD, kind="confirmation", default_seconds=(2e-3,), used=True)
    store.append(TARGET, KEY, confirmed)
    assert store.best(TARGET, KEY) == Best(1, RECORD.decisions)
    store.append(TARGET, KEY, replace(confirmed, used=False))
    assert store.best(TARGET, KEY) == Best(1, None)


def _append(folder: Path, seed: int) -> None:
    store = Database.open(folder)
    for number in range(50):
        store.append(TARGET, KEY, replace(RECORD, seed=seed, decisions={"px": number}))


def test_tuners_at_once_lose_nothing(tmp_path: Path) -> None:
    store = Database.open(tmp_path, create=True)
    writers = [multiprocessing.get_context("fork").Process(target=_append, args=(tmp_path, i)) for i in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = store.records(TARGET, KEY)
    assert {(r.seed, r.decisions["px"]) for r in found} == {(i, n) for i in range(4) for n in range(50)}
    assert len(found) == 200


def test_merging_takes_what_is_missing_once(tmp_path: Path) -> None:
    mine, theirs = (Database.open(tmp_path / name, create=True) for name in ("mine", "theirs"))
    for store in (mine, theirs):
        store.append(TARGET, KEY, RECORD)
    theirs.append(TARGET, KEY, replace(RECORD, seed=4))
    theirs.append(targets.resolve("x86-64"), "other", RECORD)
    assert mine.merge(theirs) == Merged(2, 2)
    assert mine.merge(theirs) == Merged(0, 0)
    assert mine.records(TARGET, KEY) == theirs.records(TARGET, KEY)
    assert mine.records(targets.resolve("x86-64"), "other") == (RECORD,)
    assert json.loads((mine.path(targets.resolve("x86-64"), "other").parent / "target.json").read_text())["mcpu"]


def test_what_is_shipped_is_what_is_used(tmp_path: Path) -> None:
    store = Database.open(tmp_path / "db", create=True)
    confirmed = replace(RECORD, kind="confirmation", default_seconds=(2e-3,), used=True)
    for record in (RECORD, replace(confirmed, decisions={"px": 3}), confirmed):
        store.append(TARGET, KEY, record)
    store.append(TARGET, "measured", RECORD)
    assert store.ship(tmp_path / "shipped") == Merged(1, 1)
    shipped = Database.open(tmp_path / "shipped")
    assert shipped.records(TARGET, KEY) == (confirmed,)
    assert shipped.best(TARGET, KEY) == Best(0, RECORD.decisions)
    before = shipped.path(TARGET, KEY).read_bytes()
    store.ship(tmp_path / "shipped")
    assert shipped.path(TARGET, KEY).read_bytes() == before
    store.append(TARGET, KEY, replace(confirmed, used=False))
    assert store.ship(tmp_path / "shipped") == Merged(0, 0)


def test_shipping_into_itself_loses_nothing(tmp_path: Path) -> None:
    store = Database.open(tmp_path, create=True)
    for record in (RECORD, replace(RECORD, kind="confirmation", default_seconds=(2e-3,), used=True)):
        store.append(TARGET, KEY, record)
    before = store.path(TARGET, KEY).read_bytes()
    with pytest.raises(UsageError, match="is the database itself"):
        store.ship(tmp_path)
    assert store.path(TARGET, KEY).read_bytes() == before


def test_a_target_that_is_not_described_is_shipped_without_a_description(tmp_path: Path) -> None:
    store = Database.open(tmp_path / "db", create=True)
    store.append(TARGET, KEY, replace(RECORD, kind="confirmation", default_seconds=(2e-3,), used=True))
    (store.path(TARGET, KEY).parent / "target.json").unlink()
    assert store.ship(tmp_path / "shipped") == Merged(1, 1)
    assert not (Database.open(tmp_path / "shipped").path(TARGET, KEY).parent / "target.json").exists()


def test_the_package_ships_picks_alone() -> None:
    store = shipped_database()
    assert store is not None
    store.check()
    files = sorted(store.folder.glob("*/*.jsonl"))
    assert files
    assert sum(path.stat().st_size for path in store.folder.rglob("*.json*")) < 50_000
    for path in files:
        (line,) = path.read_text().splitlines()
        assert json.loads(line)["used"] is True


LINE = RECORD.to_line()
DAMAGED = {
    "line 2: no record (JSONDecodeError": LINE + "oops\n",
    "line 1: no record (ValueError: version 2": LINE.replace('"v":1', '"v":2'),
    "line 3: no record (KeyError": LINE * 2 + LINE.replace('"decisions"', '"decision"'),
    "line last: no record (it is cut off": LINE + LINE[:40],
    "line 1: no record (ValueError: seconds": LINE.replace("0.002", '"0.002"'),
    "line 1: no record (ValueError: decisions": LINE.replace('"px":7', '"px":7.5'),
    "line 1: no record (ValueError: kind": LINE.replace('"measurement"', '"rumour"'),
}


@pytest.mark.parametrize("message", DAMAGED)
def test_what_is_no_record_is_named_and_stays(tmp_path: Path, message: str) -> None:
    store = Database.open(tmp_path, create=True)
    path = store.path(TARGET, KEY)
    path.parent.mkdir()
    path.write_text(DAMAGED[message])
    with pytest.raises(HorqError) as failure:
        store.records(TARGET, KEY)
    assert message in str(failure.value)
    assert str(path) in str(failure.value)
    other = Database.open(tmp_path / "other", create=True)
    with pytest.raises(HorqError):
        other.merge(store)
    assert path.read_text() == DAMAGED[message]
    assert not other.path(TARGET, KEY).exists()


def test_nothing_is_appended_to_a_line_that_is_cut_off(tmp_path: Path) -> None:
    store = Database.open(tmp_path, create=True)
    store.append(TARGET, KEY, RECORD)
    path = store.path(TARGET, KEY)
    path.write_text(path.read_text() + "{")
    with pytest.raises(HorqError, match="cut off"):
        store.append(TARGET, KEY, RECORD)
    assert path.read_text() == LINE + "{"


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ('{"format": "horq-tvm tuning database", "version": 2}', HorqError, "of version 2; this horq-tvm reads"),
        ('{"version": 1}', HorqError, "does not say"),
        ("[", HorqError, "cannot be read"),
        (None, UsageError, "no format.json"),
    ],
)
def test_a_folder_that_is_no_database_of_this_version(
    tmp_path: Path, text: str | None, kind: type[HorqError], message: str
) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    if text is not None:
        (tmp_path / "format.json").write_text(text)
    for create in (False, True):
        with pytest.raises(kind, match=message):
            Database.open(tmp_path, create=create)
    assert sorted(p.name for p in tmp_path.iterdir()) == (["mine.txt"] if text is None else ["format.json", "mine.txt"])


def test_a_folder_that_is_missing_or_a_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such folder"):
        Database.open(tmp_path / "db")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="it is a file"):
        Database.open(tmp_path / "file", create=True)


def test_the_users_database_is_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HORQ_TVM_CACHE", str(tmp_path))
    assert database.user_database() is None
    Database.open(tmp_path / "tuning", create=True)
    found = database.user_database()
    assert found is not None
    assert found.folder == tmp_path / "tuning"
