"""What conversion raises."""

import contextlib
from collections.abc import Iterator


class ConversionError(ValueError):
    """A checkpoint cannot be converted; the message lists everything that was found wrong with it.

    Example:
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
def understanding(what: str) -> Iterator[None]:
    """Turn what a reader stumbles over in a malformed file into a ConversionError that names the file."""
    try:
        yield
    except ConversionError as error:
        raise ConversionError(f"{what}: {error}") from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise ConversionError(f"{what} is not what it should be: {error}") from error
