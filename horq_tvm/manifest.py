"""What a library says about itself: the JSON that `inspect` prints and that every library carries inside.

Standard library only, since a device reads it too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from horq_tvm.errors import HorqError
from horq_tvm.specs import Rest, Scale, TensorSpec

MANIFEST_VERSION = 1
_OF_TVM = ("runtime", "archs", "steps")  # what only a library for TVM's runtime says


@dataclass(frozen=True)
class LayerRecord:
    """One conv or dense layer of the model.

    `order` and `scale` are None for a layer that stays float, and `reason` says why; it is None for a binarised one.
    `rest` is the arithmetic of such a layer, None for a binarised one (and in libraries that do not tell).
    `schedule` is "tuned" where a database had a record of this workload and `records` counts those that it has.
    """

    name: str
    op: str
    order: int | None = None
    scale: Scale | None = None
    reason: str | None = None
    schedule: Literal["default", "tuned"] = "default"
    records: int = 0
    rest: Rest | None = None


@dataclass(frozen=True)
class ByteCounts:
    """Where a library's bytes go: machine code, weights as bits, every other constant, and this manifest as JSON."""

    code: int = 0
    weights_packed: int = 0
    weights_float: int = 0
    manifest: int = 0


@dataclass(frozen=True)
class Manifest:
    """The interface of a compiled model, the machine it needs, and what became of its layers.

    `inputs` and `outputs` are in the order of the model's. `cpu_features` are named as in /proc/cpuinfo. `emit` fills
    in `target`, `cpu_features` and `bytes`, and for a library that TVM's runtime runs (`runtime` is "tvm") the card's
    architectures in `archs` and in `steps` what the profile calls each kernel.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    target: str = ""
    cpu_features: tuple[str, ...] = ()
    layers: tuple[LayerRecord, ...] = ()
    bytes: ByteCounts = ByteCounts()
    version: int = MANIFEST_VERSION
    runtime: Literal["", "tvm"] = ""
    archs: tuple[int, ...] = ()
    steps: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The manifest as interface.md's JSON object, its keys in that order."""
        found = asdict(self)
        keys = ("version", "inputs", "outputs", "target", "cpu_features", "layers", "bytes")
        return {key: found[key] for key in (*keys, *(key for key in _OF_TVM if self.runtime))}

    def to_json(self) -> str:
        """The manifest as one line of ASCII JSON."""
        return json.dumps(self.to_dict(), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Reads what `to_json` wrote; unknown keys are passed over. HorqError where the text is no manifest."""
        try:
            return cls._from_dict(json.loads(text))
        except (ValueError, KeyError, TypeError) as error:
            raise HorqError(f"the manifest cannot be read ({type(error).__name__}: {error})") from error

    @classmethod
    def _from_dict(cls, found: Mapping[str, Any]) -> Manifest:
        if found["version"] != MANIFEST_VERSION:
            raise HorqError(
                f"the manifest is of version {found['version']}; this horq-tvm reads version {MANIFEST_VERSION}"
            )
        return cls(
            inputs=tuple(_tensor(entry) for entry in found["inputs"]),
            outputs=tuple(_tensor(entry) for entry in found["outputs"]),
            target=found["target"],
            cpu_features=tuple(found["cpu_features"]),
            layers=tuple(_known(LayerRecord, entry) for entry in found["layers"]),
            bytes=_known(ByteCounts, found["bytes"]),
            runtime=found.get("runtime", ""),
            archs=tuple(found.get("archs", ())),
            steps=dict(found.get("steps", {})),
        )


def _tensor(entry: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(entry["name"], tuple(int(extent) for extent in entry["shape"]), entry["dtype"])


def _known(cls: Any, entry: Mapping[str, Any]) -> Any:
    return cls(**{key: value for key, value in entry.items() if key in cls.__dataclass_fields__})
