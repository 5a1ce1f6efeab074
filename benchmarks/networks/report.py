"""Records of interface.md, and the tables that a person reads."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from horq_tvm import peers
from horq_tvm.cli.show import table

from ..measure import ratio
from .arithmetic import Rates, floors_ms
from .breakdown import CLASSES, spent_ms
from .engines import COLD, OURS, Engine, Library, Peaks, Samples, Setting, block_length, step_names

Record = dict[str, Any]


def record(
    setting: Setting, network: str, engine: Engine, engines: Iterable[Engine], samples: Samples, peaks: Peaks
) -> Record:
    """One engine's record: medians over the rounds, and how many times as fast as each peer, round by round."""
    rounds = samples[engine.label]
    median = statistics.median(rounds)
    found: Record = {
        "network": network,
        "engine": engine.name,
        "order": engine.order,
        "scale": engine.scale,
        "rest": engine.rest,
        "threads": engine.threads,
        "batch": setting.batch,
        "activation": engine.activation,
        "target": setting.target.name if engine.name == OURS else None,
        "median_ms": median / 1e6,
        "min_ms": min(rounds) / 1e6,
        "cold_ms": statistics.median(samples[engine.label + COLD]) / 1e6,
        "block": block_length(median),
        "rounds": len(rounds),
    }
    if engine.form is not None:
        found["form"] = engine.form
    alone = [other for other in engines if other.threads == 1 and _same(other, engine)]
    if engine.threads > 1 and alone:
        found["over_one_thread"] = ratio(samples[alone[0].label], rounds)
    if engine.library is not None:
        rivals = [rival for rival in engines if rival.library is None and rival.threads == engine.threads]
        found["speedup"] = {rival.name: ratio(samples[rival.label], rounds) for rival in rivals}
        found |= where(engine.library, engine, samples, peaks)
    return found


def _same(a: Engine, b: Engine) -> bool:
    """Whether they differ in the number of threads alone; of a peer its fastest form is taken, whichever that is."""
    return (a.name, a.order, a.scale, a.rest, a.activation) == (b.name, b.order, b.scale, b.rest, b.activation)


def where(library: Library, engine: Engine, samples: Samples, peaks: Peaks) -> Record:
    """What a record of ours says beside its time: the classes, the floor by kind, the share outside of the floor."""
    one = peaks.rates(samples)
    rates: Rates = {kind: rate * engine.threads for kind, rate in one.items()}
    total = statistics.median(samples[engine.label]) / 1e6
    names = step_names(engine.label, len(library.steps))
    steps = [statistics.median(samples[name]) / 1e6 for name in names]
    floors = floors_ms(library.work.values(), rates)
    return {
        "breakdown_ms": spent_ms(library.steps, steps, total, library.work, rates),
        "floor_ms": floors,
        "outside_floor": 1 - sum(floors.values()) / total,
        "peak_gmacs": one,
    }


def describe(records: Sequence[Record]) -> str:
    """For each network a table of times and one of where ours go."""
    parts = []
    for name in dict.fromkeys((r["network"], r["threads"], r["batch"]) for r in records):
        mine = [r for r in records if (r["network"], r["threads"], r["batch"]) == name]
        parts += [_times(mine), _places([r for r in mine if r["engine"] == OURS])]
    return "\n\n".join(part for part in parts if part)


def _times(records: Sequence[Record]) -> str:
    first = records[0]
    rivals = list(dict.fromkeys(name for r in records for name in r.get("speedup", {})))
    scales = any("over_one_thread" in r for r in records)
    columns = ("engine", "K", "scale", "rest", "input", "median ms", "min ms", "cold ms", "block")
    rows = [
        (
            " ".join(filter(None, (r["engine"], r.get("form")))),
            *(r[key] for key in ("order", "scale", "rest", "activation")),
            *(round(r[key], 3) for key in ("median_ms", "min_ms", "cold_ms")),
            r["block"],
            *(f"{r['speedup'][peer]:.2f}x" if peer in r.get("speedup", {}) else "" for peer in rivals),
            *([f"{r['over_one_thread']:.2f}x"] if "over_one_thread" in r else [""] if scales else []),
        )
        for r in records
    ]
    title = f"{first['network']}, {first['threads']} thread(s), batch {first['batch']}"
    added = [f"vs {_short(peer)}" for peer in rivals] + ["vs 1 thread"] * scales
    return f"{title}\n{table((*columns, *added), rows)}"


def _short(peer: str) -> str:
    return {peers.FLOAT32: "ort fp32", peers.INT8: "ort int8"}.get(peer, peer)


def _places(records: Sequence[Record]) -> str:
    if not records:
        return ""
    peaks = ", ".join(f"{kind} {rate:.0f}" for kind, rate in records[0]["peak_gmacs"].items())
    rows = [
        (
            r["order"],
            r["scale"],
            r["rest"],
            *(round(r["breakdown_ms"][name] * 1e3) for name in CLASSES),
            round(r["median_ms"] * 1e3),
            " + ".join(f"{kind} {ms * 1e3:.0f}" for kind, ms in r["floor_ms"].items()),
            f"{r['outside_floor']:.1%}",
        )
        for r in records
    ]
    columns = ("K", "scale", "rest", *CLASSES, "total", "arithmetic floor", "outside it")
    return f"us by class; register-only peaks of one core in GMAC/s: {peaks}\n{table(columns, rows)}"
