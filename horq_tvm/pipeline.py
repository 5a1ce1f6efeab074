"""From the imported model to scheduled kernels, phase by phase. docs/architecture.md says what each phase hands on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tvm
from tvm import relax

from .relay_passes.fold_affine import FoldAffine
from .relay_passes.fold_constant_plane import FoldConstantPlane
from .relay_passes.fuse_epilogue import FuseEpilogue
from .relay_passes.name_layers import NameLayers
from .relay_passes.pack_weights import PackWeights
from .relay_passes.rewrite_layers import RewriteLayers
from .relay_passes.schedule_kernels import ScheduleKernels
from .relay_passes.sink_reshapes import SinkReshapes
from .relay_passes.to_nhwc import ToNHWC
from .schedules import layout, tile
from .schedules.legalize import LEGALIZE
from .specs import LayerConfig
from .targets import Target


def canonicalise() -> tvm.transform.Pass:
    """Channels last, every conv and dense a named op with constant weights."""
    return tvm.transform.Sequential([ToNHWC(), NameLayers()], name="canonicalise")


def rewrite(configs: Mapping[str, LayerConfig], taps: Sequence[str] = ()) -> tvm.transform.Pass:
    """The chosen layers as residual binarisation and bitserial ops; the affines around them folded in."""
    return tvm.transform.Sequential(
        [
            RewriteLayers(configs, taps),
            SinkReshapes(),
            FoldAffine(),
            FoldConstantPlane(),
            relax.transform.DeadCodeElimination(["main"]),
        ],
        name="rewrite",
    )


def optimise(target: Target) -> tvm.transform.Pass:
    """Constants in the target's layout, each anchor grouped with its epilogue and the next layer's binarisation."""
    return tvm.transform.Sequential(
        [
            PackWeights(
                lambda filters, groups: tile.lanes(filters, groups, target.vector_bits),
                lambda filters, groups, row: layout.bitserial(target, filters, groups, row),
            ),
            SinkReshapes(),
            FuseEpilogue(),
        ],
        name="optimise",
    )


def lower(target: Target) -> tvm.transform.Pass:
    """Every op and group as one TensorIR function with the target's schedule."""
    return tvm.transform.Sequential(
        [
            relax.transform.LegalizeOps(dict(LEGALIZE)),
            relax.transform.FuseTIR(),
            relax.transform.DeadCodeElimination(["main"]),
            ScheduleKernels(target),
        ],
        name="lower",
    )
