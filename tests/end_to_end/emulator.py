"""Libraries for ARM run on this machine: a C program around horq.h under qemu, raw files in and out."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from horq_tvm.compiler import CompiledModel
from horq_tvm.runtime.loader import read_manifest
from horq_tvm.specs import TensorSpec

Array = NDArray[Any]
HERE = Path(__file__).resolve().parent
RUNTIME = HERE.parent.parent / "horq_tvm" / "runtime"
INSTALL = (
    "apt install gcc-aarch64-linux-gnu libc6-dev-arm64-cross gcc-arm-linux-gnueabihf libc6-dev-armhf-cross"
    " qemu-user-static"
)


@dataclass(frozen=True)
class Machine:
    """GNU's triple, and the emulator that qemu-user-static has for it; `cpu` is what it stands for."""

    triple: str
    emulator: str
    cpu: str

    @property
    def missing(self) -> tuple[str, ...]:
        """The programs that are not installed."""
        return tuple(name for name in (f"{self.triple}-gcc", self.emulator) if shutil.which(name) is None)

    def run(self, library: Path, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name, as `LoadedModel` gives them."""
        manifest = read_manifest(library)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for index, spec in enumerate(manifest.inputs):
                array = inputs[spec.name]
                assert (array.shape, str(array.dtype)) == (spec.shape, spec.dtype)
                (folder / f"in{index}").write_bytes(np.ascontiguousarray(array).tobytes())
            root = f"/usr/{self.triple}"
            command = [self.emulator, "-cpu", self.cpu, "-L", root, str(_program(self)), str(library.resolve()), name]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr or f"exit status {done.returncode}"
            return {
                spec.name: np.fromfile(folder / f"out{index}", spec.dtype).reshape(spec.shape)
                for index, spec in enumerate(manifest.outputs)
            }

    def __call__(self, compiled: CompiledModel, **inputs: Array) -> dict[str, Array]:
        """`run` of a model that was just compiled."""
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "model.so"
            compiled.export(library)
            return self.run(library, inputs)


@dataclass(frozen=True)
class EmulatedModel:
    """A compiled model called as a `LoadedModel` is: inputs in order or by name, outputs by name."""

    machine: Machine
    compiled: CompiledModel

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(i["name"], tuple(i["shape"]), i["dtype"]) for i in self.compiled.report["inputs"])

    def __call__(self, *positional: Array, **named: Array) -> dict[str, Array]:
        names = [spec.name for spec in self.inputs]
        return self.machine(self.compiled, **dict(zip(names, positional, strict=False)), **named)


MACHINES: Mapping[str, Machine] = {
    "aarch64": Machine("aarch64-linux-gnu", "qemu-aarch64-static", "max"),
    "armv7": Machine("arm-linux-gnueabihf", "qemu-arm-static", "max"),
}


def machine(name: str) -> Machine:
    """The machine called `name`; skips the test where it cannot be emulated, and says what would help."""
    found = MACHINES[name]
    if found.missing:
        pytest.skip(f"{', '.join(found.missing)} not installed: {INSTALL}")
    return found


@lru_cache(maxsize=len(MACHINES))
def _program(machine: Machine) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="horq-emulator-"))
    program = folder / "run_library"
    source = HERE / "run_library.c"
    command = [f"{machine.triple}-gcc", "-O1", f"-I{RUNTIME}", str(source), "-o", str(program), "-ldl"]
    subprocess.run(command, check=True)
    return program
