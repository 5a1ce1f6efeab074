"""The rest: layers that stay unbinarised, and which of them run in int8 on what ranges.

Ranges are those of the float32 rest on the calibration data: each layer's smallest and largest input, 0 always among
them, so that padding is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tvm

from . import agreement, reference_int8
from .errors import HorqError
from .layers import Layer
from .manifest import Manifest
from .ops.int8 import MAX_ROW, Activation
from .relay_passes.expose_inputs import EXPOSED_INPUTS, ExposeInputs
from .relay_passes.quantize_rest import FLOAT_LAYERS, own_activation
from .runtime.loader import LoadedModel
from .schedules.int8 import LEAST_LANES
from .specs import TensorSpec
from .straightline import fields_of, op_name, read_main
from .targets import Target


@dataclass(frozen=True)
class Calibrated:
    """`activations` by layer, `own` of them the model's own, the others read off `float_rest`: its rest in float32."""

    activations: Mapping[str, Activation]
    own: int
    float_rest: LoadedModel

    def describe(self, inputs: str) -> str:
        """Where the ranges come from, calibration being on `inputs`."""
        if not self.own:
            return inputs
        others = f"; {inputs} for {len(self.activations) - self.own} more" if self.own < len(self.activations) else ""
        return f"the model's own quantisation of {self.own} layers{others}"


def reason_for_float32(layer: Layer) -> str | None:
    """Why an unbinarised layer has no int8 form, None where it has one."""
    if layer.weight is None:
        return layer.opaque
    if layer.depthwise and layer.groups > 1:  # a grey image has one channel too
        return "int8 has no depthwise kernel"
    row, filters = int(np.prod(layer.weight[1:])), layer.weight[0] // layer.groups
    if row > MAX_ROW:
        return f"a row of {row} elements can overflow int8's sums (up to {MAX_ROW})"
    if layer.groups > 1 and filters % LEAST_LANES:
        return f"int8 takes groups of a multiple of {LEAST_LANES} filters, not {filters}"
    return None


def calibrate(
    rewritten: tvm.IRModule,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    names: Sequence[str],
    host: Target,
    data: Mapping[str, np.ndarray] | None,
    say: Callable[[str], None],
) -> Calibrated:
    """Runs the rewritten model on the calibration data, else on the random inputs that `agreement` compares on.

    A layer whose input the model quantises itself keeps that.

    Raises:
        UsageError: the data does not fit the model's inputs.
        HorqError: a layer's input is not finite.
    """
    from .compiler import emit

    say("calibrating the int8 layers")
    own = own_activations(rewritten, names)
    exposed = tvm.transform.Sequential([ExposeInputs([name for name in names if name not in own])])(rewritten)
    results = fields_of(read_main(exposed).result)[len(outputs) :]
    specs = tuple(
        TensorSpec(f"input_{i}", tuple(int(e) for e in result.ty.shape), str(result.ty.dtype.dtype))
        for i, result in enumerate(results)
    )
    model = emit(exposed, host, Manifest(inputs, (*outputs, *specs)), say).load()
    lows, highs = np.full(len(specs), np.inf), np.full(len(specs), -np.inf)
    for feed in agreement.batches(inputs, data):
        found = model(**feed)
        for i, spec in enumerate(specs):
            lows[i] = np.minimum(lows[i], found[spec.name].min())  # unlike fmin, it keeps a NaN
            highs[i] = np.maximum(highs[i], found[spec.name].max())
    activations = {
        str(name): _activation(str(name), float(low), float(high))
        for readers, low, high in zip(exposed.attrs[EXPOSED_INPUTS], lows, highs, strict=True)
        for name in readers
    }
    return Calibrated(activations | own, len(own), model)


def own_activations(rewritten: tvm.IRModule, names: Collection[str]) -> dict[str, Activation]:
    """Of the layers of `names` those whose input the model quantises itself."""
    program = read_main(rewritten)
    found = {}
    for _, value in program.bindings:
        if op_name(value) in FLOAT_LAYERS and (name := str(value.attrs["name"])) in names:
            activation = own_activation(program, value.args[0])
            if activation is not None:
                found[name] = activation
    return found


def _activation(name: str, low: float, high: float) -> Activation:
    try:
        return Activation(*reference_int8.activation_scale(low, high))
    except ValueError as error:
        raise HorqError(
            f"layer {name}: calibration: {error}, so it has no int8 form; accepted: rest float32"
        ) from error
