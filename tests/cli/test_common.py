"""Files in and out: whole or not at all, under any name."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import pytest

from horq_tvm.cli import common
from horq_tvm.errors import HorqError, UsageError


def test_npz_under_any_name(tmp_path: Path) -> None:
    arrays = {"file": np.arange(3), "a/b:0": np.float32(2.5), "x": np.zeros((0, 4), "uint32")}
    path = tmp_path / "out.npz"
    common.write_npz(str(path), arrays)
    back = common.read_npz(str(path))
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)
        assert back[name].dtype == array.dtype
    assert [file.name for file in tmp_path.iterdir()] == ["out.npz"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "out.npz"
    path.write_text("old")
    with pytest.raises(ValueError, match="Object arrays"):
        common.write_npz(str(path), {"x": np.array([object()])})
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["out.npz"]


def test_a_result_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    common.write_json(str(tmp_path / "a.json"), {})
    (tmp_path / "b.json").write_text("{}")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.json", "b.json")}
    assert len(modes) == 1


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        common.check_writable(str(tmp_path))
    with pytest.raises(HorqError, match="there is no folder"):
        common.check_writable(str(tmp_path / "missing" / "x"))


def test_npy_serves_one_input(tmp_path: Path) -> None:
    path = str(tmp_path / "x.npy")
    np.save(path, np.ones(3))
    assert list(common.read_inputs(path, ["image"])) == ["image"]
    with pytest.raises(UsageError, match="one array for 2 inputs; accepted: an .npz with a, b"):
        common.read_inputs(path, ["a", "b"])
    with pytest.raises(UsageError, match="accepted: an .npz keyed by input name"):
        common.read_npz(path)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04broken", b"\x93NUMPY\x01"])
def test_files_that_are_no_arrays(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"x\.npz: not an \.npz or \.npy of numeric arrays"):
        common.read_inputs(str(path), ["x"])


def test_pickles_are_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(UsageError, match="not an .npz or .npy of numeric arrays"):
        common.read_inputs(str(path), ["x"])


def test_table_aligns_numbers_to_the_right() -> None:
    text = common.table(("name", "n"), [("a", 5), ("bcdef", None), ("c", 100)])
    assert text.splitlines() == ["name     n", "a        5", "bcdef    -", "c      100"]
    assert common.table(("a", "b"), []) == "a  b"
