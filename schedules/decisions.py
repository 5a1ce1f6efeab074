"""What a schedule rule leaves open: each choice by name, its options, and what the analytic model would take.

A rule asks `decide(name, options, default)` and goes on with the answer, so a default kernel and a tuned one come out
of the same function, and what a later choice offers may depend on an earlier one. Options are numbers or words, so
that a record of them is JSON.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias, TypeVar

Option: TypeAlias = "int | str"
Decisions: TypeAlias = "Mapping[str, Option]"
T = TypeVar("T", int, str)


class Decide(Protocol):
    """One of `options`, of which `default` is one."""

    def __call__(self, name: str, options: Sequence[T], default: T, /) -> T: ...


def by_default(_name: str, _options: Sequence[T], default: T) -> T:
    """The choice of the analytic model."""
    return default


class Recorded:
    """The choices of `values`; the default where they do not say or say what is not offered, which is then `stale`.

    `taken` is what was chosen, in the order in which the rule asked; `offered` what it could choose from.
    """

    def __init__(self, values: Decisions) -> None:
        self._values = dict(values)
        self.taken: dict[str, Option] = {}
        self.offered: dict[str, tuple[Option, ...]] = {}
        self.stale: dict[str, Option] = {}

    def __call__(self, name: str, options: Sequence[T], default: T) -> T:
        if default not in options:
            raise AssertionError(f"the default {default!r} of {name!r} is not one of {list(options)}")
        chosen = self._choose(name, options, default)
        self.taken[name], self.offered[name] = chosen, tuple(options)
        return chosen

    def _choose(self, name: str, options: Sequence[T], default: T) -> T:
        for option in options:
            if name in self._values and type(option) is type(self._values[name]) and option == self._values[name]:
                return option
        if name in self._values:
            self.stale[name] = self._values[name]
        return default

    @property
    def fits(self) -> bool:
        """Whether the values are choices of this very rule: none is stale, none was passed over."""
        return not self.stale and self._values.keys() <= self.taken.keys()


class Sampled(Recorded):
    """The choices of `values`, and where they do not say any option, each as likely as another."""

    def __init__(self, rng: random.Random, values: Decisions | None = None) -> None:
        super().__init__(values or {})
        self._rng = rng

    def _choose(self, name: str, options: Sequence[T], default: T) -> T:
        if name in self._values:
            return super()._choose(name, options, default)
        return self._rng.choice(options)
