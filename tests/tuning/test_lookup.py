"""Which database a build asks: the user's, and behind it the package's for kernels that the user's knows nothing of."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("tvm")

from tvm import te

from horq_tvm import compiler, targets
from horq_tvm.tuning.database import Database, Record
from horq_tvm.tuning.lookup import Lookup
from horq_tvm.tuning.tasks import workload_key

TARGET = targets.resolve("x86-64-v3")
x = te.placeholder((8, 64), name="x")
FUNC = te.create_prim_func([x, te.compute(x.shape, lambda i, j: x[i, j] + te.const(1, "float32"), name="y")])
PICK = Record({"lanes": 8}, (1e-3,), kind="confirmation", default_seconds=(2e-3,), used=True)


def lookup(folder: Path, own: Record | None, shipped: Record | None) -> Lookup:
    stores = []
    for name, record in (("own", own), ("shipped", shipped)):
        stores.append(Database.open(folder / name, create=True))
        if record is not None:
            stores[-1].append(TARGET, workload_key(FUNC), record)
    return Lookup(stores[0], TARGET, stores[1])


def test_the_packages_pick_where_the_user_has_none(tmp_path: Path) -> None:
    found = lookup(tmp_path, None, PICK)
    assert found.choose(FUNC)("lanes", [8, 16], 16) == 8
    assert found.of(FUNC) == (True, 0)


def test_what_the_user_measured_comes_first(tmp_path: Path) -> None:
    measured = Record({"lanes": 8}, (1e-3,))
    assert lookup(tmp_path, measured, PICK).choose(FUNC)("lanes", [8, 16], 16) == 16


def test_only_the_users_own_stale_record_is_reported(tmp_path: Path) -> None:
    for name, own, shipped, reported in (("a", None, PICK, []), ("b", PICK, None, [workload_key(FUNC)])):
        found = lookup(tmp_path / name, own, shipped) if not (tmp_path / name).mkdir() else None
        assert found is not None
        assert found.choose(FUNC)("lanes", [16, 32], 16) == 16
        assert not found.of(FUNC)[0]
        assert found.stale == reported


def test_a_build_asks_the_cache_and_the_package_but_a_given_database_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = {name: Database.open(tmp_path / name, create=True) for name in ("given", "cache", "package")}
    stores["package"].append(TARGET, workload_key(FUNC), PICK)
    monkeypatch.setattr(compiler, "user_database", lambda: stores["cache"])
    monkeypatch.setattr(compiler, "shipped_database", lambda: stores["package"])

    def chosen(folder: Path | None) -> object:
        return compiler._lookup(folder, TARGET).choose(FUNC)("lanes", [8, 16], 16)

    assert chosen(None) == 8
    assert chosen(stores["given"].folder) == 16
    stores["cache"].append(TARGET, workload_key(FUNC), Record({"lanes": 8}, (1e-3,)))
    assert chosen(None) == 16
