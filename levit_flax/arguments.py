"""Check the types of a function's arguments against its annotations."""

import functools
import inspect
import numbers
import os
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin

import jax
import numpy as np

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _is_collection(value: Any) -> bool:
    return hasattr(value, "__len__") and hasattr(value, "__iter__") and not isinstance(value, str | bytes | Mapping)


def _is_sequence(value: Any) -> bool:
    indexed = hasattr(value, "__len__") and hasattr(value, "__getitem__")
    return indexed and not isinstance(value, str | bytes | Mapping)


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


# How messages name a type, and which values it accepts if `isinstance` is not the answer.
_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    type(None): ("None", lambda value: value is None),
    bool: ("a bool", lambda value: isinstance(value, bool | np.bool_)),
    int: ("an int", lambda value: isinstance(value, numbers.Integral) and not isinstance(value, bool)),
    float: ("a number", lambda value: isinstance(value, numbers.Real) and not isinstance(value, bool)),
    str: ("a str", lambda value: isinstance(value, str)),
    Path: ("a path", lambda value: isinstance(value, os.PathLike)),
    dict: ("a mapping", lambda value: isinstance(value, Mapping)),
    Mapping: ("a mapping", lambda value: isinstance(value, Mapping)),
    tuple: ("a tuple", lambda value: isinstance(value, tuple | list)),
    Sequence: ("a sequence", _is_sequence),
    Collection: ("a collection", _is_collection),
    Callable: ("a function", callable),
    np.ndarray: ("an array", _is_array),
    jax.Array: ("an array", _is_array),
}


def _check_types(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make a function raise TypeError if an argument does not have the annotated type.

    The elements of sequences and mappings are not checked, nor are parameters annotated as `Any`.
    """
    signature = inspect.signature(function)
    kinds = {name: _kinds(parameter.annotation) for name, parameter in signature.parameters.items()}

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # raises Python's message about missing or unknown arguments
        for name, value in bound.arguments.items():
            if kinds[name] and not any(accepts(value) for _, accepts in kinds[name]):
                expected = " or ".join(dict.fromkeys(kind for kind, _ in kinds[name]))
                raise TypeError(f"{name} has the wrong type: expected {expected}, found {_describe(value)}.")
        return function(*args, **kwargs)

    return checked


def _kinds(annotation: Any) -> list[tuple[str, Callable[[Any], bool]]]:
    """Return the name and the test of each type that an annotation accepts; an empty list accepts everything."""
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [_kinds(part) for part in get_args(annotation)]
        return [kind for part in parts for kind in part] if all(parts) else []
    cls = get_origin(annotation) or annotation
    if cls in _KINDS:
        return [_KINDS[cls]]
    if not isinstance(cls, type) or cls in (Any, inspect.Parameter.empty):
        return []
    return [(f"a {cls.__name__}", lambda value: isinstance(value, cls))]


def _describe(value: Any) -> str:
    """Return a short description of a value for messages."""
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    text = repr(value) if isinstance(value, str | bytes | Path) else ""
    return f"the {type(value).__name__} {text}" if 0 < len(text) <= 60 else f"a value of type {type(value).__name__}"
