"""What conversion raises."""


class ConversionError(ValueError):
    """A checkpoint cannot be converted; the message lists everything that was found wrong with it."""
