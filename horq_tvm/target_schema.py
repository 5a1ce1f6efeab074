"""The keys of a target in targets.yaml, as pydantic checks them.

Apart from targets.py, so that `Target` itself needs no pydantic.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt

from horq_tvm.targets import LLVM_TO_CPUINFO, Family, Popcount


def _feature(value: str) -> str:
    known = sorted(set(LLVM_TO_CPUINFO.values()))
    if value not in known:
        close = difflib.get_close_matches(value, known, n=3) or known
        raise ValueError(f"unknown CPU feature {value!r}; accepted: {', '.join(close)}")
    return value


def _attribute(value: str) -> str:
    if value[:1] not in ("+", "-") or value[1:] not in LLVM_TO_CPUINFO:
        close = difflib.get_close_matches(value[1:], LLVM_TO_CPUINFO, n=3) or list(LLVM_TO_CPUINFO)
        raise ValueError(f"found {value!r}; accepted: + or - and one of {', '.join(close)}")
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
    mtriple: Text
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
