"""HORQ on Apache TVM: CNNs compiled to XOR and popcount.

`build` and `tune` need the extra `compiler`; `load` runs on a device with numpy alone. Names are imported when they are
first used, so that a device never meets the compiler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import HorqError, UsageError

if TYPE_CHECKING:
    from .compiler import CompiledModel, build
    from .runtime.loader import LoadedModel, load
    from .tuning.api import tune

__all__ = ["CompiledModel", "HorqError", "LoadedModel", "UsageError", "build", "load", "tune"]

_HOMES = {
    "CompiledModel": "compiler",
    "build": "compiler",
    "LoadedModel": "runtime.loader",
    "load": "runtime.loader",
    "tune": "tuning.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    from . import extras

    try:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    except ModuleNotFoundError as error:
        raise extras.missing(error) from error
    globals()[name] = value
    return value
