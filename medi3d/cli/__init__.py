"""The command line. `medi3d.cli:main` is the entry point, so this stays light."""

from medi3d.cli.entry import app, main

__all__ = ["app", "main"]
