"""Find the LeViT among the tensors of a checkpoint, by the names of its first convolution."""

import re
from collections.abc import Collection

from .errors import ConversionError
from .layouts import _LAYOUTS

_LISTED = 8  # maximum number of names in a note

_FIRST_CONVOLUTIONS = [
    re.compile(rf"((?:.*?\.)??)(?:{marker.pattern})")
    for marker in {m for layout in _LAYOUTS.values() for m in (layout.marker, layout.folded_marker) if m is not None}
]


def _find_prefix(names: Collection[str], where: str, prefix: str | None) -> str:
    """Return the prefix of the names of the only LeViT in a checkpoint, such as "model." or "".

    Args:
        names: the names of all tensors.
        where: the name of the checkpoint in messages.
        prefix: the prefix to choose if there are several models, with or without the dot at its end; None for the only
            one.
    """
    found = {m[1] for name in names for pattern in _FIRST_CONVOLUTIONS if (m := pattern.fullmatch(name))}
    listed = ", ".join(repr(each.removesuffix(".")) for each in sorted(found)) or "none"
    if prefix is not None:
        wanted = f"{prefix.removesuffix('.')}." if prefix else ""
        if wanted not in found:
            raise ConversionError(
                f"{where} contains no LeViT under the prefix {prefix!r}: expected one of {listed}. Pass one of these as"
                " prefix=..."
            )
        return wanted
    if len(found) > 1:
        raise ConversionError(
            f"{where} contains {len(found)} LeViT models: expected one, found the prefixes {listed}. Choose one with"
            " prefix=..."
        )
    return next(iter(found), "")


def _describe_left_out(prefix: str, left_out: Collection[str]) -> str:
    """Return a note about the entries of a checkpoint that do not belong to its model."""
    shown = ", ".join(sorted(left_out)[:_LISTED])
    more = f" and {len(left_out) - _LISTED} more" if len(left_out) > _LISTED else ""
    place = f", whose names begin with {prefix!r}," if prefix else ""
    return f"{len(left_out)} entries do not belong to the model{place} and were left out: {shown}{more}."
