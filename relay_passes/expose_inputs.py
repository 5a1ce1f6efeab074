"""`ExposeInputs`: what layers read becomes results of main, for calibration."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import tvm
from tvm import relax

from horq_tvm.straightline import Writer, fields_of, op_name, read_main

EXPOSED_INPUTS = "horq.exposed_inputs"
FLOAT_LAYERS = ("horq.conv2d", "horq.dense")


@tvm.transform.module_pass(opt_level=0, name="ExposeInputs")
class ExposeInputs:
    """The input of each float layer of `layers` → a further result of main, each value once.

    The module attribute "horq.exposed_inputs" lists, result by result, the names of the layers that read it.
    """

    def __init__(self, layers: Collection[str]) -> None:
        self.layers = frozenset(layers)

    def transform_module(self, mod: tvm.IRModule, _context: Any) -> tvm.IRModule:
        program = read_main(mod)
        readers: dict[relax.Expr, list[str]] = {}
        for _, value in program.bindings:
            if op_name(value) in FLOAT_LAYERS and str(value.attrs["name"]) in self.layers:
                readers.setdefault(value.args[0], []).append(str(value.attrs["name"]))
        with Writer(mod, program) as writer:
            for var, value in program.bindings:
                writer.bind(var, value)
            mod = writer.finish(relax.Tuple([*fields_of(program.result), *readers]))
        return mod.with_attr(EXPOSED_INPUTS, list(readers.values()))
