"""CUDA source as machine code of several architectures in one piece, and what ptxas says of each kernel."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from horq_tvm.errors import HorqError

from .architectures import occupancy
from .toolkit import HOST_COMPILER, Toolkit

PRELUDE = Path(__file__).parent.parent / "schedules" / "cuda" / "prelude.cuh"
MAGIC = b"\x50\xed\x55\xba"  # of a fatbin, 0xba55ed50
# Contraction to fused multiply-adds is nvcc's default and within the tolerance; approximate division is not.
_OPTIONS = ("--fatbin", "-O3", "-std=c++17", "--ptxas-options=-v", "-U__CUDA_NO_HALF_OPERATORS__")


@dataclass(frozen=True)
class Use:
    """What one kernel takes on one architecture: `registers` of a thread, bytes of shared memory and of spills."""

    kernel: str
    arch: int
    threads: int
    registers: int
    shared_bytes: int
    stack_bytes: int
    spilled_bytes: int

    @property
    def occupancy(self) -> float:
        """The share of a multiprocessor's warps that it can fill."""
        return occupancy(self.arch, self.threads, self.registers, self.shared_bytes)


@dataclass(frozen=True)
class Fatbin:
    """Machine code for every architecture, and what each kernel takes."""

    data: bytes
    uses: tuple[Use, ...]


def compile_source(source: str, archs: Sequence[int], toolkit: Toolkit, shared_bytes: int) -> Fatbin:
    """Machine code of `source`, which TVM generated, behind the prelude.

    `shared_bytes` is what a block may have, which bounds what the kernels ask for at launch besides.

    HorqError: nvcc has not all of the architectures; it has no C++ compiler; a kernel takes more shared memory than a
    block may have; anything else that nvcc says, by its first error.
    """
    toolkit.check(archs)
    with tempfile.TemporaryDirectory(prefix="horq-tvm-") as scratch:
        folder = Path(scratch)
        (folder / "kernels.cu").write_text(PRELUDE.read_text(encoding="utf-8") + source, encoding="utf-8")
        targets = [f"--generate-code=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        command = [str(toolkit.nvcc), *_OPTIONS, *targets, "-o", "kernels.fatbin", "kernels.cu"]
        # In the folder, by relative names: no path of this machine gets into what it makes.
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        log = done.stdout + done.stderr
        if done.returncode != 0:
            raise HorqError(_failure(toolkit, log, shared_bytes))
        data = (folder / "kernels.fatbin").read_bytes()
    if data[:4] != MAGIC:
        raise HorqError(f"{toolkit.nvcc} wrote no fatbin but a file that starts with {data[:4]!r}")
    uses = read_uses(log, threads_of(source))
    for use in uses:
        if use.shared_bytes > shared_bytes:
            raise HorqError(_too_large(use.kernel, use.shared_bytes, shared_bytes))
    return Fatbin(data, uses)


def extract(library: bytes) -> bytes:
    """The fatbin that a library of ours holds. HorqError where there is none.

    Its header is its magic, a version and the header's own size (two bytes each), and the size of the rest (eight).
    """
    at = library.find(MAGIC)
    if at < 0:
        raise HorqError("the library holds no fatbin; accepted: one that was built for a card")
    _version, header, size = struct.unpack_from("<HHQ", library, at + len(MAGIC))
    return library[at : at + header + size]


def threads_of(source: str) -> dict[str, int]:
    """The threads of a block of each kernel, from its launch bounds."""
    found = re.findall(r"__launch_bounds__\((\d+)[^)]*\)\s*(\w+)\(", source)
    return {name: int(threads) for threads, name in found}


_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+)(?:\+\d+)? bytes smem")


def read_uses(log: str, threads: Mapping[str, int]) -> tuple[Use, ...]:
    """What `ptxas -v` wrote, by architecture and kernel."""
    found = []
    entry: tuple[str, int] | None = None
    stack = (0, 0)
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            entry = (match[1], int(match[2]))
        elif match := _STACK.search(line):
            stack = (int(match[1]), int(match[2]) + int(match[3]))
        elif entry and (match := _REGISTERS.search(line)):
            name, arch = entry
            shared = _SHARED.search(line)
            shared_bytes = int(shared[1]) if shared else 0
            found.append(Use(name, arch, threads.get(name, 0), int(match[1]), shared_bytes, *stack))
            entry = None
    return tuple(sorted(found, key=lambda use: (use.arch, use.kernel)))


def _failure(toolkit: Toolkit, log: str, shared_bytes: int) -> str:
    """One line of what nvcc wrote."""
    shared = re.search(r"Entry function '(\w+)' uses too much shared data \((0x[0-9a-f]+) bytes", log)
    if shared:
        return _too_large(shared[1], int(shared[2], 16), shared_bytes)
    errors = [line for line in log.splitlines() if re.search(r"\b(error|fatal)\b", line)]
    first = (errors or log.strip().splitlines() or ["no message"])[0]
    no_host = "cc1plus" in log or "Failed to preprocess host compiler" in log or "No such file" in first
    return f"{toolkit.nvcc} failed: {first}" + (f"; {HOST_COMPILER}" if no_host else "")


def _too_large(kernel: str, found: int, accepted: int) -> str:
    return (
        f"kernel {kernel} takes {found} bytes of shared memory a block; accepted: {accepted}, the target's shared_kib"
    )
