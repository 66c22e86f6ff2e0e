"""The exception that a failed conversion raises."""

import contextlib
from collections.abc import Iterator


class ConversionError(ValueError):
    """Raised when a checkpoint cannot be converted; the message lists all problems.

    Examples:
        >>> import levit_flax
        >>> from levit_flax import convert
        >>> tensors = convert.to_torch(*levit_flax.from_pretrained("cifar10"))
        >>> tensors["classifier.batch_norm.gamma"] = tensors.pop("classifier.batch_norm.weight")
        >>> try:
        ...     convert.from_torch(tensors)
        ... except convert.ConversionError as error:
        ...     print(error)
        the mapping cannot be converted as LevitForImageClassificationWithTeacher in the hf layout:
        1 missing: classifier.batch_norm.weight
        1 unexpected: classifier.batch_norm.gamma
    """


@contextlib.contextmanager
def _explain_malformed(name: str) -> Iterator[None]:
    """Convert the errors that malformed content causes to a ConversionError that names the content."""
    try:
        yield
    except ConversionError as error:
        raise ConversionError(f"{name}: {error}") from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise ConversionError(f"{name} is malformed: {error}") from error
