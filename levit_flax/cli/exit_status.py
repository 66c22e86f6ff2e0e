"""The exit statuses of the command line, and the errors that belong to them."""

from levit_flax.choices import _CallError

FAILED = 1  # the work failed
WRONG_CALL = 2  # the command line was wrong; Typer uses the same status

# Errors that only another command line can avoid: an invalid value, or a model, recipe or file that does not exist.
_CALL_ERRORS = (_CallError, FileNotFoundError, NotADirectoryError)


def exit_status(error: Exception) -> int:
    """Return the exit status for an error of the library."""
    return WRONG_CALL if isinstance(error, _CALL_ERRORS) else FAILED
