"""`QuantizeRest`: the float layers that calibration gave a range become int8 layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm

from horq_tvm import ops, reference_int8
from horq_tvm.errors import HorqError
from horq_tvm.ops.int8 import Activation
from horq_tvm.straightline import Writer, array_of, constant, op_name, read_main

FLOAT_LAYERS = ("horq.conv2d", "horq.dense")


@tvm.transform.module_pass(opt_level=0, name="QuantizeRest")
class QuantizeRest:
    """horq.conv2d and horq.dense of `activations` → horq.int8_conv2d and horq.int8_dense, weights in int8.

    It comes after `FoldAffine`, so that a normalisation's factor is in the weights before these are rounded. Raises
    HorqError on a name that is no float layer of the module, or one whose weights are not constant.
    """

    def __init__(self, activations: Mapping[str, Activation]) -> None:
        self.activations = dict(activations)

    def transform_module(self, mod: tvm.IRModule, _context: Any) -> tvm.IRModule:
        program = read_main(mod)
        names = [str(value.attrs["name"]) for _, value in program.bindings if op_name(value) in FLOAT_LAYERS]
        missing = sorted(self.activations.keys() - set(names))
        if missing:
            raise HorqError(
                f"no float layer {', '.join(missing)} in the module; there are {', '.join(names) or 'none'}"
            )
        with Writer(mod, program) as writer:
            for var, value in program.bindings:
                float_layer = op_name(value) in FLOAT_LAYERS
                activation = self.activations.get(str(value.attrs["name"])) if float_layer else None
                writer.bind(var, value if activation is None else quantized(value, activation))
            return writer.finish(program.result)


def quantized(layer: tvm.relax.Call, activation: Activation) -> tvm.relax.Call:
    """The int8 form of a float layer."""
    name, x, weight = str(layer.attrs["name"]), layer.args[0], array_of(layer.args[1])
    if weight is None:
        raise HorqError(f"layer {name}: weights have to be constant for int8, found {layer.args[1]}")
    integers, weight_scale = reference_int8.quantize_weights(weight)
    operands = (x, constant(integers), constant(reference_int8.factors(activation.scale, weight_scale)))
    if op_name(layer) == "horq.dense":
        return ops.int8_dense(*operands, name=name, activation=activation)
    return ops.int8_conv2d(*operands, name=name, geometry=ops.Geometry.of(layer.attrs), activation=activation)
