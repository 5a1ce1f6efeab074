"""The errors that a user meets. The command line turns each into one line and an exit code."""


class HorqError(Exception):
    """The work failed: an unreadable file, an operator we cannot compile, a missing compiler (exit code 1)."""


class UsageError(HorqError):
    """The call was mistaken: an unknown target, an order of 0, a layer that is not in the model (exit code 2)."""
