"""NVIDIA's compiler: finding it, and what it compiles for."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from horq_tvm.errors import HorqError

INSTALL = "install it with: pip install 'horq-tvm[cuda]' (or NVIDIA's CUDA Toolkit 12 or 13), or set CUDA_HOME to one"
HOST_COMPILER = "nvcc needs a C++ compiler for its own headers (Debian, Ubuntu: apt install g++)"
SINCE: Mapping[int, str] = {75: "10.0", 80: "11.0", 86: "11.1", 87: "11.5", 89: "11.8", 90: "11.8"}
"""The first CUDA Toolkit that compiles for an architecture (its release notes)."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA Toolkit by its nvcc; `version` as nvcc states it, `archs` what it compiles for (86: sm_86)."""

    nvcc: Path
    version: str
    archs: frozenset[int]

    @property
    def root(self) -> Path:
        return self.nvcc.parent.parent

    def check(self, archs: Sequence[int]) -> None:
        """HorqError where nvcc is too old, or too new, for one of the architectures."""
        for arch in archs:
            if arch not in self.archs:
                known = ", ".join(f"sm_{known}" for known in sorted(self.archs))
                since = f"; sm_{arch} needs CUDA {SINCE[arch]} or newer" if arch in SINCE else ""
                raise HorqError(
                    f"{self.nvcc} is CUDA {self.version}, which does not compile for sm_{arch}; it has: {known}{since}"
                )

    def program(self, name: str) -> Path | None:
        """Another program of the toolkit (nvdisasm, cuobjdump), wherever a toolkit is; None where there is none."""
        beside = self.nvcc.with_name(name)
        found = (folder / name for folder in (beside.parent, *_folders()))
        on_path = shutil.which(name)
        return next((path for path in found if _runs(path)), Path(on_path) if on_path else None)


def find() -> Toolkit:
    """The toolkit of CUDA_HOME, else on PATH, of the Python packages, in /usr/local/cuda.

    HorqError where there is none, or CUDA_HOME names a folder without one.
    """
    home = os.environ.get("CUDA_HOME")
    if home:
        nvcc = Path(home) / "bin" / "nvcc"
        if not _runs(nvcc):
            raise HorqError(f"CUDA_HOME is {home}, which has no bin/nvcc; {INSTALL}")
        return _asked(nvcc)
    on_path = shutil.which("nvcc")
    candidates = [Path(on_path)] if on_path else []
    candidates += [folder / "nvcc" for folder in _folders()]
    found = next((path for path in candidates if _runs(path)), None)
    if found is None:
        raise HorqError(f"no CUDA compiler: nvcc is neither on PATH nor in {_searched()}; {INSTALL}")
    return _asked(found)


def _folders() -> Iterator[Path]:
    """Where programs of a toolkit may lie: of the Python packages, then of an installation."""
    for root in dict.fromkeys([sysconfig.get_paths()["purelib"], *site.getsitepackages(), site.getusersitepackages()]):
        yield from sorted(Path(root).glob("nvidia/cu*/bin"), reverse=True)
        yield Path(root) / "nvidia" / "cuda_nvcc" / "bin"
    yield Path("/usr/local/cuda/bin")


def libraries() -> Iterator[Path]:
    """Where libraries of a toolkit may lie."""
    for folder in _folders():
        yield from (folder.parent / "lib", folder.parent / "lib64")


def _searched() -> str:
    return f"CUDA_HOME, {sysconfig.get_paths()['purelib']}/nvidia or /usr/local/cuda"


def _runs(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def _asked(nvcc: Path) -> Toolkit:
    return _ask(nvcc, nvcc.stat().st_mtime_ns)


@lru_cache
def _ask(nvcc: Path, _changed: int) -> Toolkit:
    """What nvcc says of itself; kept as long as it is the same file. HorqError where it says nothing we understand."""
    version = re.search(r"release (\d+\.\d+)", _output(nvcc, "--version"))
    archs = re.findall(r"^sm_(\d+)$", _output(nvcc, "--list-gpu-code"), re.MULTILINE)
    if version is None or not archs:
        raise HorqError(f"{nvcc} does not tell its version and architectures as nvcc does; {INSTALL}")
    return Toolkit(_real(nvcc), version[1], frozenset(map(int, archs)))


def _real(nvcc: Path) -> Path:
    """The program itself where `nvcc` is a link or a script that names it: its toolkit lies beside it."""
    if nvcc.is_symlink():
        return nvcc.resolve()
    with nvcc.open("rb") as file:
        head = file.read(4096)
    named = re.search(rb"exec\s+\"?(/[^\s\"]*/nvcc)", head) if head.startswith(b"#!") else None
    return Path(os.fsdecode(named[1])) if named else nvcc


def _output(nvcc: Path, option: str) -> str:
    try:
        done = subprocess.run([nvcc, option], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HorqError(f"{nvcc} does not run: {error}") from error
    return done.stdout
