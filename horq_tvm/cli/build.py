"""`horq-tvm build`: a model in, a shared library out."""

from __future__ import annotations

import argparse

from horq_tvm.cli import inspect, options
from horq_tvm.cli.show import progress, write_json
from horq_tvm.files import check_writable
from horq_tvm.specs import EMITS


def add(verbs: options.Verbs) -> None:
    """Add the verb to the parser."""
    verb = options.add_verb(verbs, "build", "compile a model to a shared library", run)
    verb.add_argument("model", metavar="MODEL", help="an .onnx file, or an ExportedProgram saved as .pt2")
    verb.add_argument("-o", "--output", required=True, metavar="OUT.so", help="the library to write")
    options.add_model_options(verb)
    verb.add_argument(
        "--database", metavar="DIR", help="what `tune` found (default: the folder tuning of the user's cache)"
    )
    verb.add_argument(
        "--emit",
        choices=EMITS,
        help="standalone needs libc alone, tvm needs TVM's runtime (default: standalone, for a card tvm)",
    )
    options.add_json_option(verb)


def run(arguments: argparse.Namespace) -> None:
    """Compile, write the library, and say what became of each layer."""
    sources = (arguments.model, arguments.plan, arguments.calibration)
    check_writable(arguments.output, sources=sources)
    if arguments.json not in (None, "-"):
        check_writable(arguments.json, sources=(*sources, arguments.output))
    given = options.build_arguments(arguments)
    if arguments.database is not None:
        given["database"] = arguments.database
    if arguments.emit is not None:
        given["emit"] = arguments.emit
    import horq_tvm

    with progress() as say:
        compiled = horq_tvm.build(arguments.model, progress=say, **given)
        compiled.export(arguments.output)
    report = compiled.report
    if arguments.json is not None:
        write_json(arguments.json, report)
    if arguments.json != "-":
        print(f"{arguments.output}\n{inspect.describe(report)}")
