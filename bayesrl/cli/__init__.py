"""The command line: fit a ready model or a file of yours, continue a run, look at one, write its report."""

from bayesrl.cli.commands import app as app
