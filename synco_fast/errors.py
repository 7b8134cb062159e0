"""The exceptions that the command line prints as a message, without a traceback, and its exit codes."""


class UserError(Exception):
    """Something the user gave cannot work. The message names the thing, what was expected, and what to do."""


EXIT_ERROR = 1
EXIT_INTERRUPTED = 75
"""Stopped by a signal with its state saved: start it again with --resume auto (EX_TEMPFAIL of sysexits.h)."""


class Interrupted(Exception):
    """A run was asked to stop by a signal; its state is saved."""
