"""From the imported model to scheduled kernels, phase by phase. docs/architecture.md says what each phase hands on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tvm
from tvm import relax

from .ops.int8 import Activation
from .relay_passes.fold_affine import FoldAffine
from .relay_passes.fold_constant_plane import FoldConstantPlane
from .relay_passes.fuse_epilogue import FuseEpilogue
from .relay_passes.fuse_scales import FuseScales
from .relay_passes.name_layers import NameLayers
from .relay_passes.pack_int8 import Int8Target, PackInt8
from .relay_passes.pack_weights import PackWeights
from .relay_passes.quantize_rest import QuantizeRest
from .relay_passes.rewrite_layers import RewriteLayers
from .relay_passes.schedule_kernels import Choose, ScheduleKernels
from .relay_passes.sink_reshapes import SinkReshapes
from .relay_passes.spell_fake_quantize import SpellFakeQuantize
from .relay_passes.to_nhwc import ToNHWC
from .schedules import int8, layout, tile
from .schedules.decisions import by_default
from .schedules.legalize import LEGALIZE, Legalize
from .specs import LayerConfig
from .straightline import Array
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


def quantize_rest(
    activations: Mapping[str, Activation], weight_scales: Mapping[str, Array] | None = None
) -> tvm.transform.Pass:
    """Float layers whose inputs were calibrated, or are quantised by the model itself, as int8 layers."""
    return tvm.transform.Sequential(
        [QuantizeRest(activations, weight_scales), relax.transform.DeadCodeElimination(["main"])], name="quantize_rest"
    )


def optimise(target: Target) -> tvm.transform.Pass:
    """Constants in the target's layout, each anchor grouped with its epilogue and the next layer's binarisation."""

    def lanes(filters: int, groups: int) -> int:
        return tile.lanes(filters, groups, target.vector_bits)

    return tvm.transform.Sequential(
        [
            FuseScales(),
            PackInt8(Int8Target(int8.style(target), lanes, target.vector_bits // 32)),
            PackWeights(
                lanes,
                lambda filters, groups, row: layout.bitserial(target, filters, groups, row),
            ),
            SpellFakeQuantize(),
            SinkReshapes(),
            FuseEpilogue(),
        ],
        name="optimise",
    )


def kernels(target: Target) -> tvm.transform.Pass:
    """Every op and group as one TensorIR function, the algorithm alone: what a tuner takes up."""
    return tvm.transform.Sequential(
        [
            relax.transform.LegalizeOps(dict(_algorithms(target))),
            relax.transform.FuseTIR(),
            relax.transform.DeadCodeElimination(["main"]),
        ],
        name="kernels",
    )


def _algorithms(target: Target) -> Mapping[str, Legalize]:
    """The algorithm of each op: CPUs share them, a card has its own for some."""
    if target.family != "cuda":
        return LEGALIZE
    from .schedules.cuda import legalize

    return legalize.algorithms(target)


def lower(target: Target, choose: Choose = lambda _func: by_default) -> tvm.transform.Pass:
    """Every op and group as one TensorIR function with the target's schedule; `choose` says with what parameters."""
    return tvm.transform.Sequential([kernels(target), schedule(target, choose)], name="lower")


def schedule(target: Target, choose: Choose = lambda _func: by_default) -> tvm.transform.Pass:
    """The target's schedules for kernels; `choose` says with what parameters."""
    return tvm.transform.Sequential([ScheduleKernels(target, choose)], name="schedule")
