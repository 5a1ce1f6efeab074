"""What the importers' tests share: run an imported model as it stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import tvm
from tvm import relax

from horq_tvm.frontend import ImportedModel

Execute = Callable[[ImportedModel, Sequence[np.ndarray]], list[np.ndarray]]


@pytest.fixture(scope="session")
def execute() -> Execute:
    """Compiles an imported model with TVM alone and returns its outputs."""

    def run(model: ImportedModel, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        plain = relax.transform.LegalizeOps({"horq.name": lambda _builder, call: call.args[0]})(model.mod)
        machine = relax.VirtualMachine(tvm.compile(plain, tvm.target.Target({"kind": "llvm"})), tvm.cpu())
        result = machine["main"](*(tvm.runtime.tensor(value) for value in inputs))
        return [v.numpy() for v in ([result] if isinstance(result, tvm.runtime.Tensor) else result)]

    return run


@pytest.fixture(scope="session")
def layer_names() -> Callable[[ImportedModel], list[str]]:
    """The names that `horq.name` carries, in the order of the graph."""

    def names(model: ImportedModel) -> list[str]:
        found: list[str] = []

        def visit(expr: relax.Expr) -> None:
            if isinstance(expr, relax.Call) and getattr(expr.op, "name", "") == "horq.name":
                found.append(str(expr.attrs["name"]))

        relax.analysis.post_order_visit(model.mod["main"], visit)
        return found

    return names
