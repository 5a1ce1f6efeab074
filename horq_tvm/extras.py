"""Which extra brings a module that is missing: the base install has numpy alone."""

from __future__ import annotations

from horq_tvm.errors import HorqError

_EXTRA_OF = {
    "cloudpickle": "compiler",
    "matplotlib": "dev",
    "onnx": "compiler",
    "onnxruntime": "compiler",
    "psutil": "compiler",
    "pydantic": "compiler",
    "sympy": "compiler",
    "tornado": "compiler",
    "tvm": "compiler",
    "tvm_ffi": "compiler",
    "xgboost": "compiler",
    "yaml": "compiler",
    "onnxscript": "torch",
    "torch": "torch",
}


def missing(error: ImportError) -> HorqError:
    """The error a user should see for `error`; an import that no extra explains is a defect and is raised as it is."""
    module = (error.name or "").partition(".")[0]
    # A module of the same name that is installed, but lacks a part, is broken rather than missing.
    if not isinstance(error, ModuleNotFoundError) or module not in _EXTRA_OF:
        raise error
    return HorqError(f"{module} is not installed; it comes with: pip install 'horq-tvm[{_EXTRA_OF[module]}]'")
