"""The command line: fit a ready model or your own file, continue a run, inspect one, write its report."""

from bayesrl.cli.commands_and_options import app as app
