"""Parse and validate the settings of `LevitImageProcessor`."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

_MOST_PIXELS = 4096  # of an edge, as for `LevitConfig.image_size`

# Settings of transformers' processors that do not affect the pixels of a single image. They are accepted and ignored.
_HOUSEKEEPING_KEYS = frozenset(
    "_processor_class _valid_processor_keys auto_map data_format device disable_grouping feature_extractor_type"
    " image_processor_type image_seq_length input_data_format pad_size processor_class return_tensors use_fast".split()
)

# Settings that would change the pixels: only these values, which are LeViT's, are accepted.
_FIXED_KEYS = {"do_pad": False, "default_to_square": False}


def _check_fixed(settings: Mapping[str, Any]) -> None:
    """Raise ValueError if a setting has another value than LeViT's."""
    for name, value in _FIXED_KEYS.items():
        if settings.get(name, value) not in (value, None):
            raise ValueError(
                f"LevitImageProcessor does not support {name}: expected {value}, found {settings[name]!r}."
            )


def _check_choice(name: str, value: str | None, choices: Sequence[str | None]) -> None:
    """Raise ValueError if the value is not one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, found {value!r}.")


def _parse_flag(name: str, value: bool) -> bool:
    """Return a boolean setting, or raise ValueError if it is of another type."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, found {value!r}.")
    return value


def _parse_number(name: str, value: float) -> float:
    """Return a number as a float, or raise ValueError if it is not finite."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float | np.integer | np.floating)
        or not abs(value) < sys.float_info.max
    ):
        raise ValueError(f"{name} must be a finite number, found {value!r}.")
    return float(value)


def _parse_numbers(name: str, value: float | Sequence[float]) -> float | tuple[float, ...]:
    """Return one number, or a tuple with one number per channel."""
    if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str):
        return tuple(_parse_number(name, item) for item in value)
    return _parse_number(name, value)


def _parse_resample(value: int | str) -> int:
    """Return a Pillow resampling filter as an integer, from its number or its name."""
    filters = {filter.value: filter.name.lower() for filter in sorted(Image.Resampling)}
    if isinstance(value, str):
        value = next((number for number, name in filters.items() if name == value.lower()), value)
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value not in filters:
        raise ValueError(f"resample must be one of Pillow's filters {filters}, found {value!r}.")
    return int(value)


def _parse_size(name: str, value: int | Sequence[int] | Mapping[str, int], *, shortest_edge: bool) -> dict[str, int]:
    """Return a size as a dictionary; a shortest edge is accepted only if `shortest_edge` is True."""
    edges: dict[str, Any] = {}
    if isinstance(value, Mapping):
        edges = dict(value)
    elif isinstance(value, list | tuple) and len(value) == 2:
        edges = {"height": value[0], "width": value[1]}
    elif isinstance(value, int | np.integer):
        edges = {"shortest_edge": value} if shortest_edge else {"height": value, "width": value}
    by_edge = shortest_edge and edges.keys() == {"shortest_edge"}
    if not (by_edge or edges.keys() == {"height", "width"}) or not all(map(_is_positive_integer, edges.values())):
        forms = '(height, width), {"height": h, "width": w}' + (' or {"shortest_edge": n}' if shortest_edge else "")
        raise ValueError(f"{name} must be a positive integer, {forms}, found {value!r}.")
    if max(edges.values()) > _MOST_PIXELS:
        raise ValueError(f"{name} must be at most {_MOST_PIXELS} pixels, found {value!r}.")
    return {edge: int(pixels) for edge, pixels in edges.items()}


def _is_positive_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) > 0
