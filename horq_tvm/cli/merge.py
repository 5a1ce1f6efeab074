"""`horq-tvm merge`: what others measured, put into one tuning database."""

from __future__ import annotations

import argparse
from pathlib import Path

from horq_tvm.cli import options
from horq_tvm.cli.show import write_json
from horq_tvm.errors import UsageError
from horq_tvm.files import check_writable


def add(verbs: options.Verbs) -> None:
    """Add the verb to the parser."""
    verb = options.add_verb(verbs, "merge", "put tuning databases into one", run)
    verb.add_argument("sources", nargs="+", metavar="FROM", help="databases that `tune` made; they stay as they are")
    verb.add_argument("--into", required=True, metavar="DIR", help="the database that takes them in; made if missing")
    options.add_json_option(verb)


def run(arguments: argparse.Namespace) -> None:
    """Merge, after every line of every database was read, and say what was new."""
    from horq_tvm.tuning.database import Database

    if arguments.json not in (None, "-"):
        check_writable(arguments.json)
    for name in arguments.sources:
        if Path(name).resolve() == Path(arguments.into).resolve():
            raise UsageError(f"merge: {name} is --into as well; accepted: another database")
    sources = [Database.open(name) for name in arguments.sources]
    for source in sources:
        source.check()
    into = Database.open(arguments.into, create=True)
    into.check()
    merged = [into.merge(source) for source in sources]
    named = list(zip(arguments.sources, merged, strict=True))
    if arguments.json is not None:
        new = [{"from": name, "records": found.records, "kernels": found.kernels} for name, found in named]
        write_json(arguments.json, {"database": str(into.folder), "merged": new})
    if arguments.json != "-":
        for name, found in named:
            print(f"{into.folder}: {found.records} new records of {found.kernels} kernels from {name}")
