"""`python -m benchmarks.training`: what a training step of a HORQ network costs against the float one.

    python -m benchmarks.training [--network resnet20] [--orders 1,2] [--batch 64] [--threads 2] [--bf16] [--json FILE]

A step is forward, loss, backward and AdamW, on images that are there already. All variants are timed in turn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from horq_tvm import zoo
from horq_tvm.cli.show import write_json
from horq_tvm.errors import HorqError, UsageError
from horq_tvm.nn import keep_freed_memory
from horq_tvm.specs import SCALES
from horq_tvm.timing import interleaved

Record = dict[str, Any]


def step(network: str, order: zoo.Order, scale: str, batch: int, bf16: bool) -> Callable[[], None]:
    """A training step on seeded normal images; its first call fits β where there is one to fit."""
    torch.manual_seed(0)
    model = zoo.build(network, order, scale).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images = zoo.example(network, batch)
    labels = torch.randint(zoo.architecture(network).classes, (batch,))

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            scores = model(images)
        loss = F.cross_entropy(scores.float(), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return run


def measure(network: str, orders: list[int], batch: int, bf16: bool, seconds: float) -> list[Record]:
    """One record a variant: float, binary weights, and every order with every scale."""
    variants: list[tuple[zoo.Order, str | None]] = [("float", None), ("bw", None)]
    variants += [(order, scale) for order in orders for scale in SCALES]
    calls = {f"{order} {scale}": step(network, order, scale or "static", batch, bf16) for order, scale in variants}
    times = interleaved(calls, seconds)
    common = {"network": network, "engine": "pytorch", "batch": batch, "threads": torch.get_num_threads(), "bf16": bf16}
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--orders", default="1,2", help="comma-separated (default: 1,2)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="autocast convolutions to bfloat16")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each variant at least (default: 2)")
    parser.add_argument("--json", type=Path, help="a list of records; - is standard output")
    given = parser.parse_args(argv)
    try:
        orders = [int(part) for part in given.orders.split(",")]
    except ValueError:
        parser.error(f"--orders {given.orders}; accepted: integers with commas between")
    if given.threads < 1 or given.batch < 1:
        parser.error(f"--threads {given.threads} --batch {given.batch}; accepted: 1 or more")
    keep_freed_memory()
    torch.set_num_threads(given.threads)
    try:
        records = measure(given.network, orders, given.batch, given.bf16, given.seconds)
        if given.json:
            write_json(str(given.json), records)
        if str(given.json) != "-":
            print(table(records))
    except HorqError as error:
        print(f"benchmarks.training: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
