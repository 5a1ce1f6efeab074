"""What every benchmark's command does around its work: the exit code, and one line where something is wrong."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence

from horq_tvm import extras, targets
from horq_tvm.errors import HorqError, UsageError


def execute(
    name: str,
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], None],
    argv: Sequence[str] | None = None,
) -> int:
    """Runs `benchmarks.<name>` on `argv`, by default the process's: 0 done, 1 the work failed, 2 the call was mistaken.

    An error is one line on standard error; with --debug its traceback stands before it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        run(parser.parse_args(words))
    except (HorqError, ImportError) as caught:
        error = extras.missing(caught) if isinstance(caught, ImportError) else caught
        if "--debug" in words:
            traceback.print_exc()
        print(f"benchmarks.{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def target_that_runs_here(name: str) -> targets.Target:
    """The target `name`. UsageError where this machine lacks what it needs: nothing could be timed."""
    target = targets.resolve(name)
    missing = target.missing_on(targets.this_host().flags)
    if missing:
        raise UsageError(f"target {target.name} cannot be timed here: this machine lacks {', '.join(missing)}")
    return target
