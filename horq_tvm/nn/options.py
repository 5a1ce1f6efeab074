"""The options that HORQ layers share, and how a wrong one is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from horq_tvm.errors import UsageError
from horq_tvm.specs import Scale
from horq_tvm.torch_ops import check_order_and_scale

Ste = Literal["residual", "window", "approxsign", "tanh", "identity"]
Beta = Literal["learned", "running"]


@dataclass(frozen=True)
class HorqOptions:
    """What a HORQ layer has beside its geometry; `HorqLayer` says what each means.

    Raises UsageError for a value that there is not.
    """

    order: int
    scale: Scale
    ste: Ste
    beta: Beta
    balance: bool

    def __post_init__(self) -> None:
        check_order_and_scale(self.order, self.scale)
        for name, found, accepted in (("ste", self.ste, get_args(Ste)), ("beta", self.beta, get_args(Beta))):
            if found not in accepted:
                raise UsageError(f"{name} {found!r}; accepted are {', '.join(accepted)}")


def pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """(vertical, horizontal), each at least 1; one int stands for both."""
    values = (value, value) if isinstance(value, int) else tuple(value)
    if len(values) != 2 or not _all_from(1, values):
        raise UsageError(f"{name}={value!r}; accepted: an int or 2 ints, each >= 1")
    return values[0], values[1]


def sides(name: str, value: int | Sequence[int]) -> tuple[int, int, int, int]:
    """(top, left, bottom, right), each at least 0, of one int, of (vertical, horizontal), or of all four."""
    values = (value, value) if isinstance(value, int) else tuple(value)
    if len(values) not in (2, 4) or not _all_from(0, values):
        raise UsageError(f"{name}={value!r}; accepted: an int or 2 or 4 ints, each >= 0")
    top, left, bottom, right = values * (4 // len(values))
    return top, left, bottom, right


def _all_from(least: int, values: Sequence[int]) -> bool:
    return all(isinstance(value, int) and value >= least for value in values)
