"""The `rayx` command: the only part that prints, and that wires the stages to each other."""

from rayx.cli.main import main

__all__ = ["main"]
