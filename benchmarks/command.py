"""What every benchmark's command does around its work: the exit code, and one line where something is wrong."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from horq_tvm import extras, targets
from horq_tvm.cli.show import write_json
from horq_tvm.errors import HorqError, UsageError
from horq_tvm.files import check_writable


def execute(
    name: str,
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], None],
    argv: Sequence[str] | None = None,
) -> int:
    """Runs `benchmarks.<name>` on `argv`, by default the process's: 0 done, 1 the work failed, 2 the call was mistaken.

    An error is one line on standard error; with --debug its traceback stands before it. A --json that cannot be
    written is told before anything is measured.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        given = parser.parse_args(words)
        if getattr(given, "json", None) not in (None, "-"):
            check_writable(given.json)
        run(given)
    except (HorqError, ImportError) as caught:
        error = extras.missing(caught) if isinstance(caught, ImportError) else caught
        if "--debug" in words:
            traceback.print_exc()
        print(f"benchmarks.{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def deliver(records: list[Any], json: str | None, describe: Callable[[list[Any]], str]) -> None:
    """Writes the records to the file `json` and prints their description; "-" prints the records alone."""
    if json is not None:
        write_json(json, records)
    if json != "-":
        print(describe(records))


def target_that_runs_here(name: str) -> targets.Target:
    """The target `name`. UsageError where this machine lacks what it needs: nothing could be timed."""
    target = targets.resolve(name)
    missing = target.missing_on(targets.this_host().flags)
    if missing:
        raise UsageError(f"target {target.name} cannot be timed here: this machine lacks {', '.join(missing)}")
    return target
