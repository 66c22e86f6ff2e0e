"""Explain wrong calls of a model, which Flax reports by the scope in which they fail."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from flax import errors

from .modeling_variables import _collections, _differences

if TYPE_CHECKING:
    from .modeling import LevitBase

_Call = TypeVar("_Call", bound=Callable[..., Any])

_MISMATCHES = (
    errors.ScopeCollectionNotFound,
    errors.ScopeParamNotFoundError,
    errors.ScopeParamShapeError,
    errors.ScopeVariableNotFoundError,
)
_LISTED = 3  # arrays


def _explained(call: _Call) -> _Call:
    """Make the `__call__` of a model explain wrong arguments, variables, `mutable` and random keys."""
    signature = inspect.signature(call)

    @functools.wraps(call)
    def explained(self: Any, *args: Any, **options: Any) -> Any:
        _check_arguments(signature, type(self).__name__, args, options)
        try:
            return call(self, *args, **options)
        except errors.ModifyScopeVariableError:
            raise ValueError(
                'Training updates the running statistics: expected mutable=["batch_stats"] with train=True, found that'
                ' they are immutable. Call output, updates = model.apply(..., train=True, mutable=["batch_stats"]).'
            ) from None
        except errors.InvalidRngError:
            if self.is_initializing():
                raise
            raise ValueError(
                f"Training with drop_path_rate={self.config.drop_path_rate} draws random numbers: expected a key for"
                ' "drop_path", found none. Pass rngs={"drop_path": key} to apply, with a new key for each step.'
            ) from None
        except _MISMATCHES:
            explanation = _explain_mismatch(self.clone(parent=None), self.variables)
            if explanation is None:
                raise
            raise ValueError(explanation) from None

    return explained  # type: ignore[return-value]


def _check_arguments(
    signature: inspect.Signature, name: str, args: tuple[Any, ...], options: Mapping[str, Any]
) -> None:
    """Raise TypeError if arguments of a model's `__call__` are unknown or not where they belong."""
    parameters = [parameter for parameter in signature.parameters.values() if parameter.name != "self"]
    known = [parameter.name for parameter in parameters]
    positional = [parameter.name for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]
    unknown = [option for option in options if option not in known]
    if unknown:
        hint = "Pass train=True for training mode." if "train" in unknown[0] else "Correct or remove it."
        raise TypeError(
            f"{name} has no argument {unknown[0]}: expected {', '.join(known)}, found"
            f" {unknown[0]}={options[unknown[0]]!r}. {hint}"
        )
    labels = dict(zip(positional, args, strict=False)).get("labels")
    if len(args) > len(positional) or isinstance(labels, bool):
        raise TypeError(
            f"{name} takes only {' and '.join(positional)} by position: expected the other arguments by keyword, found"
            f" {args[-1]!r}. Pass train=True for training mode."
        )


def _explain_mismatch(model: "LevitBase", variables: Mapping[str, Any]) -> str | None:
    """Return how variables differ from those of a model, or None if they have the same paths and shapes."""
    name = type(model).__name__
    missing = [collection for collection in _collections(model) if not variables.get(collection)]
    if missing:
        return (
            f"The variables of {name} have no {' and no '.join(missing)}: expected the collections"
            f" {' and '.join(_collections(model))}, found {', '.join(variables) or 'none'}. Pass the whole tree that"
            " init or from_pretrained returned, and use folded variables with the model that fold_batch_norm returned."
        )
    differing, count = _differences(model, variables)
    if not differing:
        return None
    more = f" and {len(differing) - _LISTED} more" if len(differing) > _LISTED else ""
    return (
        f"The variables do not fit {name}: {len(differing)} of {count} arrays differ,"
        f" {', '.join(differing[:_LISTED])}{more}. Use the model and the variables that the same call returned."
    )
