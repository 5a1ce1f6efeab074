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
MOVES = ("relax.permute_dims", "relax.reshape")


@tvm.transform.module_pass(opt_level=0, name="QuantizeRest")
class QuantizeRest:
    """horq.conv2d and horq.dense of `activations` → horq.int8_conv2d and horq.int8_dense, weights in int8.

    A convolution of a normalised image of bytes reads the bytes (horq.int8_image): the normalisation is in its weights,
    its zero points and an addend, and no range is needed. A quantised model keeps its own integers: a layer behind a
    horq.fake_quantize reads what that reads, and weights go on the grid of `weight_scales` (float [F] by layer).

    It comes after `FoldAffine`, so that a normalisation's factor is in the weights before these are rounded. Raises
    HorqError on a name that is no float layer of the module, or one whose weights are not constant.
    """

    def __init__(self, activations: Mapping[str, Activation], weight_scales: Mapping[str, Array] | None = None) -> None:
        self.activations = dict(activations)
        self.weight_scales = dict(weight_scales or {})

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
                    scale = self.weight_scales.get(str(value.attrs["name"]))
                    writer.bind(var, quantized(value, activation, unquantised(writer, program, value.args[0]), scale))
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


def own_activation(program: Program, x: tvm.relax.Expr) -> Activation | None:
    """How the model itself quantises `x`, None where it does not. It may be moved about after that."""
    value = program.values.get(x) if isinstance(x, tvm.relax.Var) else None
    if value is not None and op_name(value) in MOVES:
        return own_activation(program, value.args[0])
    return ops.byte_activation(value.attrs) if value is not None and op_name(value) == "horq.fake_quantize" else None


def unquantised(writer: Writer, program: Program, x: tvm.relax.Expr) -> tvm.relax.Expr:
    """`x` as it is before the model's own quantisation, `x` itself where there is none."""
    if own_activation(program, x) is None:
        return x
    value = program.values[x]
    if op_name(value) == "horq.fake_quantize":
        return value.args[0]
    source = unquantised(writer, program, value.args[0])
    return writer.emit(tvm.relax.Call(value.op, [source, *value.args[1:]], value.attrs, list(value.ty_args)))


def quantized(
    layer: tvm.relax.Call, activation: Activation, x: tvm.relax.Expr, weight_scale: Array | None
) -> tvm.relax.Call:
    """The int8 form of a float layer that reads `x`."""
    name, weight = str(layer.attrs["name"]), _weight(layer)
    integers = None if weight_scale is None else reference_int8.on_grid(weight, weight_scale)
    if integers is None or weight_scale is None:
        integers, weight_scale = reference_int8.quantize_weights(weight)
    operands = (x, constant(integers), constant(reference_int8.factors(activation.scale, weight_scale)))
    if op_name(layer) == "horq.dense":
        return ops.int8_dense(*operands, name=name, activation=activation)
    return ops.int8_conv2d(*operands, name=name, geometry=ops.Geometry.of(layer.attrs), activation=activation)
