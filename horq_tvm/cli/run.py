"""`horq-tvm run`: a library on arrays from a file. Needs numpy alone."""

from __future__ import annotations

import argparse

from horq_tvm.cli import options
from horq_tvm.cli.arrays import read_inputs, write_outputs
from horq_tvm.cli.show import first_values, shape_text
from horq_tvm.files import check_writable


def add(verbs: options.Verbs) -> None:
    """Add the verb to the parser."""
    verb = options.add_verb(verbs, "run", "run a library on arrays", run)
    verb.add_argument("library", metavar="OUT.so", help="what `horq-tvm build` wrote")
    verb.add_argument(
        "inputs", metavar="IN.npz|IN.npy", help="arrays by input name; an .npy serves a model of one input"
    )
    verb.add_argument(
        "-o",
        "--output",
        metavar="OUT.npz|OUT.npy",
        help="write the outputs here, an .npy where there is one (default: print their first values)",
    )
    options.add_threads_option(verb)


def run(arguments: argparse.Namespace) -> None:
    """Load, run once, write or print."""
    from horq_tvm.runtime.loader import load

    if arguments.output is not None:
        check_writable(arguments.output, sources=(arguments.library, arguments.inputs))
    model = load(arguments.library, threads=arguments.threads)
    outputs = model(**read_inputs(arguments.inputs, [spec.name for spec in model.inputs]))
    if arguments.output is not None:
        write_outputs(arguments.output, outputs)
        return
    for name, array in outputs.items():
        print(f"{name}  {shape_text(array.shape)}  {array.dtype}  {first_values(array)}")
