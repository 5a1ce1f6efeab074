"""`SpellFakeQuantize`: what is left of a model's own quantisation becomes float operators, which fuse."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from horq_tvm.straightline import Writer, op_name, read_main


@tvm.transform.module_pass(opt_level=0, name="SpellFakeQuantize")
class SpellFakeQuantize:
    """horq.fake_quantize → divide, round, maximum, minimum, multiply: the same floats to the bit.

    clip(rint(v) + z, low, high) − z = clip(rint(v), low − z, high − z), all of them integers below 2^24.
    """

    def transform_module(self, mod: tvm.IRModule, _context: Any) -> tvm.IRModule:
        program = read_main(mod)
        with Writer(mod, program) as writer:
            for var, value in program.bindings:
                if op_name(value) == "horq.fake_quantize":
                    writer.map(var, _spelt(writer, value))
                else:
                    writer.bind(var, value)
            return writer.finish(program.result)


def _spelt(writer: Writer, call: relax.Call) -> relax.Expr:
    scale, zero = relax.const(float(call.attrs["scale"]), "float32"), int(call.attrs["zero_point"])
    low, high = (relax.const(float(int(call.attrs[end]) - zero), "float32") for end in ("low", "high"))
    steps = writer.emit(relax.op.round(writer.emit(relax.op.divide(call.args[0], scale))))
    clipped = writer.emit(relax.op.minimum(writer.emit(relax.op.maximum(steps, low)), high))
    return writer.emit(relax.op.multiply(clipped, scale))
