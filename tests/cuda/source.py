"""The CUDA source that TVM generates for kernels, whether or not a CUDA runtime is loaded in this process."""

from __future__ import annotations

import tvm
import tvm_ffi

from horq_tvm.emit.virtual_machine import COMPILE_HOOK
from horq_tvm.targets import Target


def source_of(mod: tvm.IRModule, target: Target) -> str:
    """The source of all kernels of `mod`.

    Without a runtime TVM's module is the source. With one, stand-ins of a driver among them, TVM compiles at once, with
    a compiler that needs not be here: what it asks to compile is the source.
    """
    asked: list[str] = []

    def keep(source: str) -> bytes:
        asked.append(source)
        return source.encode()

    before = tvm_ffi.get_global_func(COMPILE_HOOK)
    tvm_ffi.register_global_func(COMPILE_HOOK, keep, override=True)
    try:
        built = tvm.compile(mod, target=target.tvm_target())
    finally:
        tvm_ffi.register_global_func(COMPILE_HOOK, before, override=True)
    return asked[0] if asked else str(built.mod.imports[0].inspect_source())
