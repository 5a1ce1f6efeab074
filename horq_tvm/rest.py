"""The rest: layers that stay unbinarised, and which of them run in int8 on what ranges.

Ranges are those of the float32 rest on the calibration data: each layer's smallest and largest input, 0 always among
them, so that padding is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tvm

from . import agreement, reference_int8
from .errors import HorqError
from .layers import Layer
from .manifest import Manifest
from .ops.int8 import MAX_ROW, Activation
from .relay_passes.expose_inputs import EXPOSED_INPUTS, ExposeInputs
from .runtime.loader import LoadedModel
from .schedules.int8 import LEAST_LANES
from .specs import TensorSpec
from .straightline import fields_of, read_main
from .targets import Target


@dataclass(frozen=True)
class Calibrated:
    """`activations` by layer, and the model that they were read off: its rest in float32."""

    activations: Mapping[str, Activation]
    float_rest: LoadedModel


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

    Raises:
        UsageError: the data does not fit the model's inputs.
        HorqError: a layer's input is not finite.
    """
    from .compiler import emit

    say("calibrating the int8 layers")
    exposed = tvm.transform.Sequential([ExposeInputs(names)])(rewritten)
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
    return Calibrated(activations, model)


def _activation(name: str, low: float, high: float) -> Activation:
    try:
        return Activation(*reference_int8.activation_scale(low, high))
    except ValueError as error:
        raise HorqError(
            f"layer {name}: calibration: {error}, so it has no int8 form; accepted: rest float32"
        ) from error
