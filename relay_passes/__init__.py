"""The graph passes, one a file: Relax passes, since TVM replaced Relay by Relax; the folder keeps the name it was given."""
