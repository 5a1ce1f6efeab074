"""Values of the benchmarks' options, each refused in one line that says what was found and what is accepted."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from horq_tvm.specs import MAX_ORDER


def orders(text: str) -> tuple[int, ...]:
    """1,2: planes K, each from 1 to 8."""
    words = tuple(dict.fromkeys(text.split(",")))
    if not all(word.isdecimal() and 1 <= int(word) <= MAX_ORDER for word in words):
        raise argparse.ArgumentTypeError(f"found {text!r}; accepted: orders from 1 to {MAX_ORDER}, as in 1,2")
    return tuple(int(word) for word in words)


def count(text: str) -> int:
    """A number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; accepted: a number from 1")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """1,2: numbers from 1, each once."""
    words = text.split(",")
    if not all(word.isdecimal() and int(word) >= 1 for word in words):
        raise argparse.ArgumentTypeError(f"found {text!r}; accepted: numbers from 1, as in 1,2")
    return tuple(dict.fromkeys(int(word) for word in words))


def seconds(text: str) -> float:
    """A time above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 3600:
        raise argparse.ArgumentTypeError(f"found {text!r}; accepted: a number of seconds above 0")
    return value


def listed(accepted: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """One or more of `accepted`, separated by commas."""

    def parse(text: str) -> tuple[str, ...]:
        words = tuple(dict.fromkeys(text.split(",")))
        if not set(words) <= set(accepted):
            raise argparse.ArgumentTypeError(f"found {text!r}; accepted: {', '.join(accepted)}, separated by commas")
        return words

    return parse
