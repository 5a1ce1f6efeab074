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


def integers(name: str, value: int | Sequence[int], lengths: tuple[int, ...], least: int) -> tuple[int, ...]:
    """`value` as a tuple of the greatest of `lengths`: one int stands for all, a pair for (vertical, horizontal)."""
    full = max(lengths)
    values = (value,) * full if isinstance(value, int) else tuple(value)
    if len(values) not in (*lengths, full) or any(not isinstance(v, int) or v < least for v in values):
        raise UsageError(
            f"{name}={value!r}; accepted: an int or {' or '.join(map(str, lengths))} ints, each >= {least}"
        )
    # (top, left, bottom, right) of (vertical, horizontal)
    return values * (full // len(values))
