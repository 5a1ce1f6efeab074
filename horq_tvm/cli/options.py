"""The parser's manners, and the options that several verbs take."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from horq_tvm.cli.arrays import read_npz
from horq_tvm.errors import UsageError
from horq_tvm.specs import MAX_ORDER, RESTS, SCALES

Verbs = Any  # argparse's subparsers action has no public type
FLOAT = "float"


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, and without guessed abbreviations, which break once options are added."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def add_verb(verbs: Verbs, name: str, summary: str, run: Callable[[argparse.Namespace], None]) -> Parser:
    """A verb's parser; `run` is what `main` calls with the parsed arguments."""
    verb: Parser = verbs.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    verb.add_argument("--debug", action="store_true", help="show the traceback of an error, and every warning")
    verb.set_defaults(run=run)
    return verb


def add_json_option(verb: Parser) -> None:
    """--json FILE, `-` for standard output, where nothing else goes then."""
    verb.add_argument("--json", metavar="FILE", help="write the result as JSON; - for standard output")


def above_zero(unit: str) -> Callable[[str], float]:
    """A finite number of `unit` above 0."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"found {text!r}; accepted: a number of {unit} above 0")
        return value

    return parse


def add_threads_option(verb: Parser) -> None:
    """--threads N, 1 by default."""
    verb.add_argument("--threads", type=_threads, default=1, metavar="N", help="threads of one run (default: 1)")


def add_model_options(verb: Parser) -> None:
    """What decides how a model is compiled; `build_arguments` hands it to `horq_tvm.build`."""
    group = verb.add_argument_group("how the model is compiled")
    group.add_argument(
        "--target", metavar="NAME", help="one of `horq-tvm targets`, or FILE.yaml:NAME (default: native)"
    )
    group.add_argument(
        "--order",
        type=_order,
        metavar="N|float",
        help=f"binary planes of an activation, 1 to {MAX_ORDER}; float rewrites nothing (default: 2)",
    )
    group.add_argument("--scale", choices=SCALES, help="where a plane's scale is taken (default: sample)")
    group.add_argument("--plan", metavar="PLAN.yaml", help="per-layer plan; it overrides --order and --scale")
    group.add_argument(
        "--calibration", metavar="X.npz", help="inputs by name, axis 0 the samples (for --scale static and --rest int8)"
    )
    group.add_argument(
        "--rest", choices=RESTS, help="arithmetic of the layers that stay unbinarised (default: float32)"
    )
    group.add_argument(
        "--input",
        type=_input_shape,
        action="append",
        default=[],
        metavar="NAME=1,3,224,224",
        help="shape of an input whose shape the model leaves open; may be repeated",
    )
    group.add_argument(
        "--tap",
        action="append",
        nargs="+",
        default=[],
        metavar="LAYER",
        help="also output a layer's input, scales, planes and output; stands behind MODEL",
    )


def build_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `horq_tvm.build`; what was not given on the command line is left out."""
    options: dict[str, Any] = {
        "target": arguments.target,
        "order": arguments.order,
        "scale": arguments.scale,
        "plan": arguments.plan,
        "rest": arguments.rest,
        "taps": tuple(name for names in arguments.tap for name in names),
        "input_shapes": dict(arguments.input),
    }
    if arguments.calibration is not None:
        options["calibration"] = read_npz(arguments.calibration)
    return {name: value for name, value in options.items() if value not in (None, (), {})}


def _order(text: str) -> int | str:
    if text == FLOAT:
        return FLOAT
    if not text.isdecimal() or not 1 <= int(text) <= MAX_ORDER:
        raise argparse.ArgumentTypeError(f"found {text!r}; accepted: 1 to {MAX_ORDER}, or float")
    return int(text)


def _threads(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; accepted: a number from 1")
    return int(text)


def _input_shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, equals, shape = text.rpartition("=")
    sizes = shape.split(",")
    if not equals or not name or not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"found {text!r}; accepted: NAME=1,3,224,224")
    return name, tuple(int(size) for size in sizes)
