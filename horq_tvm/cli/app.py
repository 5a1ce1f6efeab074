"""The parser, and how an error becomes one line and an exit code.

0: done. 1: the work failed. 2: the call was mistaken. A new verb is a module with `add(verbs)`, listed in `VERBS`.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from horq_tvm import extras
from horq_tvm.cli import bench, build, inspect, merge, run, targets, tune
from horq_tvm.cli.options import Parser
from horq_tvm.cli.show import version
from horq_tvm.errors import HorqError, UsageError

VERBS = (build, run, tune, merge, bench, inspect, targets)

DESCRIPTION = "Compile a CNN to a shared library whose convolutions are XOR and popcount (HORQ)."
EPILOG = "Exit codes: 0 done; 1 the work failed; 2 the call was mistaken. Each verb has its own --help."


def parser() -> Parser:
    """The whole command line; each verb's arguments carry `run`, the function that does the work."""
    top = Parser(prog="horq-tvm", description=DESCRIPTION, epilog=EPILOG)
    top.add_argument("--version", action="version", version=f"horq-tvm {version()}")
    verbs = top.add_subparsers(title="verbs", dest="verb", metavar="VERB", required=True)
    for module in VERBS:
        module.add(verbs)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. `argv` defaults to the process's arguments."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        arguments = parser().parse_args(words)
        with _our_warnings_only(debug):
            arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`| head`) has seen enough. Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        _report("interrupted", debug)
        return 130
    except Exception as error:
        return _failure(error, debug)
    return 0


def _failure(error: Exception, debug: bool) -> int:
    if isinstance(error, ImportError):
        try:
            error = extras.missing(error)
        except ImportError as unexplained:
            error = unexplained
    if isinstance(error, HorqError):
        _report(str(error), debug)
    elif isinstance(error, OSError):
        _report(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error), debug)
    else:
        _report(f"internal error, please report it: {type(error).__name__}: {error} (--debug shows where)", debug)
    return 2 if isinstance(error, UsageError) else 1


def _report(message: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(f"horq-tvm: error: {' '.join(message.split())}", file=sys.stderr)


@contextmanager
def _our_warnings_only(debug: bool) -> Iterator[None]:
    """Our own warnings as one line each on stderr; those of the libraries beneath us only with --debug."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print(f"horq-tvm: warning: {' '.join(str(message).split())}", file=sys.stderr)

    if debug:
        yield
        return
    silent = logging.root.manager.disable
    logging.disable(logging.WARNING)  # ONNX Runtime's quantiser logs on the root logger
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", module=r"horq_tvm(\.|$)")
            warnings.showwarning = show
            yield
    finally:
        logging.disable(silent)
