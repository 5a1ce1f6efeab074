"""`horq-tvm targets`: the machines we compile for, and what `native` is here."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict

from horq_tvm import targets
from horq_tvm.cli import options
from horq_tvm.cli.show import table, write_json
from horq_tvm.errors import HorqError


def add(verbs: options.Verbs) -> None:
    """Add the verb to the parser."""
    verb = options.add_verb(verbs, "targets", "list the targets and say which of them this machine can run", run)
    options.add_json_option(verb)


def run(arguments: argparse.Namespace) -> None:
    """Print the presets in their order, then what `native` stands for."""
    host = targets.this_host()
    known = targets.presets()
    try:
        native: targets.Target | None = targets.native(known, host)
    except HorqError:
        native = None
    if arguments.json is not None:
        write_json(arguments.json, _records(known.values(), host, native))
        if arguments.json == "-":
            return
    rows = [
        (
            target.name,
            target.family,
            target.mcpu,
            target.popcount,
            target.vector_bits,
            _fit(target, host),
            target.description,
        )
        for target in known.values()
    ]
    print(table(("target", "family", "mcpu", "popcount", "bits", "here", "description"), rows))
    if native is None:
        print(f"\nnative: no preset for this machine ({host.machine})")
    else:
        print(f"\nnative: {native.name} (mcpu {native.mcpu})")


def _fit(target: targets.Target, host: targets.Host) -> str:
    if not host.flags:
        return "unknown"
    if target.family == "cuda" and not target.missing_on(host.flags):
        return "with a card"
    return "no" if target.missing_on(host.flags) else "yes"


def _records(
    known: Iterable[targets.Target], host: targets.Host, native: targets.Target | None
) -> list[dict[str, object]]:
    """One record a target; `native` is one too, so that a script can read what it stands for."""
    records = [{**asdict(target), "missing_here": list(target.missing_on(host.flags))} for target in known]
    if native is not None:
        records.append({**asdict(native), "name": targets.NATIVE, "resolves_to": native.name, "missing_here": []})
    return records
