"""`horq-tvm build`: a model in, a shared library out."""

from __future__ import annotations

import argparse

from horq_tvm.cli import common, inspect


def add(verbs: common.Verbs) -> None:
    """Add the verb to the parser."""
    verb = common.add_verb(verbs, "build", "compile a model to a shared library", run)
    verb.add_argument("model", metavar="MODEL", help="an .onnx file, or an ExportedProgram saved as .pt2")
    verb.add_argument("-o", "--output", required=True, metavar="OUT.so", help="the library to write")
    common.add_model_options(verb)
    common.add_json_option(verb)


def run(arguments: argparse.Namespace) -> None:
    """Compile, write the library, and say what became of each layer."""
    common.check_writable(arguments.output)
    if arguments.json not in (None, "-"):
        common.check_writable(arguments.json)
    options = common.build_arguments(arguments)
    import horq_tvm

    with common.progress() as progress:
        compiled = horq_tvm.build(arguments.model, progress=progress, **options)
        compiled.export(arguments.output)
    report = compiled.report
    if arguments.json is not None:
        common.write_json(arguments.json, report)
    if arguments.json != "-":
        print(f"{arguments.output}\n{inspect.describe(report)}")
