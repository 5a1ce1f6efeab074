"""The graph passes, one a file. They are Relax passes: TVM replaced Relay by Relax, and the folder keeps its name."""
