"""`python -m benchmarks.tuning`: networks tuned, and timed against their default; the curve of a run as a picture; with
--ship, the database that the package ships.

With --trials a run of `horq_tvm.tune` comes first (it goes on where it was, so it may be done in pieces). Then the
default library and the tuned one are timed in turn in one process, end to end and layer by layer, beside the time that
the layers' arithmetic takes at the register-only peak of the same run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import horq_tvm
from horq_tvm import targets
from horq_tvm.cli import options
from horq_tvm.cli.show import progress, table
from horq_tvm.cli.tune import describe as describe_run
from horq_tvm.compiler import CompiledModel
from horq_tvm.files import replacing
from horq_tvm.runtime.loader import LoadedModel
from horq_tvm.tuning.database import SUFFIX, Database, target_key

from .arguments import count, listed, orders, seconds
from .command import deliver, execute, target_that_runs_here
from .measure import aligned_copy, alternate, pinned, ratio
from .networks import subjects
from .networks.arithmetic import floors_ms, layer_work
from .networks.engines import Peaks, block_probe, rests_of, step_names, steps_probe

Record = dict[str, Any]


def measure(given: argparse.Namespace, target: targets.Target, folder: Path) -> Iterator[Record]:
    """Networks and orders, each tuned as far as asked for, then compared."""
    with pinned(1):
        peaks = Peaks.find(target)
    for name in given.network:
        (subject,) = subjects.find(name, 1, ("signed",), "deployed", folder)[:1]
        for order in given.orders:
            arguments: dict[str, Any] = {"input_shapes": subject.shapes, **subject.arguments(order, "static")}
            arguments |= {"calibration": subjects.calibration(subject)} if len(arguments) > 1 else {}
            model = subject.horq(order, "static")
            if given.trials:
                how: dict[str, Any] = {"trials": given.trials, "database": given.database, "minutes": given.minutes}
                with _without_warnings():
                    run = horq_tvm.tune(model, target, **how, seed=given.seed, **arguments)
                print(describe_run(run.to_dict()), file=sys.stderr)
            with _without_warnings():
                made = [
                    horq_tvm.build(model, target, database=database, **arguments)
                    for database in (_empty(folder), given.database)
                ]
            work = layer_work(subject, order, "static", rests_of(made[0].load()))
            yield {
                "network": name,
                "order": order,
                "target": target.name,
                **_compared(made, subjects.feeds(subject), work, peaks, given.seconds),
            }


def _compared(made: Sequence[CompiledModel], feeds: Any, work: Any, peaks: Peaks, budget: float) -> Record:
    """Medians over the rounds; the ratio is that of the rounds' ratios."""
    models = dict(zip(("default", "tuned"), (compiled.load() for compiled in made), strict=True))
    aligned = {name: aligned_copy(array) for name, array in feeds.items()}
    probes = peaks.probes()
    for label, model in models.items():
        probes.append(block_probe(label, partial(model, **aligned)))
        probes.append(steps_probe(label, model, feeds))
    samples = alternate(probes, budget)
    rates = peaks.rates(samples)
    floor = sum(floors_ms(work.values(), rates).values())
    found: Record = {f"{label}_ms": statistics.median(samples[label]) / 1e6 for label in models}
    found |= {"over_default": ratio(samples["tuned"], samples["default"]), "floor_ms": floor}
    found["rounds"] = len(samples["default"])
    found["layers"] = [
        {**layer, "floor_us": work[layer["layer"]].floor_ms(rates) * 1e3 if layer["layer"] in work else None}
        for layer in _layers(models, samples, aligned)
    ]
    return found


def _layers(models: dict[str, LoadedModel], samples: dict[str, list[float]], feeds: Any) -> Iterator[Record]:
    """The steps of both; they are the same, each with its own time."""
    steps = {label: model.profile(runs=1, **feeds) for label, model in models.items()}
    tuned = {layer.name: layer.schedule for layer in models["tuned"].manifest.layers}
    names = {label: step_names(label, len(found)) for label, found in steps.items()}
    for step, *own in zip(steps["default"], names["default"], names["tuned"], strict=True):
        before, after = (samples[name] for name in own)
        layer = step.name.partition(" ")[2]
        yield {
            "step": step.name,
            "layer": layer,
            "schedule": tuned.get(layer),
            "default_us": statistics.median(before) / 1e3,
            "tuned_us": statistics.median(after) / 1e3,
            "over_default": ratio(after, before),
        }


def curve(database: Path, target: targets.Target, out: Path) -> None:
    """Draws, of each workload with more than one measurement, the best so far over the default against measurements."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    store = Database.open(database)
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for path in sorted((store.folder / target_key(target)).glob(f"*{SUFFIX}")):
        found = [r for r in store.records(target, path.stem) if r.kind == "measurement"]
        if len(found) < 4:
            continue
        best, heights = float("inf"), []
        for record in found:
            best = min(best, record.median)
            heights.append(best / found[0].median)
        axes.step(range(1, len(heights) + 1), heights, where="post", label=f"{found[0].rule} {path.stem[:6]}")
    axes.set(xlabel="measurements of the kernel", ylabel="best so far / default", title=target.name)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6, ncols=2)
    with replacing(out) as partial_path:
        figure.savefig(partial_path, format="png", dpi=120, bbox_inches="tight")


def describe(records: Sequence[Record]) -> str:
    """The records as text: end to end, then the steps that changed."""
    rows = [
        (
            r["network"],
            r["order"],
            f"{r['default_ms']:.3f}",
            f"{r['tuned_ms']:.3f}",
            f"{r['over_default']:.3f}",
            f"{r['floor_ms']:.3f}",
            f"{r['tuned_ms'] / r['floor_ms']:.2f}",
        )
        for r in records
    ]
    columns = ("network", "K", "default ms", "tuned ms", "tuned / default", "arithmetic ms", "tuned / arithmetic")
    parts = [table(columns, rows)]
    for r in records:
        steps = [
            (s["step"], s["schedule"], f"{s['default_us']:.1f}", f"{s['tuned_us']:.1f}", f"{s['over_default']:.3f}")
            + ((f"{s['floor_us']:.1f}", f"{s['tuned_us'] / s['floor_us']:.2f}") if s["floor_us"] else (None, None))
            for s in sorted(r["layers"], key=lambda s: -s["default_us"])
        ]
        title = f"{r['network']} K={r['order']} {r['target']}, {r['rounds']} rounds"
        names = ("step", "schedule", "default us", "tuned us", "tuned / default", "arithmetic us", "tuned / arithmetic")
        parts.append(f"{title}\n{table(names, steps)}")
    return "\n\n".join(parts)


class _without_warnings(warnings.catch_warnings):  # noqa: N801
    """What `build` says of a rewrite without training is no matter here."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.simplefilter("ignore", UserWarning)
        return entered


def _empty(folder: Path) -> Path:
    return Database.open(folder / "empty", create=True).folder


def parser() -> options.Parser:
    """The command's arguments."""
    found = options.Parser(prog="python -m benchmarks.tuning", description=__doc__)
    found.add_argument("--network", type=listed(subjects.NAMES), default=("resnet18",), metavar="NAME,...")
    found.add_argument("--orders", type=orders, default=(1, 2), metavar="N,...")
    found.add_argument("--target", default="native", metavar="NAME")
    found.add_argument("--database", type=Path, required=True, metavar="DIR")
    found.add_argument("--trials", type=count, default=0, metavar="N", help="tune first, up to so many measurements")
    found.add_argument("--minutes", type=float, metavar="M", help="of tuning")
    found.add_argument("--seed", type=int, default=0, metavar="N")
    found.add_argument("--seconds", type=seconds, default=8.0, metavar="S", help="of timing, a network and order")
    found.add_argument("--curve", type=Path, metavar="OUT.png", help="draw the database's curve, measure nothing")
    found.add_argument("--ship", type=Path, metavar="OUT", help="put the picks that are used into OUT, measure nothing")
    found.add_argument("--debug", action="store_true")
    options.add_json_option(found)
    return found


def run(given: argparse.Namespace) -> None:
    """Measure, or draw, or make what the package ships."""
    if given.ship:
        kept = Database.open(given.database).ship(given.ship)
        print(f"{given.ship}: {kept.records} records of {kept.kernels} kernels")
        return
    target = target_that_runs_here(given.target)
    if given.curve:
        curve(given.database, target, given.curve)
        return
    with tempfile.TemporaryDirectory(prefix="horq-tuning-") as folder, progress() as say:
        say("tuning and timing")
        records = list(measure(given, target, Path(folder)))
    deliver(records, given.json, describe)


def main(argv: Sequence[str] | None = None) -> int:
    """0 done, 1 the work failed, 2 the call was mistaken."""
    return execute("tuning", parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
