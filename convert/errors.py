"""What conversion raises."""

import contextlib
from collections.abc import Iterator


class ConversionError(ValueError):
    """A checkpoint cannot be converted; the message lists everything that was found wrong with it."""


@contextlib.contextmanager
def understanding(what: str) -> Iterator[None]:
    """Turn what a reader stumbles over in a malformed file into a ConversionError that names the file."""
    try:
        yield
    except ConversionError as error:
        raise ConversionError(f"{what}: {error}") from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise ConversionError(f"{what} is not what it should be: {error}") from error
