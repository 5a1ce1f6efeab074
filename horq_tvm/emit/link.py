"""The C compiler: finding it, and one call that makes a library of the runtime, the model and the kernels."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from horq_tvm.errors import HorqError

RUNTIME = Path(__file__).resolve().parent.parent / "runtime"
COMMON_SOURCES = ("horq.c", "pool.c")
CPU_SOURCES = {"x86": "cpu_x86.c", "arm": "cpu_arm.c"}
"""The source that asks the CPU for features, by architecture family."""

# The runtime is compiled for the architecture's baseline (no -march): it has to run where the kernels cannot. The stack
# protector is off because on some architectures it makes a library need ld-linux.
_COMPILE = (
    "-std=c11",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-stack-protector",
    "-fno-ident",
    "-ffunction-sections",
    "-fdata-sections",
)
# Nothing that differs from build to build (paths, build id, symbol tables), nothing that is not called.
_LINK = (
    "-shared",
    "-static-libgcc",
    "-Wl,--gc-sections",
    "-Wl,--version-script=exports.map",
    "-Wl,--no-undefined",
    "-Wl,--as-needed",
    "-Wl,--build-id=none",
    "-Wl,--hash-style=gnu",
    "-Wl,-z,noexecstack",
    "-Wl,-z,relro",
    "-Wl,-z,now",
    "-Wl,-s",
)
_CROSS_PACKAGES = {
    "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu libc6-dev-arm64-cross",
    "arm-linux-gnueabihf-gcc": "gcc-arm-linux-gnueabihf libc6-dev-armhf-cross",
}
_EXPORTS = "{ global: horq_*; local: *; };\n"


def find_compiler(command: Sequence[str]) -> tuple[str, ...]:
    """`command` with its first word resolved. HorqError that names it and a package that has it where it is missing."""
    found = shutil.which(command[0])
    if found is None:
        raise HorqError(
            f"no C compiler: {command[0]!r} is not on PATH; it links the library. "
            f"Install it (Debian, Ubuntu: apt install {_package(command[0])})"
        )
    return (found, *command[1:])


def _package(program: str) -> str:
    name = Path(program).name
    if name in ("cc", "gcc"):
        return "gcc libc6-dev"
    if name in _CROSS_PACKAGES:
        return _CROSS_PACKAGES[name]
    return f"gcc-{name.removesuffix('-gcc')}" if name.endswith("-gcc") else name


def link(compiler: Sequence[str], family: str, folder: Path, objects: Sequence[str], out: Path) -> None:
    """Links model.c, data.S and `objects` in `folder` with the C runtime to the library `out`.

    Runs in `folder` and names files relative to it, so that no path of this machine gets into the library.
    """
    for source in (*COMMON_SOURCES, CPU_SOURCES[family], "horq.h", "internal.h"):
        shutil.copyfile(RUNTIME / source, folder / source)
    (folder / "exports.map").write_text(_EXPORTS)
    sources = [*COMMON_SOURCES, CPU_SOURCES[family], "model.c", "data.S"]
    command = [*compiler, *_COMPILE, *sources, *objects, *_LINK, "-o", str(out), "-lm", "-lpthread"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise HorqError(f"{compiler[0]} failed (exit status {done.returncode}): {first_error(done.stderr)}")


def first_error(stderr: str) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = stderr.strip().splitlines() or ["no message"]
    return next((line for line in lines if "error" in line or "undefined" in line), lines[0])
