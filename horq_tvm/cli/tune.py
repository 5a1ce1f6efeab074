"""`horq-tvm tune`: measure schedules on a device, and keep what is found in a database that `build` uses."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from horq_tvm.cli import options
from horq_tvm.cli.show import table, write_json
from horq_tvm.files import check_writable

if TYPE_CHECKING:
    from horq_tvm.tuning.api import Progress


def add(verbs: options.Verbs) -> None:
    """Add the verb to the parser."""
    verb = options.add_verb(verbs, "tune", "measure schedules on a device, for builds to use", run)
    verb.add_argument("model", metavar="MODEL", help="an .onnx file, or an ExportedProgram saved as .pt2")
    verb.add_argument(
        "--trials",
        type=_trials,
        required=True,
        metavar="N",
        help="measurements that the database shall hold of this model's kernels in the end; a killed run goes on",
    )
    verb.add_argument("--database", required=True, metavar="DIR", help="the folder to keep them in; made if missing")
    verb.add_argument(
        "--minutes", type=options.above_zero("minutes"), metavar="M", help="stop after so long, whatever is left"
    )
    verb.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (default: 0)")
    verb.add_argument("--rpc", metavar="HOST:PORT", help="an RPC tracker, whose devices under --key measure")
    verb.add_argument("--key", metavar="KEY", help="under which the devices are known to the tracker")
    options.add_model_options(verb)
    options.add_json_option(verb)


def run(arguments: argparse.Namespace) -> None:
    """Tune, and say what became of each kernel."""
    if arguments.json not in (None, "-"):
        check_writable(arguments.json, sources=(arguments.model, arguments.plan, arguments.calibration))
    given = options.build_arguments(arguments)
    import horq_tvm

    how = {name: getattr(arguments, name) for name in ("trials", "database", "minutes", "seed", "rpc", "key")}
    with _progress() as tell:
        report = horq_tvm.tune(arguments.model, progress=tell, **how, **given).to_dict()
    if arguments.json is not None:
        write_json(arguments.json, report)
    if arguments.json != "-":
        print(describe(report))


def describe(report: Mapping[str, Any]) -> str:
    """A run's report as text."""
    rows = [
        (
            ", ".join(task["layers"][:2]) + (", ..." if len(task["layers"]) > 2 else "") or "-",
            task["name"],
            task["records"],
            _ms(task["default_ms"]),
            _ms(task["best_ms"]),
            "tuned" if task["used"] else "default",
        )
        for task in report["tasks"]
    ]
    seconds, tasks = report["seconds"], report["tasks"]
    tuned = [task for task in tasks if task["used"]]
    gain = sum((task["default_ms"] - task["best_ms"]) * task["calls"] for task in tuned)
    known = sum((task["default_ms"] or 0) * task["calls"] for task in tasks)
    return "\n".join(
        [
            f"{report['database']}",
            f"{report['added']} measurements added, {report['failed']} of them failed; {len(tuned)} of {len(tasks)}"
            f" kernels are faster than their default, {gain:.3f} of {known:.3f} ms a run",
            f"{seconds['total']:.0f} s: {_share(seconds, 'measuring')} measuring, {_share(seconds, 'compiling')}"
            f" compiling ({seconds['compiling_each'] * 1e3:.0f} ms each), {_share(seconds, 'searching')} searching",
            "",
            table(("layers", "kernel", "records", "default ms", "best ms", "build takes"), rows),
        ]
    )


def _share(seconds: Mapping[str, float], part: str) -> str:
    return f"{seconds[part] / max(seconds['total'], 1e-9):.0%}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    """A bar with the task, the trials, the best so far against the default and the time left, on a terminal."""
    if not sys.stderr.isatty():
        yield lambda _progress: None
        return
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar
    except ImportError:
        yield lambda progress: print(_line(progress), file=sys.stderr)
        return
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}")]
    from rich.console import Console

    with Bar(*columns, console=Console(stderr=True)) as bar:
        shown = bar.add_task("starting", total=None, left="")

        def tell(progress: Progress) -> None:
            bar.update(
                shown,
                description=_doing(progress),
                completed=progress.done,
                total=progress.trials,
                left=_left(progress),
            )

        yield tell


def _line(progress: Progress) -> str:
    return f"{_doing(progress)}  {progress.done}/{progress.trials} {_left(progress)}"


def _doing(progress: Progress) -> str:
    if progress.best_ms is None or progress.default_ms is None:
        return progress.doing
    return f"{progress.doing}: best {progress.best_ms:.4f} ms, default {progress.default_ms:.4f} ms"


def _left(progress: Progress) -> str:
    if progress.left_s is None:
        return ""
    minutes, seconds = divmod(round(progress.left_s), 60)
    return f"{minutes}:{seconds:02d} left"


def _trials(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; accepted: a number from 1")
    return int(text)
