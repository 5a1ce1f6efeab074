"""The instructions of a fatbin, by cuobjdump: whether a kernel really has what its source asks for."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from horq_tvm.errors import HorqError

from .toolkit import INSTALL, Toolkit

COUNTING = ("BMMA", "IMMA", "HMMA", "POPC")
"""What bits, or products of small integers or halves, are counted with, the strongest first."""

Instructions = Mapping[str, int]
"""How often a kernel has an instruction, its modifiers left out."""


def instructions(fatbin: bytes, toolkit: Toolkit) -> dict[tuple[str, int], Instructions]:
    """The instructions of each kernel on each architecture. HorqError: cuobjdump or nvdisasm is missing, or fails."""
    programs = {name: toolkit.program(name) for name in ("cuobjdump", "nvdisasm")}
    for name, path in programs.items():
        if path is None:
            raise HorqError(f"no {name} beside {toolkit.nvcc} or on PATH; {INSTALL}")
    cuobjdump, nvdisasm = (Path(path) for path in programs.values() if path is not None)
    search = os.pathsep.join([str(nvdisasm.parent), os.environ.get("PATH", "")])
    with tempfile.TemporaryDirectory(prefix="horq-tvm-") as folder:
        path = Path(folder) / "kernels.fatbin"
        path.write_bytes(fatbin)
        done = subprocess.run(
            [cuobjdump, "-sass", path], capture_output=True, text=True, check=False, env={**os.environ, "PATH": search}
        )
    if done.returncode != 0:
        first = (done.stderr.strip().splitlines() or ["no message"])[0]
        raise HorqError(f"{cuobjdump} failed (exit status {done.returncode}): {first}")
    return read_listing(done.stdout)


_ARCH = re.compile(r"code for sm_(\d+)")
_FUNCTION = re.compile(r"Function : (\w+)")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")


def read_listing(listing: str) -> dict[tuple[str, int], Instructions]:
    """What `cuobjdump -sass` wrote."""
    found: dict[tuple[str, int], Counter[str]] = {}
    arch = 0
    kernel: Counter[str] = Counter()
    for line in listing.splitlines():
        if match := _ARCH.search(line):
            arch = int(match[1])
        elif match := _FUNCTION.search(line):
            kernel = found.setdefault((match[1], arch), Counter())
        elif match := _INSTRUCTION.search(line):
            kernel[match[1]] += 1
    return dict(found)


def counting(of: Instructions) -> str:
    """The instruction that does a kernel's work, "" where it counts nothing."""
    return next((name for name in COUNTING if of.get(name)), "")
