"""Calibration of `static`: K constants a layer, fitted to what the layer sees once the layers before it are quantised.

The model is built once with β as further inputs and each layer's input as a further output (`ExposeScales`), so that
calibration runs the compiled integers and not an imitation of them. Layers are taken in topological order: a run with
the β known so far gives the next layer's input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import tvm

from . import agreement, pipeline, reference
from .manifest import Manifest
from .relay_passes.expose_scales import EXPOSED, ExposeScales
from .relay_passes.rewrite_layers import RewriteLayers
from .specs import LayerConfig, TensorSpec
from .straightline import fields_of, read_main
from .targets import Target

SAMPLE_BUDGET = 1 << 24  # activations of one layer that the fit looks at


def fit(
    canonical: tvm.IRModule,
    inputs: tuple[TensorSpec, ...],
    target: Target,
    configs: Mapping[str, LayerConfig],
    data: Mapping[str, np.ndarray],
    say: Callable[[str], None],
) -> dict[str, LayerConfig]:
    """The configs, every `static` layer without betas given the least-squares ones for `data`.

    Raises UsageError where the data does not fit the model's inputs.
    """
    from .compiler import emit

    feeds = list(agreement.batches(inputs, data))
    names = [n for n, c in configs.items() if c.scale == "static" and c.betas is None]
    exposed = _exposed(canonical, configs, names)
    scales = _scale_specs(exposed, len(inputs))
    manifest = Manifest((*inputs, *scales), _result_specs(exposed, len(scales)))
    model = emit(exposed, target, manifest, say).load()
    fitted: dict[str, LayerConfig] = {}
    betas = {spec.name: np.ones(spec.shape, "float32") for spec in scales}
    for index, (spec, fed) in enumerate(zip(scales, exposed.attrs[EXPOSED], strict=True)):
        say(f"calibrating {fed[0]} ({index + 1} of {len(scales)})")
        seen = [model(**feed, **betas)[f"input_{index}"] for feed in feeds]
        best = reference.fit_static_scales(_thinned(seen), spec.shape[1])
        betas[spec.name] = np.broadcast_to(best.astype("float32"), spec.shape).copy()
        for name in fed:
            fitted[str(name)] = replace(configs[str(name)], betas=tuple(float(np.float32(beta)) for beta in best))
    return {name: fitted.get(name, config) for name, config in configs.items()}


def _exposed(canonical: tvm.IRModule, configs: Mapping[str, LayerConfig], names: list[str]) -> tvm.IRModule:
    """The rewritten model with the β of `names` as parameters: `sample` kernels read theirs from memory.

    The other layers are rewritten before, so that none of them shares the β that is about to be replaced.
    """
    others = {n: c for n, c in configs.items() if n not in names}
    computed = {n: LayerConfig(configs[n].order, "sample") for n in names}
    passes = [RewriteLayers(others), pipeline.rewrite(computed), ExposeScales(names)]
    return tvm.transform.Sequential(passes)(canonical)


def _scale_specs(exposed: tvm.IRModule, inputs: int) -> tuple[TensorSpec, ...]:
    """The β parameters of main."""
    params = exposed["main"].params[inputs:]
    return tuple(TensorSpec(p.name, tuple(int(e) for e in p.ty.shape), "float32") for p in params)


def _result_specs(exposed: tvm.IRModule, count: int) -> tuple[TensorSpec, ...]:
    """main's results: the model's own, then the input of each exposed layer."""
    results = fields_of(read_main(exposed).result)
    own = len(results) - count
    labels = [f"output_{i}" for i in range(own)] + [f"input_{i}" for i in range(count)]
    return tuple(
        TensorSpec(label, tuple(int(e) for e in r.ty.shape), str(r.ty.dtype.dtype))
        for label, r in zip(labels, results, strict=True)
    )


def _thinned(arrays: list[np.ndarray]) -> np.ndarray:
    """All activations seen, or an even share of them where there are more than the fit needs."""
    flat = np.concatenate([array.ravel() for array in arrays])
    return flat[:: -(-flat.size // SAMPLE_BUDGET)]
