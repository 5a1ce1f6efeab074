"""A module lowered for CUDA as if it were a loaded library, its kernels run by PoCL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from numpy.typing import NDArray

from horq_tvm import ops, pipeline, targets
from horq_tvm.specs import TensorSpec
from horq_tvm.straightline import fields_of, read_main
from tests.schedules.cuda import pocl

Array = NDArray[Any]


def lower(rewritten: tvm.IRModule, target: str = "cuda") -> tvm.IRModule:
    """What `emit` takes of a rewritten module."""
    resolved = targets.resolve(target)
    with resolved.tvm_target():
        return pipeline.lower(resolved)(pipeline.optimise(resolved)(rewritten))


class OnPocl:
    """The model of a rewritten module (`pipeline.rewrite`), to be called like `horq_tvm.load`'s."""

    def __init__(
        self, rewritten: tvm.IRModule, labels: Sequence[str] | None = None, target: str = "cuda", **how: bool
    ) -> None:
        pocl.device()
        program = read_main(rewritten)
        results = fields_of(program.result)
        labels = labels or [f"y{i}" for i in range(len(results))]
        self.inputs = [_spec(f"x{i}", param) for i, param in enumerate(program.params)]
        self.outputs = [_spec(label, result) for label, result in zip(labels, results, strict=True)]
        self.lowered = lower(rewritten, target)
        self.network = pocl.Network(self.lowered, **how)

    def __call__(self, *arrays: Array) -> dict[str, Array]:
        return dict(zip((spec.name for spec in self.outputs), self.network(*arrays), strict=True))


def _spec(name: str, expr: Any) -> TensorSpec:
    return TensorSpec(name, ops.shape_of(expr), str(expr.ty.dtype.dtype))
