"""`ExposeScales`: β computed in the model becomes β handed in, and what it would be computed from is handed out."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import tvm
from tvm import relax

from horq_tvm.straightline import Program, Writer, fields_of, op_name, read_main

EXPOSED = "horq.exposed_layers"
BITSERIAL = ("horq.bitserial_conv2d", "horq.bitserial_dense")


@tvm.transform.module_pass(opt_level=0, name="ExposeScales")
class ExposeScales:
    """Each `horq.scales` that feeds one of `layers` → a parameter of main; its operand → a further result of main.

    Calibration runs such a model: it sees a layer's input and decides its β. The module attribute
    "horq.exposed_layers" lists, parameter by parameter and in topological order, the names of the layers it feeds.
    """

    def __init__(self, layers: Collection[str]) -> None:
        self.layers = frozenset(layers)

    def transform_module(self, mod: tvm.IRModule, _context: Any) -> tvm.IRModule:
        program = read_main(mod)
        fed = {
            var: names
            for var, value in program.bindings
            if op_name(value) == "horq.scales" and (names := self._fed(program, var))
        }
        scales = {var: relax.Var(f"beta_{i}", var.ty) for i, var in enumerate(fed)}
        extended = Program((*program.params, *scales.values()), program.bindings, program.result)
        with Writer(mod, extended) as writer:
            inputs = []
            for var, value in program.bindings:
                if var in scales:
                    writer.map(var, scales[var])
                    inputs.append(value.args[0])
                else:
                    writer.bind(var, value)
            mod = writer.finish(relax.Tuple([*fields_of(program.result), *inputs]))
        return mod.with_attr(EXPOSED, list(fed.values()))

    def _fed(self, program: Program, scales: relax.Var) -> list[str]:
        """The layers of ours whose bitserial op reads these scales."""
        users = (program.values[user] for user in program.users[scales])
        names = [str(user.attrs["name"]) for user in users if op_name(user) in BITSERIAL]
        return [name for name in names if name in self.layers]
