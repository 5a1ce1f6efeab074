"""The keys of a plan, as pydantic checks them. Apart from plan.py, so that `Plan` itself needs no pydantic."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr


class PlanFile(BaseModel):
    """The whole file; `default` and every layer are the word `float` or a LayerRecord, and are checked one by one."""

    model_config = ConfigDict(extra="forbid")
    version: Literal[1]
    default: Any = None
    layers: dict[str, Any] = Field(default_factory=dict)


class LayerRecord(BaseModel):
    """What a plan says of a layer that it binarises; `plan.layer_config` checks the values."""

    model_config = ConfigDict(extra="forbid")
    order: StrictInt
    scale: StrictStr
    betas: list[StrictFloat | StrictInt] | None = None
