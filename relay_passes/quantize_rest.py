"""`QuantizeRest`: the float layers that calibration gave a range become int8 layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm

from horq_tvm import ops, reference_int8
from horq_tvm.errors import HorqError
from horq_tvm.ops.int8 import Activation
from horq_tvm.pixels import TO_NHWC, Pixels, pixels_of
from horq_tvm.straightline import Array, Program, Writer, array_of, constant, op_name, read_main

FLOAT_LAYERS = ("horq.conv2d", "horq.dense")


@tvm.transform.module_pass(opt_level=0, name="QuantizeRest")
class QuantizeRest:
    """horq.conv2d and horq.dense of `activations` → horq.int8_conv2d and horq.int8_dense, weights in int8.

    A convolution of a normalised image of bytes reads the bytes (horq.int8_image): the normalisation is in its weights,
    its zero points and an addend, and no range is needed.

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
                if activation is None:
                    writer.bind(var, value)
                elif (pixels := readable_pixels(program, value)) is not None:
                    writer.map(var, of_pixels(writer, value, pixels))
                else:
                    writer.bind(var, quantized(value, activation))
            return writer.finish(program.result)


def readable_pixels(program: Program, layer: tvm.relax.Call) -> Pixels | None:
    """The image of bytes whose pixels a convolution can read, None where it reads none or 0 is far from every level."""
    if op_name(layer) != "horq.conv2d":
        return None
    pixels, geometry = pixels_of(program, layer.args[0]), ops.Geometry.of(layer.attrs)
    if pixels is None or geometry.groups > 1 or (any(geometry.padding) and not pixels.can_pad()):
        return None
    return pixels


def of_pixels(writer: Writer, layer: tvm.relax.Call, pixels: Pixels) -> tvm.relax.Expr:
    """The int8 form of a convolution of a normalised image of bytes, emitted."""
    weight, addend = pixels.folded(_weight(layer))
    integers, weight_scale = reference_int8.quantize_weights(weight)
    source: tvm.relax.Expr = pixels.source
    if pixels.planar:
        source = writer.emit(tvm.relax.op.permute_dims(source, list(TO_NHWC)))
    convolved = ops.int8_image(
        source,
        constant(integers),
        constant(weight_scale.astype("float32")),
        name=str(layer.attrs["name"]),
        geometry=ops.Geometry.of(layer.attrs),
        zero_points=pixels.zero_points,
    )
    result = writer.emit(convolved)
    if not addend.any():
        return result
    return writer.emit(tvm.relax.op.add(result, constant(addend.astype("float32"))))


def _weight(layer: tvm.relax.Call) -> Array:
    weight = array_of(layer.args[1])
    if weight is None:
        raise HorqError(f"layer {layer.attrs['name']}: weights have to be constant for int8, found {layer.args[1]}")
    return weight


def quantized(layer: tvm.relax.Call, activation: Activation) -> tvm.relax.Call:
    """The int8 form of a float layer."""
    name, x, weight = str(layer.attrs["name"]), layer.args[0], _weight(layer)
    integers, weight_scale = reference_int8.quantize_weights(weight)
    operands = (x, constant(integers), constant(reference_int8.factors(activation.scale, weight_scale)))
    if op_name(layer) == "horq.dense":
        return ops.int8_dense(*operands, name=name, activation=activation)
    return ops.int8_conv2d(*operands, name=name, geometry=ops.Geometry.of(layer.attrs), activation=activation)
