"""The exceptions that the command line prints as a message, without a traceback."""


class UserError(Exception):
    """Something the user gave cannot work. The message names the thing, what was expected, and what to do."""


class Interrupted(Exception):
    """A run was asked to stop by a signal; its state is saved."""
