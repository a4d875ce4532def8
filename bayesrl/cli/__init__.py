"""The command line: fit a ready model or a file of yours, go on with a run, look at one, report it."""

from bayesrl.cli.commands import app

__all__ = ["app"]
