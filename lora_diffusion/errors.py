"""The two kinds of failure a command reports without a traceback. Both carry one message: what, where, what to do."""

from __future__ import annotations


class UserError(Exception):
    """The user's input is wrong: config, file, folder or argument. Exit status 2."""


class RunError(Exception):
    """The input was fine and the run failed: loss not finite, disk full, a file that does not read back. Exit 3."""
