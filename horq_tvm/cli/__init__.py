"""The command line, one file a verb. Importing it needs the standard library alone."""

from horq_tvm.cli.app import main

__all__ = ["main"]
