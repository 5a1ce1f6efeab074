"""`python -m benchmarks.plots bars NETWORKS.json OUT.png` and `... speedup SPEEDUP.json OUT.png`: pictures of records.

The records are those that `benchmarks.networks` and `benchmarks.speedup` write with --json; nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from horq_tvm.cli import options
from horq_tvm.errors import UsageError
from horq_tvm.files import replacing

from .command import execute

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]

# Where it is arithmetic of either kind, blue; what surrounds it, warm; in the order of the bars.
COLOURS = {
    "stem": "#4477aa",
    "rest": "#66ccee",
    "popcount": "#228833",
    "epilogue": "#ccbb44",
    "binarise": "#ee6677",
    "pooling": "#aa3377",
    "other": "#bbbbbb",
}
SWEEP_TITLES = {"order": "order K", "channels": "input channels", "kernel": "kernel size", "outputs": "outputs"}
LINES = {
    "theory": ("theory: 64 binary MACs a cycle", "--"),
    "over_plain": ("measured, against one float MAC a cycle", "-"),
    "over_onnxruntime": ("measured, against ONNX Runtime fp32", "-"),
}
DPI = 120


def bars(records: Sequence[Record]) -> Figure:
    """A group of horizontal stacked bars for each network: where our time goes, and the floor of its arithmetic.

    Raises:
        UsageError: no record says where its time goes.
    """
    ours = [record for record in records if "breakdown_ms" in record]
    if not ours:
        raise UsageError("no record with breakdown_ms; accepted: what `python -m benchmarks.networks --json` writes")
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in ours:
        groups.setdefault((record["network"], record["threads"], record["batch"]), []).append(record)
    heights = [1 + len(group) * 0.5 for group in groups.values()]
    figure, axes = _grid(len(groups), 1, (9, sum(heights) + 0.8), heights)
    for axis, (title, group) in zip(axes, groups.items(), strict=True):
        _bars(axis, group)
        axis.set_title("{}, {} thread(s), batch {}".format(*title), loc="left", fontsize=10)
    axes[-1].set_xlabel("ms")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.4 / figure.get_figheight()))
    return figure


def _bars(axis: Axes, records: Sequence[Record]) -> None:
    names = [" ".join((f"K={r['order']}", r["scale"], r["rest"], r["activation"])) for r in records]
    rows = range(len(records))
    left = [0.0] * len(records)
    for name, colour in COLOURS.items():
        # Steps and calls are timed apart: by chance the steps may take longer than the call around them.
        widths = [max(0.0, record["breakdown_ms"][name]) for record in records]
        axis.barh(rows, widths, left=left, color=colour, label=name, height=0.6)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, record in zip(rows, records, strict=True):
        floor = sum(record["floor_ms"].values())
        label = "arithmetic floor" if row == 0 else None
        axis.plot([floor, floor], [row - 0.4, row + 0.4], color="black", linewidth=1.5, label=label)
        text = f" {record['median_ms']:.3g} ms" + "".join(
            f", {times:.1f}x {peer.replace('onnxruntime', 'ort')}" for peer, times in record["speedup"].items()
        )
        axis.text(left[row], row, text, va="center", fontsize=8)
    axis.set_yticks(rows, names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, max(left) * 1.45)
    axis.spines[["top", "right"]].set_visible(False)


def speedup(records: Sequence[Record]) -> Figure:
    """A panel a sweep, theory and both measurements against the value that varies.

    Raises:
        UsageError: the records are not of `benchmarks.speedup`.
    """
    if not records or any(key not in record for record in records for key in ("sweep", "value", *LINES)):
        raise UsageError("records without sweep; accepted: what `python -m benchmarks.speedup --json` writes")
    sweeps = list(dict.fromkeys(record["sweep"] for record in records))
    figure, axes = _grid(1, len(sweeps), (3.2 * len(sweeps), 3.6))
    for axis, sweep in zip(axes, sweeps, strict=True):
        mine = [record for record in records if record["sweep"] == sweep]
        values = [record["value"] for record in mine]
        for key, (label, style) in LINES.items():
            axis.plot(values, [record[key] for record in mine], style, marker="o", markersize=3, label=label)
        if values[-1] > 16 * values[0]:
            axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(values, [str(value) for value in values], minor=False, fontsize=8)
        axis.yaxis.set_major_formatter("{x:g}x")
        axis.set_xlabel(SWEEP_TITLES[sweep])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("speed-up")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    return figure


def _grid(
    rows: int, columns: int, inches: tuple[float, float], heights: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure without a window, whatever the machine's display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, dpi=DPI)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
    return figure, list(axes.ravel())


KINDS = {"bars": bars, "speedup": speedup}


def read(path: Path) -> list[Record]:
    """The records of a file. UsageError where it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    if not isinstance(found, list) or not all(isinstance(record, dict) for record in found):
        raise UsageError(f"{path}: found a {type(found).__name__}; accepted: a list of records")
    return found


def parser() -> options.Parser:
    """The kind of picture, one file of records or several, the picture."""
    top = options.Parser(prog="python -m benchmarks.plots", description=(__doc__ or "").split("\n\n")[1])
    top.add_argument("kind", choices=tuple(KINDS), help="bars: where the time goes; speedup: theory and measurement")
    top.add_argument("records", type=Path, nargs="+", metavar="RECORDS.json", help="what the benchmark wrote")
    top.add_argument("out", type=Path, metavar="OUT.png", help="the picture")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return top


def run(given: argparse.Namespace) -> None:
    """Draw and write; the same records give the same bytes."""
    figure = KINDS[given.kind]([record for path in given.records for record in read(path)])
    with replacing(given.out) as partial:
        figure.savefig(partial, format="png", metadata={"Software": None})


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 the work failed, 2 the call was mistaken."""
    return execute("plots", parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
