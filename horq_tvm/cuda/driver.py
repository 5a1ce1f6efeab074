"""TVM's CUDA runtime on a machine without a driver, where it writes a card's code into libraries but runs nothing.

The runtime is a library of its own, linked against NVIDIA's driver (libcuda.so.1) and CUDA runtime (libcudart).
Without them TVM goes on without a word, and a library then holds CUDA source in place of machine code. So where they
are missing, libraries of their names are made in which every function fails: no device (100, CUDA_ERROR_NO_DEVICE).
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from horq_tvm.errors import HorqError
from horq_tvm.runtime.elf import Elf

from .device import DRIVER, NO_DEVICE
from .toolkit import libraries

CREATE = "ffi.Module.create.cuda"
"""What TVM's CUDA runtime registers, by which code generation knows that it is there."""


def ensure_runtime() -> None:
    """Loads TVM's CUDA runtime, on stand-ins of NVIDIA's libraries where these are missing.

    HorqError where this TVM has no CUDA runtime, or a stand-in cannot be made.
    """
    import tvm_ffi

    if tvm_ffi.get_global_func(CREATE, allow_missing=True) is not None:
        return
    sidecar = _sidecar()
    # The last two are how a card is looked for, see device.py.
    functions = [name for name in Elf.read(sidecar).imports() if re.match("cu(da)?[A-Z]", name)]
    functions += ["cuInit", "cuDeviceGetCount"]
    driver = [name for name in functions if not name.startswith("cuda")]
    runtime = sorted(set(functions) - set(driver))
    with tempfile.TemporaryDirectory(prefix="horq-tvm-") as folder:
        _provide(DRIVER, driver, Path(folder))
        _provide(runtime_name(sidecar), runtime, Path(folder))
        _load(sidecar)


def load_runtime() -> None:
    """Loads TVM's CUDA runtime on NVIDIA's own libraries, to run something. HorqError where one of them is missing."""
    import tvm_ffi

    if tvm_ffi.get_global_func(CREATE, allow_missing=True) is not None:
        return
    sidecar = _sidecar()
    runtime = runtime_name(sidecar)
    if not _found(runtime):
        raise HorqError(
            f"{runtime} of NVIDIA's CUDA is not on this machine; it comes with: pip install 'horq-tvm[cuda]'"
        )
    _load(sidecar)


def _load(sidecar: Path) -> None:
    import tvm_ffi

    try:
        ctypes.CDLL(str(sidecar), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise HorqError(f"TVM's CUDA runtime does not load: {error}") from error
    if tvm_ffi.get_global_func(CREATE, allow_missing=True) is None:
        raise HorqError(f"{sidecar} does not register {CREATE}; accepted: the CUDA runtime of this TVM")


def _sidecar() -> Path:
    """TVM's CUDA runtime. HorqError where the installed TVM has none."""
    import tvm

    folders = [Path(path) for path in tvm.libinfo.package_lib_paths()]
    found = next((path for folder in folders if (path := folder / "libtvm_runtime_cuda.so").is_file()), None)
    if found is None:
        raise HorqError(
            f"this TVM has no libtvm_runtime_cuda.so in {folders[0]}; accepted: apache-tvm's wheel for Linux"
        )
    return found


def runtime_name(sidecar: Path) -> str:
    """The name under which TVM's CUDA runtime looks for NVIDIA's: libcudart.so.13, say."""
    found = re.search(rb"\0(libcudart\.so\.\d+)\0", sidecar.read_bytes())
    if found is None:
        raise HorqError(f"{sidecar} does not name libcudart; accepted: the CUDA runtime of apache-tvm")
    return found[1].decode()


def _found(library: str) -> bool:
    """Whether the system or a toolkit has a library of that name, which stays loaded then."""
    return any(map(_loads, (library, *(str(folder / library) for folder in libraries()))))


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def _provide(library: str, functions: Iterable[str], folder: Path) -> None:
    """The library of that name, loaded: NVIDIA's, else one in which every function fails."""
    if not _found(library):
        try:
            ctypes.CDLL(str(stand_in(library, functions, folder)), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise HorqError(f"the stand-in for {library} does not load: {error}") from error


def stand_in(library: str, functions: Iterable[str], folder: Path, compiler: Sequence[str] = ("cc",)) -> Path:
    """Makes a library in `folder` whose functions return "no device". HorqError where it cannot be compiled.

    Those that return text, cudaGetErrorName and cudaGetErrorString, return it, under the version that NVIDIA's have.
    """
    from horq_tvm.emit.link import find_compiler

    try:
        command = find_compiler(compiler)
    except HorqError as error:
        raise HorqError(f"no {library} here, and no stand-in for it can be made: {error}") from error
    texts = {"cudaGetErrorName": "cudaErrorNoDevice", "cudaGetErrorString": "no CUDA-capable device is detected"}
    lines = [
        f'const char *{name}(void) {{ return "{texts[name]}"; }}'
        if name in texts
        else f"int {name}(void) {{ return {NO_DEVICE}; }}"
        for name in functions
    ]
    source, versions, out = folder / "stand_in.c", folder / "versions.map", folder / library
    source.write_text("\n".join(lines) + "\n")
    versions.write_text(f"{library} {{ global: *; }};\n")
    options = ["-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{library}"]
    if library != DRIVER:  # the driver's functions have no version
        options.append(f"-Wl,--version-script={versions}")
    done = subprocess.run(
        [*command, *options, "-o", str(out), str(source)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        first = (done.stderr.strip().splitlines() or ["no message"])[0]
        raise HorqError(f"no {library} here, and {command[0]} cannot make a stand-in for it: {first}")
    return out
