"""`python -m benchmarks.training`: what a training step of a HORQ network costs against the float one.

    python -m benchmarks.training [--network resnet20] [--orders 1,2] [--batch 64] [--threads 2] [--bf16] [--compile]
        [--json FILE]

A step is forward, loss, backward and AdamW, channels last, on images that are there already. All variants are timed in
turn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional as F

from horq_tvm import zoo
from horq_tvm.cli import options
from horq_tvm.nn import keep_freed_memory
from horq_tvm.specs import SCALES
from horq_tvm.timing import interleaved

from . import arguments
from .command import deliver, execute

Record = dict[str, Any]


@dataclass(frozen=True)
class How:
    """How a step is taken: so many images at once, convolutions in bfloat16 or float32, with torch.compile or not."""

    batch: int
    bf16: bool
    compile: bool


def step(network: str, order: zoo.Order, scale: str, how: How) -> Callable[[], None]:
    """A training step on seeded normal images; β has been fitted to them where there is one to fit."""
    torch.manual_seed(0)
    model = zoo.build(network, order, scale).train().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images = zoo.example(network, how.batch).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(zoo.architecture(network).classes, (how.batch,))
    model(images)
    forward = torch.compile(model, dynamic=False) if how.compile else model

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=how.bf16):
            scores = forward(images)
        loss = F.cross_entropy(scores.float(), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return run


def measure(network: str, orders: Sequence[int], how: How, seconds: float) -> list[Record]:
    """One record a variant: float, binary weights, and every order with every scale."""
    variants: list[tuple[zoo.Order, str | None]] = [("float", None), ("bw", None)]
    variants += [(order, scale) for order in orders for scale in SCALES]
    calls = {f"{order} {scale}": step(network, order, scale or "static", how) for order, scale in variants}
    times = interleaved(calls, seconds)
    common = {"network": network, "engine": "pytorch", **asdict(how), "threads": torch.get_num_threads()}
    return [
        {
            **common,
            "order": order,
            "scale": scale,
            "median_ms": times[f"{order} {scale}"].median_ms,
            "min_ms": times[f"{order} {scale}"].min_ms,
        }
        for order, scale in variants
    ]


def table(records: list[Record]) -> str:
    """Lines of Markdown: the step's time, its ratio to float, images a second; medians."""
    base = records[0]
    lines = ["| layers | ms a step | × float | images/s |", "|---|--:|--:|--:|"]
    for record in records:
        title = f"K={record['order']}, {record['scale']}" if record["scale"] else str(record["order"])
        median = record["median_ms"]
        rate = 1000 * record["batch"] / median
        lines.append(f"| {title} | {median:.0f} | {median / base['median_ms']:.2f} | {rate:.0f} |")
    return "\n".join(lines)


def parser() -> options.Parser:
    """The command line: what the other benchmarks have of it, and --bf16."""
    top = options.Parser(prog="python -m benchmarks.training", description=(__doc__ or "").split("\n\n")[0])
    top.add_argument("--network", default="resnet20", help=f"{', '.join(zoo.NETWORKS)} (default: resnet20)")
    top.add_argument("--orders", type=arguments.orders, default=(1, 2), metavar="1,2", help="planes K (default: 1,2)")
    top.add_argument("--batch", type=arguments.count, default=64, metavar="N", help="images a step (default: 64)")
    top.add_argument("--bf16", action="store_true", help="autocast convolutions to bfloat16")
    top.add_argument("--compile", action="store_true", help="with torch.compile (needs g++)")
    top.add_argument(
        "--seconds", type=arguments.seconds, default=2.0, metavar="S", help="how long to time each variant (default: 2)"
    )
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options.add_threads_option(top)
    options.add_json_option(top)
    return top


def run(given: argparse.Namespace) -> None:
    """Measure, print the table, write the records."""
    zoo.architecture(given.network)  # a mistake is told before the work
    keep_freed_memory()
    torch.set_num_threads(given.threads)
    # All variants of a network share its code, of which PyTorch would keep eight compiled forms.
    torch._dynamo.config.recompile_limit = 256
    how = How(given.batch, given.bf16, given.compile)
    records = measure(given.network, given.orders, how, given.seconds)
    deliver(records, given.json, table)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 the work failed, 2 the call was mistaken."""
    return execute("training", parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
