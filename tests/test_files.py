"""Files in place whole or not at all."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from horq_tvm.errors import HorqError, UsageError
from horq_tvm.files import check_writable, replacing


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("old")
    with pytest.raises(ValueError, match="midway"), replacing(path) as partial:  # noqa: PT012
        partial.write_text("new, but half")
        raise ValueError("midway")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_result_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as partial:
        partial.write_text("")
    (tmp_path / "b").write_text("")
    assert len({stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"}) == 1


def test_what_is_read_is_not_written(tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    source.write_text("weights")
    link = tmp_path / "link"
    link.symlink_to(source)
    for path in (source, link, tmp_path / "." / "model.onnx"):
        with pytest.raises(UsageError, match="the call names it twice; accepted: a name of its own"):
            check_writable(path, sources=[None, "elsewhere", source])
    check_writable(tmp_path / "model.so", sources=[None, source])


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(HorqError, match="is a folder; accepted: the name of a file"):
        check_writable(tmp_path)
    with pytest.raises(HorqError, match=r"cannot write .*missing/x: there is no folder .*missing"):
        check_writable(tmp_path / "missing" / "x")
    with pytest.raises(HorqError, match="cannot write /dev/null: it is a device or pipe"):
        check_writable("/dev/null")
    with pytest.raises(HorqError, match="File name too long"), replacing(tmp_path / ("x" * 255)):
        pytest.fail("the block must not run")


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    with replacing(tmp_path / "link") as partial:
        partial.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "file").read_text() == "new"
