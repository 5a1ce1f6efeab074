"""Arrays in and out: under any name, never a pickle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from horq_tvm.cli import arrays
from horq_tvm.errors import UsageError


def test_npz_under_any_name(tmp_path: Path) -> None:
    values = {"file": np.arange(3), "a/b:0": np.float32(2.5), "x": np.zeros((0, 4), "uint32")}
    path = tmp_path / "out.npz"
    arrays.write_npz(str(path), values)
    back = arrays.read_npz(str(path))
    assert list(back) == list(values)
    for name, array in values.items():
        np.testing.assert_array_equal(back[name], array)
        assert back[name].dtype == array.dtype


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Object arrays"):
        arrays.write_npz(str(tmp_path / "out.npz"), {"x": np.array([object()])})
    assert list(tmp_path.iterdir()) == []


def test_npy_serves_one_input(tmp_path: Path) -> None:
    path = str(tmp_path / "x.npy")
    np.save(path, np.ones(3))
    assert list(arrays.read_inputs(path, ["image"])) == ["image"]
    with pytest.raises(UsageError, match="one array for 2 inputs; accepted: an .npz with a, b"):
        arrays.read_inputs(path, ["a", "b"])
    with pytest.raises(UsageError, match="accepted: an .npz keyed by input name"):
        arrays.read_npz(path)


def test_npy_serves_one_output(tmp_path: Path) -> None:
    one, several = {"y": np.arange(3)}, {"y": np.arange(3), "z": np.ones(2)}
    arrays.write_outputs(str(tmp_path / "y.npy"), one)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), one["y"])
    arrays.write_outputs(str(tmp_path / "y.npz"), one)
    assert list(arrays.read_npz(str(tmp_path / "y.npz"))) == ["y"]
    with pytest.raises(UsageError, match="one array for 2 outputs; accepted: an .npz for y, z"):
        arrays.write_outputs(str(tmp_path / "z.npy"), several)
    assert not (tmp_path / "z.npy").exists()


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04broken", b"\x93NUMPY\x01"])
def test_files_that_are_no_arrays(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"x\.npz: not an \.npz or \.npy of numeric arrays"):
        arrays.read_inputs(str(path), ["x"])


def test_pickles_are_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(UsageError, match="not an .npz or .npy of numeric arrays"):
        arrays.read_inputs(str(path), ["x"])
