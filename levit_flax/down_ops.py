"""The downsamplings between the stages of a model."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from .config_values import _brief, _Derived, _integer


class DownOp(NamedTuple):
    """The settings of one downsampling, in the order of transformers' `down_ops`.

    Attributes:
        kind: always "Subsample".
        key_dim: channels of a query or key, per head.
        num_attention_heads: heads of the downsampling attention.
        attention_ratio: value channels as a multiple of `key_dim`.
        mlp_ratio: hidden channels of the MLP that follows, as a multiple of the next stage's width; 0 for no MLP.
        stride: distance between neighboring queries, in tokens.

    Examples:
        >>> from levit_flax import LevitConfig
        >>> LevitConfig().down_ops[0]
        DownOp(kind='Subsample', key_dim=16, num_attention_heads=8, attention_ratio=4, mlp_ratio=2, stride=2)
    """

    kind: str
    key_dim: int
    num_attention_heads: int
    attention_ratio: int
    mlp_ratio: int
    stride: int


class _DerivedDownOps(tuple[DownOp, ...], _Derived):
    __slots__ = ()


# The smallest and the largest value of each integer.
_LIMITS = ((1, 1024), (1, 1024), (1, 64), (0, 64), (1, 64))


def _checked_down_ops(given: Any, hidden_sizes: Sequence[int], key_dim: Sequence[int]) -> tuple[DownOp, ...]:
    """Return a config's downsamplings, or the default ones if `given` is None or was derived."""
    width = key_dim[0]  # the original code uses the first stage's key_dim for all
    default = _DerivedDownOps(DownOp("Subsample", width, c // width, 4, 2, 2) for c in hidden_sizes[:-1])
    if given is None or isinstance(given, _Derived):
        for op in default:
            _integer("down_ops heads (hidden_sizes // key_dim[0])", op.num_attention_heads, *_LIMITS[1])
        return default
    if not isinstance(given, Sequence) or not all(isinstance(op, list | tuple) for op in given):
        raise ValueError(f"LevitConfig.down_ops must be a sequence of sequences or None, found {_brief(given)}.")
    # Every model that transformers builds appends an empty entry to its config's list.
    entries = [tuple(op) for op in given if tuple(op) != ("",)]
    if len(entries) != len(default):
        raise ValueError(
            f"LevitConfig.down_ops must have {len(default)} entries for {len(hidden_sizes)} stages, found"
            f" {len(entries)}."
        )
    checked = []
    for entry in entries:
        if len(entry) != len(DownOp._fields) or entry[0] != "Subsample":
            raise ValueError(f"LevitConfig.down_ops entries must be 'Subsample' and 5 integers, found {_brief(entry)}.")
        pairs = zip(entry[1:], _LIMITS, strict=True)
        checked.append(DownOp("Subsample", *(_integer("down_ops", value, *limits) for value, limits in pairs)))
    return default if tuple(checked) == default else tuple(checked)
