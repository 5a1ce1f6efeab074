"""The per-layer plan (`--plan PLAN.yaml`): which layers are binarised and how.

```yaml
version: 1
default: float            # or {order: 2, scale: sample}
layers:
  layer2.0.conv1: {order: 2, scale: static, betas: [0.8, 0.3]}
  head: float
```
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

from horq_tvm import extras, yamlfile
from horq_tvm.errors import UsageError
from horq_tvm.specs import MAX_ORDER, SCALES, LayerConfig

UNSET: Final = "unset"


@dataclass(frozen=True)
class Plan:
    """What the plan says: of every layer in `layers`, and of the others in `default`.

    A LayerConfig binarises, None leaves a layer float. `default` is UNSET where the plan has none, so that whoever
    speaks next (the model's own HORQ node, the command line) decides.
    """

    default: LayerConfig | Literal["unset"] | None = UNSET
    layers: Mapping[str, LayerConfig | None] = field(default_factory=dict)
    source: str = "plan"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))

    def check_names(self, names: Iterable[str]) -> None:
        """Every layer of the plan is one of the model's `names`.

        Raises:
            UsageError: lists the unknown layers and the names there are, the closest first.
        """
        accepted = list(names)
        unknown = [name for name in self.layers if name not in accepted]
        if not unknown:
            return
        close: list[str] = []
        for name in unknown:
            close += difflib.get_close_matches(name, accepted, n=3)
        ordered = list(dict.fromkeys([*close, *accepted]))
        raise UsageError(
            f"{self.source}: layers: no layer {', '.join(map(repr, unknown))} in the model;"
            f" accepted: {', '.join(ordered) or 'none, it has no conv or dense layer'}"
        )


def load_plan(plan: str | Path | Mapping[str, Any]) -> Plan:
    """A plan from a YAML file, or from the same as a dict.

    Raises:
        UsageError: names the file, the key, what was found and what is accepted.
        HorqError: PyYAML or pydantic is not installed.
    """
    if isinstance(plan, Mapping):
        source, document = "plan", dict(plan)
    else:
        source, document = str(plan), yamlfile.load(plan)
    try:
        from horq_tvm.plan_schema import PlanFile
    except ImportError as error:
        raise extras.missing(error) from error

    record = yamlfile.validate(PlanFile, document, source)
    default: LayerConfig | Literal["unset"] | None = UNSET
    if "default" in record.model_fields_set:
        default = _layer(record.default, f"{source}: default")
        if default is not None and default.betas is not None:
            raise UsageError(f"{source}: default.betas: betas belong to a layer; accepted: order and scale")
    layers = {name: _layer(value, f"{source}: layers.{name}") for name, value in record.layers.items()}
    return Plan(default, layers, source)


def layer_config(order: int, scale: str, betas: Iterable[float] | None = None, where: str = "") -> LayerConfig:
    """A checked LayerConfig; `where` stands before what an error says.

    Raises:
        UsageError: an order outside 1…8, an unknown scale, or betas that are not `order` positive numbers of a `static`
            layer.
    """
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= MAX_ORDER:
        raise UsageError(f"{where}order: found {order!r}; accepted: 1 to {MAX_ORDER}")
    known = {name: name for name in SCALES}
    if scale not in known:
        raise UsageError(f"{where}scale: found {scale!r}; accepted: {', '.join(SCALES)}")
    if betas is None:
        return LayerConfig(order, known[scale])
    values = tuple(float(beta) for beta in betas)
    if scale != "static":
        raise UsageError(
            f"{where}betas: given with scale {scale!r}, which takes them from the input; accepted: scale static"
        )
    if len(values) != order:
        raise UsageError(f"{where}betas: found {len(values)} with order {order}; accepted: one a plane")
    for beta in values:
        if not (math.isfinite(beta) and beta > 0):
            raise UsageError(f"{where}betas: found {beta!r}; accepted: finite numbers above 0")
    return LayerConfig(order, known[scale], values)


def _layer(value: Any, where: str) -> LayerConfig | None:
    """What a plan says of one layer: the word `float` (None), or order, scale and perhaps betas."""
    from horq_tvm.plan_schema import LayerRecord

    if value == "float":
        return None
    if not isinstance(value, Mapping):
        raise UsageError(f"{where}: found {value!r}; accepted: float, or a mapping such as {{order: 2, scale: sample}}")
    record = yamlfile.validate(LayerRecord, value, where)
    return layer_config(record.order, record.scale, record.betas, f"{where}.")
