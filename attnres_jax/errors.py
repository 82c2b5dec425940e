"""Errors that a user can mend: the command line shows each as one line, without a traceback."""


class UserError(Exception):
    """Something the user asked for cannot be done; the message names it, its value and the way out."""

    exit_code = 2


class ConfigError(UserError, ValueError):
    """A configuration that names an unknown key, a wrong type, or a combination that cannot be built."""
