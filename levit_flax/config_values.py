"""Check the values of a `LevitConfig`, and represent its class names."""

import math
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

# The limits of sizes: far above every useful LeViT, and low enough that a damaged or hostile config cannot exhaust the
# memory. The attention biases need memory for the square of the number of tokens.
_MOST_TOKENS = 4096
_MOST_PIXELS = 4096
_MOST_LABELS = 1_000_000
_MOST_STAGES = 16


class _Derived:
    """Marks the value of a field that follows from other fields, and is derived again by `dataclasses.replace`."""

    __slots__ = ()


class _Labels(tuple[str, ...]):
    """Class names by index, with the methods of transformers' mapping from indices to names."""

    __slots__ = ()

    def keys(self) -> range:
        return range(len(self))

    def values(self) -> tuple[str, ...]:
        return tuple(self)

    def items(self) -> list[tuple[int, str]]:
        return list(enumerate(self))


class _DerivedLabels(_Labels, _Derived):
    __slots__ = ()


class _DerivedIndices(dict[str, int], _Derived):
    __slots__ = ()


def _integer(name: str, value: Any, least: int, most: int) -> int:
    number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    if isinstance(value, bool) or not number or value != int(value) or not least <= value <= most:
        raise ValueError(f"LevitConfig.{name} must be an integer from {least} to {most}, found {_brief(value)}.")
    return int(value)


def _integers(name: str, values: Any, least: int, most: int) -> tuple[int, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"LevitConfig.{name} must be a sequence with one integer per stage, found {_brief(values)}.")
    first = list(islice(values, _MOST_STAGES + 1))
    if len(first) > _MOST_STAGES:
        raise ValueError(f"LevitConfig.{name} must have at most {_MOST_STAGES} entries, found more.")
    return tuple(_integer(f"{name}[{i}]", value, least, most) for i, value in enumerate(first))


def _image_size(value: Any) -> int | tuple[int, int]:
    if isinstance(value, int | float):
        return _integer("image_size", value, 1, _MOST_PIXELS)
    size = _integers("image_size", value, 1, _MOST_PIXELS)
    if len(size) != 2:
        raise ValueError(f"LevitConfig.image_size must be an integer or (height, width), found {_brief(value)}.")
    return size[0] if size[0] == size[1] else (size[0], size[1])


def _brief(value: Any) -> str:
    """Return the representation of a value, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _ordered_labels(labels: Mapping[Any, Any]) -> tuple[str, ...]:
    try:
        by_index = {int(index): str(label) for index, label in labels.items()}
    except (ValueError, TypeError):
        raise ValueError(
            f"LevitConfig.id2label must map indices to class names, found the keys {_brief(list(labels))}."
        ) from None
    if sorted(by_index) != list(range(len(by_index))):
        raise ValueError(
            f"LevitConfig.id2label must name the classes 0 to {len(by_index) - 1} once each, found the indices"
            f" {_brief(sorted(by_index))}."
        )
    return tuple(by_index[i] for i in range(len(by_index)))
