"""The keys of a target in targets.yaml, as pydantic checks them.

Apart from targets.py, so that `Target` itself needs no pydantic.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, ValidationInfo

from horq_tvm.targets import TO_CPUINFO, Family, Popcount, architecture_of

ARCHITECTURES: Mapping[str, tuple[str, ...]] = {
    "x86": ("x86_64",),
    "arm": ("aarch64", "arm"),
    "cuda": ("x86_64", "aarch64"),
}
CUDA_ARCHS = (75, 80, 86, 87, 89, 90)
MAX_SHARED_KIB = 48  # what a block may have without asking the driver for more


def _flags_of(info: ValidationInfo) -> Mapping[str, str]:
    """LLVM's names and the system's, of the architecture that the triple names; those of all where it names none."""
    own = TO_CPUINFO.get(architecture_of(str(info.data.get("mtriple", ""))))
    return own if own is not None else {llvm: flag for known in TO_CPUINFO.values() for llvm, flag in known.items()}


def _feature(value: str, info: ValidationInfo) -> str:
    known = sorted(set(_flags_of(info).values()))
    if value not in known:
        close = difflib.get_close_matches(value, known, n=3) or known
        raise ValueError(f"unknown CPU feature {value!r}; accepted: {', '.join(close)}")
    return value


def _attribute(value: str, info: ValidationInfo) -> str:
    known = _flags_of(info)
    if value[:1] not in ("+", "-") or value[1:] not in known:
        close = difflib.get_close_matches(value[1:], known, n=3) or list(known)
        raise ValueError(f"found {value!r}; accepted: + or - and one of {', '.join(close)}")
    return value


def _triple(value: str, info: ValidationInfo) -> str:
    family = info.data.get("family")
    accepted = ARCHITECTURES.get(str(family), ())
    if family is not None and architecture_of(value) not in accepted:
        raise ValueError(f"found {value!r}; accepted for the family {family}: one of {', '.join(accepted)}")
    return value


def _arch(value: int) -> int:
    if value not in CUDA_ARCHS:
        raise ValueError(f"unknown architecture sm_{value}; accepted: {', '.join(map(str, CUDA_ARCHS))}")
    return value


def _for_cuda(value: Any, info: ValidationInfo) -> Any:
    """What a card must have, and nothing else can."""
    cuda = info.data.get("family") == "cuda"
    if cuda != bool(value):
        accepted = "a value for the family cuda" if cuda else "the family cuda alone has it"
        raise ValueError(f"found {value!r}; accepted: {accepted}")
    return value


Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[StrictInt, Field(gt=0)]


class TargetsFile(BaseModel):
    """The whole file; its targets are checked one by one, once what they extend is filled in."""

    model_config = ConfigDict(extra="forbid")
    version: Literal[1]
    targets: dict[str, dict[str, Any]]


class TargetRecord(BaseModel):
    """One target. A YAML list may stand for a tuple; no other conversion is made."""

    model_config = ConfigDict(extra="forbid")
    description: Text
    family: Family
    mtriple: Annotated[Text, AfterValidator(_triple)]
    mcpu: Text
    mattr: tuple[Annotated[str, AfterValidator(_attribute)], ...] = ()
    features: tuple[Annotated[str, AfterValidator(_feature)], ...]
    popcount: Popcount
    vector_bits: Literal[128, 256, 512]
    vector_registers: Positive
    word_bits: Literal[32]
    l1d_kib: Positive
    l2_kib: Positive
    compiler: Annotated[tuple[Text, ...], Field(min_length=1)]
    level: Positive | None = None
    archs: Annotated[tuple[Annotated[StrictInt, AfterValidator(_arch)], ...], AfterValidator(_for_cuda)] = Field(
        (), validate_default=True
    )
    shared_kib: Annotated[StrictInt, Field(ge=0, le=MAX_SHARED_KIB), AfterValidator(_for_cuda)] = Field(
        0, validate_default=True
    )
