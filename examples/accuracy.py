"""The tables and the plot of docs/accuracy.md, made again from measurements.

    python examples/accuracy.py [runs/*.json] [--docs docs]

The files are those that train.py writes, and those of `python -m examples.engines --json` and of `python -m
benchmarks.training --json`. They are merged into docs/accuracy.json, newer ones of the same network and setting in
place of older ones; the tables between `<!-- table -->` marks of docs/accuracy.md and the picture docs/accuracy.png
follow from that file alone.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from horq_tvm.errors import HorqError, UsageError
from horq_tvm.files import replacing

SCALES = ("static", "sample", "patch")
STES = ("residual", "window", "approxsign", "tanh", "identity")
# Test error in percent, as reported for the paper: HORQ is K=2, XNOR K=1.
PAPER_MNIST = {1: 1.96, 2: 1.25}
# By so many points below float at most: what was reported for XNOR (K=1) and HORQ (K=2), and an aim of our own for K=3.
CIFAR_BOUNDS = {1: 5.0, 2: 2.0, 3: 1.5}
# Runs of this --tag are too short for the tables of accuracy.
STE_TAG = "ste"


@dataclass(frozen=True)
class Result:
    """One run of train.py. Errors and accuracies are of the whole test set, from 0 to 1."""

    name: str
    dataset: str
    network: str
    order: int | str
    scale: str
    seed: int
    epochs: int
    accuracy: float
    start: str | None
    approximation: tuple[dict[str, Any], ...]
    command: str
    hardware: str
    tag: str
    # Results from before there was a choice have these.
    ste: str = "residual"
    beta: str = "learned"

    @property
    def compares_ste(self) -> bool:
        """Made for the table of straight-through estimators alone: an unusual one, or its default twin's tag."""
        return self.tag == STE_TAG or (self.ste, self.beta) != ("residual", "learned")

    def lost(self, order: int, scale: str) -> float:
        """‖X − X̂‖²/‖X‖² of its float activations by so many planes, the mean over the layers."""
        return next(p["error"] for p in self.approximation if (p["order"], p["scale"]) == (order, scale))


@dataclass(frozen=True)
class Measured:
    """All there is: runs of train.py by name; records of `engines`, of `training` by what tells them apart."""

    runs: dict[str, dict[str, Any]]
    engines: dict[str, dict[str, Any]]
    layers: dict[str, dict[str, Any]]
    steps: dict[str, dict[str, Any]]

    @property
    def results(self) -> list[Result]:
        return [result(name, found) for name, found in sorted(self.runs.items())]

    def add(self, path: Path) -> None:
        """Raises UsageError for a file that cannot be read, HorqError for one that holds none of the three."""
        try:
            found = json.loads(path.read_text())
            if isinstance(found, dict):
                result(path.stem, found)
                self.runs[path.stem] = found
            else:
                self._add_records(found)
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise HorqError(f"{path}: found no measurements ({type(error).__name__}: {error})") from error

    def _add_records(self, records: list[dict[str, Any]]) -> None:
        if not records:
            raise ValueError("an empty list")
        for record in records:
            if "engines" in record:
                self.engines[f"{record['network']}: {' and '.join(record['engines'])}"] = record
            elif "engine" in record and "outside" in record:
                self.layers[f"{record['network']}: {record['engine']}"] = record
            else:
                key = ("network", "order", "scale", "bf16", "batch", "threads", "compile")
                self.steps[" ".join(str(record[part]) for part in key)] = record


def result(name: str, found: dict[str, Any]) -> Result:
    recent = {key: found[key] for key in ("ste", "beta") if key in found}
    others = Result.__dataclass_fields__.keys() - {"name", "approximation", "ste", "beta"}
    values = {key: found[key] for key in others}
    return Result(name, **values, **recent, approximation=tuple(found["approximation"]))


# --- Tables -----------------------------------------------------------------------------------------------------------


def title(result: Result) -> str:
    names = {"float": "float", "bw": "binary weights, float activations (K → ∞)"}
    return names.get(str(result.order), f"HORQ K={result.order}, {result.scale}")


def cifar10(results: Sequence[Result]) -> list[str]:
    """A row a run: accuracy, distance from the float network of the same name, and what it took."""
    runs = [r for r in results if r.dataset == "cifar10" and not r.compares_ste]
    if not runs:
        return ["No results yet."]
    ranks = {"float": -2, "bw": -1}
    by_name = {r.name: r for r in runs}
    runs.sort(key=lambda r: epochs_in_all(r, by_name))
    runs.sort(key=lambda r: (r.network, r.seed, ranks.get(str(r.order)) or -int(r.order) + 10, SCALES.index(r.scale)))
    # Where there are two, the one that was trained for longer.
    longest = sorted((r for r in runs if r.order == "float"), key=lambda r: epochs_in_all(r, by_name))
    floats = {(r.network, r.seed): r for r in longest}
    rows = [
        "| network | layers | accuracy, % | points below float | aim | epochs (with earlier ones) |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for run in runs:
        twin = floats.get((run.network, run.seed))
        below = f"{100 * (twin.accuracy - run.accuracy):.2f}" if twin and twin is not run else ""
        bound = f"≤ {CIFAR_BOUNDS[run.order]}" if run.order in CIFAR_BOUNDS else ""
        passes = f"{run.epochs} ({epochs_in_all(run, by_name)})"
        cells = (run.network, title(run), f"{100 * run.accuracy:.2f}", below, bound, passes)
        rows.append(f"| {' | '.join(cells)} |")
    return [*rows, "", *commands(runs)]


def epochs_in_all(run: Result, by_name: dict[str, Result]) -> int:
    """Its own epochs and those of the checkpoints it goes back to, as far as their results are known."""
    earlier = by_name.get(Path(run.start).stem) if run.start else None
    return run.epochs + (epochs_in_all(earlier, by_name) if earlier else 0)


def mnist(results: Sequence[Result]) -> list[str]:
    """A row an order, a column a scale: test errors in percent, mean ± deviation over the seeds."""
    runs = [r for r in results if r.dataset == "mnist" and not r.compares_ste]
    if not runs:
        return ["No results yet."]
    rows = [
        f"| test error, % | {' | '.join(SCALES)} | the paper |",
        "|---|--:|--:|--:|--:|",
    ]
    orders = sorted({r.order for r in runs if isinstance(r.order, int)})
    for order in orders:
        cells = [spread([r for r in runs if r.order == order and r.scale == scale]) for scale in SCALES]
        rows.append(f"| K={order} | {' | '.join(cells)} | {PAPER_MNIST.get(order, '')} |")
    for order, name in (("bw", "K → ∞: binary weights, float activations"), ("float", "float")):
        if own := [r for r in runs if r.order == order]:
            rows.append(f"| {name} | {spread(own)} | | | |")
    return [*rows, "", *commands(runs)]


def spread(runs: Sequence[Result]) -> str:
    """Mean ± sample deviation of the test error in percent, and of how many seeds."""
    if not runs:
        return "–"
    errors = [100 * (1 - r.accuracy) for r in runs]
    deviation = f" ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
    return f"{statistics.fmean(errors):.2f}{deviation} ({len(errors)})"


def estimators(results: Sequence[Result]) -> list[str]:
    """A row an estimator, a column a network and setting that were trained with several: test errors in percent."""
    alike: dict[tuple[Any, ...], list[Result]] = {}
    for r in results:
        if isinstance(r.order, int):
            alike.setdefault((r.network, r.order, r.scale, r.epochs, r.tag, r.start), []).append(r)
    columns = {key: runs for key, runs in alike.items() if len({(r.ste, r.beta) for r in runs}) > 1}
    if not columns:
        return ["No results yet."]
    heads = [f"{network}, K={order}, {scale}, {epochs} epochs" for network, order, scale, epochs, *_ in columns]
    rows = [f"| test error, % | {' | '.join(heads)} |", "|---|" + "--:|" * len(heads)]
    runs = [r for column in columns.values() for r in column]
    for ste, beta in sorted({(r.ste, r.beta) for r in runs}, key=lambda how: (how[1], STES.index(how[0]))):
        cells = [spread([r for r in column if (r.ste, r.beta) == (ste, beta)]) for column in columns.values()]
        rows.append(f"| `{ste}`{', running β' * (beta == 'running')} | {' | '.join(cells)} |")
    return [*rows, "", *commands(runs)]


def errors(results: Sequence[Result]) -> list[str]:
    """A row an order, a column a dataset and scale: what K planes lose of the same float activations, in percent."""
    runs = [r for r in results if r.approximation]
    if not runs:
        return ["No results yet."]
    columns = [(run, scale) for run in runs for scale in SCALES]
    rows = [
        "| ‖X − X̂‖²/‖X‖², % | " + " | ".join(f"{run.network}, {scale}" for run, scale in columns) + " |",
        "|---|" + "--:|" * len(columns),
    ]
    for order in sorted({point["order"] for run in runs for point in run.approximation}):
        cells = [f"{100 * run.lost(order, scale):.1f}" for run, scale in columns]
        rows.append(f"| K={order} | {' | '.join(cells)} |")
    return rows


def commands(runs: Sequence[Result]) -> list[str]:
    """The commands that made the runs, and the machines; one for all that differ in a number or estimator alone."""
    alike: dict[str, list[Result]] = {}
    for run in runs:
        alike.setdefault(re.sub(r"--(order \d+|scale \w+|seed \d+|ste \w+)", _variable, run.command), []).append(run)
    lines: list[str] = []
    for line, group in alike.items():
        values = [sorted({getattr(run, part) for run in group}) for part in ("order", "scale", "seed", "ste")]
        if len(group) == 1 or len(group) < math.prod(map(len, values)):
            lines += [run.command for run in group]
            continue
        named = dict(zip(("ORDER", "SCALE", "SEED", "STE"), values, strict=True))
        for name, found in named.items():
            if len(found) == 1:
                line = re.sub(rf"(--\w+) {name}\b", rf"\1 {found[0]}", line)
        lines.append(line)
        lines += [f"    # {name}: {', '.join(map(str, found))}" for name, found in named.items() if f" {name}" in line]
    return [f"On {'; '.join(sorted({run.hardware for run in runs}))}:", "", "```", *lines, "```"]


def _variable(option: re.Match[str]) -> str:
    """`--order 2` as `--order ORDER`."""
    name = option[1].split()[0]
    return f"--{name} {name.upper()}"


def engines(records: Sequence[dict[str, Any]]) -> list[str]:
    """A row a network and pair of engines: predictions and scores, with and without a flipped sign."""
    if not records:
        return ["No results yet."]
    rows = [
        "| network | engines | equal predictions | images with a flipped sign | of the others: equal, worst score |",
        "|---|---|--:|--:|--:|",
    ]
    for record in records:
        images, flipped, share, others = record["images"], record["flipped"], "–", "–"
        if flipped is not None:
            others = f"{record['equal_predictions_unflipped']} of {images - flipped}, {record['worst']:.1e}"
            share = f"{100 * flipped / images:.2f} %"
        equal = f"{100 * record['equal_predictions'] / images:.2f} %"
        rows.append(f"| {record['network']} | {' and '.join(record['engines'])} | {equal} | {share} | {others} |")
    return rows


def layers(records: Sequence[dict[str, Any]]) -> list[str]:
    """A row a network and engine: how its layers do on its own input to them, against PyTorch's arithmetic."""
    if not records:
        return ["No results yet."]
    rows = [
        "| network | layers of | signs | in doubt | of these differ | others differ | outputs | outside | worst |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in records:
        excused = r["differing"] - r["wrong"]
        counts = (f"{r['signs']:.2e}", r["doubtful"], excused, r["wrong"], f"{r['outputs']:.2e}", r["outside"])
        cells = (r["network"], r["engine"], *map(str, counts), f"{r['worst']:.2f}")
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def steps(records: Sequence[dict[str, Any]]) -> list[str]:
    """A row a variant, a column a setting: its time, and as a multiple of float's."""
    if not records:
        return ["No results yet."]
    parts = ("network", "batch", "threads", "bf16", "compile")
    kinds = sorted({tuple(r[part] for part in parts) for r in records})
    heads = [
        f"{n}, batch {b}, {t} thread{'s' * (t > 1)}, {'bfloat16' if half else 'float32'}{', compiled' * compiled}"
        for n, b, t, half, compiled in kinds
    ]
    rows = ["| a training step | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(kinds)]
    times = {tuple(r[part] for part in (*parts, "order", "scale")): r["median_ms"] for r in records}
    # In the order in which they were timed, float first.
    for order, scale in dict.fromkeys((r["order"], r["scale"]) for r in records):
        name = f"K={order}, {scale}" if scale else {"bw": "binary weights, float activations"}.get(order, order)
        cells = []
        for kind in kinds:
            own, base = times.get((*kind, order, scale)), times.get((*kind, "float", None))
            cells.append(f"{own:.0f} ms ({own / base:.2f} ×)" if own and base else "–")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


# The networks that have no K are levels in the picture.
STYLES = {"float": "--", "bw": ":"}
TABLES: dict[str, Callable[[Measured], list[str]]] = {
    "cifar10": lambda measured: cifar10(measured.results),
    "mnist": lambda measured: mnist(measured.results),
    "estimators": lambda measured: estimators(measured.results),
    "errors": lambda measured: errors(measured.results),
    "engines": lambda measured: engines(list(measured.engines.values())),
    "layers": lambda measured: layers(list(measured.layers.values())),
    "steps": lambda measured: steps(list(measured.steps.values())),
}


def with_tables(text: str, measured: Measured) -> str:
    """The page with every marked table made anew. Raises UsageError for a mark that is not closed or names no table."""

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise UsageError(f"found a mark for a table {name!r}; accepted: {', '.join(TABLES)}")
        # A comment ends at the next blank line: without one, Markdown takes the table for a part of it.
        return "\n".join([f"<!-- {name} -->", "", *TABLES[name](measured), "", f"<!-- /{name} -->"])

    made, count = re.subn(r"<!-- (?P<name>\w+) -->.*?<!-- /(?P=name) -->", table, text, flags=re.S)
    opened = len(re.findall(r"<!-- \w+ -->", text))
    if count != opened:
        raise UsageError(f"found {opened} marks of tables of which {count} are closed by <!-- /NAME -->")
    return made


# --- Picture ----------------------------------------------------------------------------------------------------------


def draw(results: Sequence[Result], path: Path) -> None:
    """Accuracy against K on both datasets and quantisation error against K: the two figures of the HORQ talk."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 4.4), layout="constrained")
    usual = [r for r in results if not r.compares_ste]
    _draw_cifar10(axes[0], [r for r in usual if r.dataset == "cifar10"])
    _draw_mnist(axes[1], [r for r in usual if r.dataset == "mnist"])
    _draw_errors(axes[2], [r for r in results if r.approximation])
    for axis in axes:
        axis.set_xlabel("K")
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    # Without the version of matplotlib in it, the picture changes only with the numbers.
    figure.savefig(path, dpi=90, format="png", metadata={"Software": None})
    pyplot.close(figure)


def _by_order(runs: Sequence[Result], value: Callable[[Result], float]) -> tuple[list[int], list[list[float]]]:
    orders = sorted({r.order for r in runs if isinstance(r.order, int)})
    return orders, [[value(r) for r in runs if r.order == order] for order in orders]


def _draw_cifar10(axis: Any, runs: Sequence[Result]) -> None:
    """A line a network and scale, a level a network without planes: of each order what was trained for longest."""
    axis.set_title("CIFAR-10, test accuracy (%)", fontsize=10)
    longest = _longest(runs)
    for i, network in enumerate(sorted({r.network for r in longest})):
        own, color = [r for r in longest if r.network == network], f"C{i}"
        for scale, style in zip(SCALES, ("o-", "s:", "^:"), strict=True):
            orders, values = _by_order([r for r in own if r.scale == scale], lambda r: 100 * r.accuracy)
            if orders:
                means = [statistics.fmean(v) for v in values]
                axis.plot(orders, means, style, color=color, label=f"{network}, {scale}")
        for order, line in STYLES.items():
            if found := [100 * r.accuracy for r in own if r.order == order]:
                axis.axhline(statistics.fmean(found), color=color, linestyle=line, label=f"{network}, {order}")


def _longest(runs: Sequence[Result]) -> list[Result]:
    """Of each network, order and scale the runs that saw the most epochs, with those of where they started."""
    by_name = {r.name: r for r in runs}
    most: dict[tuple[Any, ...], int] = {}
    for run in runs:
        key = (run.network, run.order, run.scale)
        most[key] = max(most.get(key, 0), epochs_in_all(run, by_name))
    return [r for r in runs if epochs_in_all(r, by_name) == most[r.network, r.order, r.scale]]


def _draw_mnist(axis: Any, runs: Sequence[Result]) -> None:
    axis.set_title("MNIST, test error (%)", fontsize=10)
    for i, scale in enumerate(SCALES):
        orders, values = _by_order([r for r in runs if r.scale == scale], lambda r: 100 * (1 - r.accuracy))
        if orders:
            deviations = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
            shifted = [order + 0.05 * (i - 1) for order in orders]
            axis.errorbar(shifted, [statistics.fmean(v) for v in values], deviations, fmt="o-", capsize=3, label=scale)
    axis.plot(list(PAPER_MNIST), list(PAPER_MNIST.values()), "kx", label="the paper")


def _draw_errors(axis: Any, runs: Sequence[Result]) -> None:
    axis.set_title("lost of the activations, ‖X − X̂‖²/‖X‖² (%)", fontsize=10)
    for run in runs:
        for scale in SCALES:
            orders = [point["order"] for point in run.approximation if point["scale"] == scale]
            axis.semilogy(orders, [100 * run.lost(k, scale) for k in orders], ".-", label=f"{run.network}, {scale}")


# --- Command line -----------------------------------------------------------------------------------------------------


def load(store: Path) -> Measured:
    """What docs/accuracy.json keeps, nothing where it is not there."""
    kept = json.loads(store.read_text()) if store.is_file() else {}
    return Measured(*(kept.get(part, {}) for part in ("runs", "engines", "layers", "steps")))


def update(paths: Sequence[Path], docs: Path) -> int:
    """Merge, and make page and picture anew; the number of runs there are."""
    store, page = docs / "accuracy.json", docs / "accuracy.md"
    if not page.is_file():
        raise UsageError(f"{page}: there is no such page")
    measured = load(store)
    for path in paths:
        measured.add(path)
    if not measured.runs:
        raise UsageError(f"found no results: {store} is not there and no file is named")
    text = with_tables(page.read_text(), measured)
    with replacing(store) as partial:
        parts = (f'"{name}": {_lines(value)}' for name, value in vars(measured).items())
        partial.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    with replacing(docs / "accuracy.png") as partial:
        draw(measured.results, partial)
    with replacing(page) as partial:
        partial.write_text(text)
    return len(measured.runs)


def _lines(records: dict[str, dict[str, Any]]) -> str:
    """JSON with a line for each record, so that a new one is a line of a diff."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in records.items())
    return "{\n" + lines + "\n}" if lines else "{}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="*", help="JSON of train.py, examples.engines, benchmarks.training")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of accuracy.md (default: docs)")
    given = parser.parse_args()
    try:
        count = update(given.results, given.docs)
    except HorqError as error:
        print(f"accuracy.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    print(f"{given.docs / 'accuracy.md'}: {count} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
