"""Finding nvcc, and what is said where it is missing or does not compile for an architecture."""

from __future__ import annotations

from pathlib import Path

import pytest

import horq_tvm
from horq_tvm.cuda import toolkit
from horq_tvm.errors import HorqError
from tests.cuda.nvcc import pretend


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A machine without any toolkit."""
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(toolkit, "_folders", lambda: iter([tmp_path / "packages" / "bin"]))
    return monkeypatch


def test_cuda_home_comes_first_then_path_then_the_packages(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    packages, on_path, home = (pretend(tmp_path / name) for name in ("packages", "path", "home"))
    assert toolkit.find().nvcc == packages
    bare.setenv("PATH", f"{on_path.parent}:/usr/bin:/bin")
    assert toolkit.find().nvcc == on_path
    bare.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert toolkit.find().nvcc == home
    assert toolkit.find().archs == {75, 80, 90}
    assert toolkit.find().version == "13.0"


def test_a_script_on_path_leads_to_the_toolkit(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc = pretend(tmp_path / "cuda")
    script = tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
    script.chmod(0o755)
    bare.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
    assert toolkit.find().nvcc == nvcc
    assert toolkit.find().root == tmp_path / "cuda"


def test_no_toolkit_says_where_it_was_looked_for_and_what_to_install(bare: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        HorqError, match="no CUDA compiler: nvcc is neither on PATH nor in CUDA_HOME, .*pip install 'horq"
    ):
        toolkit.find()


def test_a_cuda_home_without_nvcc_is_not_passed_over(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(tmp_path / "packages")
    bare.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(HorqError, match=r"CUDA_HOME is .*nowhere, which has no bin/nvcc"):
        toolkit.find()


def test_a_program_that_is_no_nvcc(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc = pretend(tmp_path / "packages")
    nvcc.write_text("#!/bin/sh\necho hello\n")
    with pytest.raises(HorqError, match="does not tell its version and architectures"):
        toolkit.find()


def test_too_old_and_too_new(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(tmp_path / "packages", "11.0", "sm_70\\nsm_75\\nsm_80")
    old = toolkit.find()
    old.check([75, 80])
    with pytest.raises(
        HorqError, match=r"CUDA 11.0, which does not compile for sm_86; it has: sm_70, .*needs CUDA 11.1"
    ):
        old.check([75, 86])


@pytest.mark.parametrize(
    ("archs", "target", "message"),
    [
        ("", "cuda-sm86", "no CUDA compiler"),
        ("sm_70\\nsm_75", "cuda", "does not compile for sm_80; .* sm_80 needs CUDA 11.0 or newer"),
    ],
)
def test_build_says_so_before_it_looks_at_the_model(
    bare: pytest.MonkeyPatch, tmp_path: Path, archs: str, target: str, message: str
) -> None:
    if archs:
        pretend(tmp_path / "packages", archs=archs)
    with pytest.raises(HorqError, match=message):
        horq_tvm.build("no such file.onnx", target)
