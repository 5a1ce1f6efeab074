"""Where the time goes: the steps of a library's profile, put into classes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from horq_tvm.relay_passes.fuse_epilogue import ELEMENTWISE

from .arithmetic import Rates, Work

STEM, BINARISE, POPCOUNT, EPILOGUE = "stem", "binarise", "popcount", "epilogue"
REST, POOLING, OTHER = "rest", "pooling", "other"
CLASSES = (STEM, BINARISE, POPCOUNT, EPILOGUE, REST, POOLING, OTHER)

_BINARISING = re.compile(r"^(binarize|scales|pad_planes|split_bitserial)")
_POOLING = re.compile(r"pool|^mean$")
_ELEMENTWISE = frozenset(name.rpartition(".")[2] for name in ELEMENTWISE)
_PADDING = re.compile(r"(^|_)pad$")


@dataclass(frozen=True)
class Step:
    """A kernel call: the operator that its name begins with, and the layer that the name ends with, "" for none."""

    operator: str
    layer: str

    @classmethod
    def of(cls, name: str) -> Step:
        """`fused_packed_conv2d_0 stem` → packed_conv2d of layer stem; `pad1` → pad."""
        kernel, _, layer = name.partition(" ")
        return cls(re.sub(r"_?\d+$", "", kernel.removeprefix("fused_").removeprefix("tir_")), layer)


def spent_ms(
    names: Sequence[str], step_ms: Sequence[float], total_ms: float, work: Mapping[str, Work], rates: Rates
) -> dict[str, float]:
    """Milliseconds by class; they add up to `total_ms`, of which what is outside of all steps is `other`.

    stem      everything before the first layer that is binarised, fused binarisation included
    binarise  scales, binarisation and padding of planes, and splitting of binary weights, as passes of their own
    popcount  of the kernels of binary layers, the least time that their arithmetic takes
    epilogue  the remainder of these kernels, and elementwise operators that stand alone between layers
    rest      layers that are not binary, what is fused to them, and the padding before them
    pooling   pools that are fused to nothing, and means
    other     changes of layout, the call from Python, whatever is none of the above
    """
    spent = dict.fromkeys(CLASSES, 0.0)
    steps = [Step.of(name) for name in names]
    beginning = first_binary(steps, work)
    for i, (step, ms) in enumerate(zip(steps, step_ms, strict=True)):
        layer = work.get(step.layer)
        if i < beginning:
            spent[STEM] += ms
        elif layer is not None and layer.binary:
            arithmetic = min(ms, layer.floor_ms(rates))
            spent[POPCOUNT] += arithmetic
            spent[EPILOGUE] += ms - arithmetic
        else:
            spent[_class(step, _next_layer(steps[i:], work))] += ms
    spent[OTHER] += total_ms - sum(step_ms)
    return spent


def first_binary(steps: Sequence[Step], work: Mapping[str, Work]) -> int:
    """The step with which the first binary layer begins: its kernel, or the passes right before it that are its own."""
    kernel = next((i for i, step in enumerate(steps) if step.layer in work and work[step.layer].binary), 0)
    while kernel > 0 and _is_passage(steps[kernel - 1]):
        kernel -= 1
    return kernel


def _is_passage(step: Step) -> bool:
    return bool(_BINARISING.search(step.operator) or _PADDING.search(step.operator))


def _next_layer(steps: Sequence[Step], work: Mapping[str, Work]) -> Work | None:
    return next((work[step.layer] for step in steps if step.layer in work), None)


def _class(step: Step, ahead: Work | None) -> str:
    """Of a step that is no binary layer's kernel; `ahead` is the layer of this step or of the next that has one."""
    if _BINARISING.search(step.operator):
        return BINARISE
    if _PADDING.search(step.operator) and ahead is not None:
        return BINARISE if ahead.binary else REST
    if step.layer or "packed" in step.operator or "quant" in step.operator:
        return REST
    if _POOLING.search(step.operator):
        return POOLING
    return EPILOGUE if step.operator in _ELEMENTWISE else OTHER
