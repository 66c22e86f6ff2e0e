"""Check a checkpoint against its architecture, and collect all problems."""

import enum
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from levit_flax.checkpoint import _NEGATIVE, _NOT_FINITE, _find_fault
from levit_flax.modeling_variables import _abstract_variables

from .architecture import _Architecture
from .errors import ConversionError
from .layouts import _IGNORED, _index_table, _Row, _Shape
from .sources import _Tensors

_LISTED = 8  # maximum number of names per kind in an error message


class _Problem(enum.Enum):
    """The kinds of problems, in the order in which they are reported."""

    MISSING = "missing"
    NO_TENSOR = "not tensors"
    UNEXPECTED = "unexpected"
    WRONG_SHAPE = "of the wrong shape"
    WRONG_DTYPE = "of the wrong dtype"
    NOT_FINITE = "not finite"
    NEGATIVE = "negative variances"
    OVERFLOW = "outside the range of the requested dtype"
    WRONG_TABLE = "index tables that disagree with the image size"


class _Problems:
    """All problems of a checkpoint, by kind."""

    def __init__(self) -> None:
        self.names: dict[_Problem, list[str]] = {kind: [] for kind in _Problem}

    def add(self, kind: _Problem, *names: str) -> None:
        """Record tensors that have a problem, each with its details if there are any."""
        self.names[kind] += names

    def __bool__(self) -> bool:
        return any(self.names.values())

    def __str__(self) -> str:
        return "\n".join(f"{len(names)} {kind.value}: {_listed(names)}" for kind, names in self.names.items() if names)

    def raise_if_any(self, summary: str) -> None:
        """Raise one ConversionError with all problems below the summary."""
        if self:
            # If none is missing, the unexpected ones are not misspelled names of the model's.
            foreign = self.names[_Problem.UNEXPECTED] and not self.names[_Problem.MISSING]
            advice = "\nRemove tensors of other modules before saving." if foreign else ""
            raise ConversionError(f"{summary}:\n{self}{advice}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


class _Mapped(NamedTuple):
    """The tensors of a checkpoint after comparison with those of its architecture.

    Attributes:
        rows: a row for every tensor of the architecture.
        readable: the rows whose tensor is present and has the right shape.
        ignored: names of the tensors that are ignored on purpose, by reason.
    """

    rows: tuple[_Row, ...]
    readable: tuple[_Row, ...]
    ignored: dict[str, tuple[str, ...]]


def _check_names(shapes: Mapping[str, _Shape], architecture: _Architecture, problems: _Problems) -> _Mapped:
    """Compare the names and shapes of a checkpoint with those that its architecture expects."""
    rows = tuple(architecture.layout.rows(architecture.structure))
    leaves = _abstract_variables(architecture.model)
    expected = {row.torch: row.permutation.torch_shape(leaves[row.flax].shape) for row in rows}
    ignored = _find_ignored(name for name in shapes if name not in expected)
    known = expected.keys() | set().union(*ignored.values())
    problems.add(_Problem.MISSING, *(name for name in expected if name not in shapes))
    problems.add(_Problem.UNEXPECTED, *(name for name in shapes if name not in known))
    for name, shape in expected.items():
        if name in shapes and shapes[name] != shape:
            problems.add(_Problem.WRONG_SHAPE, f"{name} (expected {shape}, found {shapes[name]})")
    return _Mapped(rows, tuple(row for row in rows if shapes.get(row.torch) == expected[row.torch]), ignored)


def _find_ignored(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the names that are ignored on purpose, by reason."""
    ignored: dict[str, list[str]] = {}
    for name in names:
        reason = _IGNORED.get(name.rpartition(".")[2])
        if reason:
            ignored.setdefault(reason, []).append(name)
    return {reason: tuple(names) for reason, names in ignored.items()}


def _check_values(row: _Row, tensor: np.ndarray, problems: _Problems) -> bool:
    """Check the dtype and the values of a tensor, and return whether it can be converted."""
    fault = _find_fault(row.flax, tensor)
    if fault is None:
        return True
    if fault == _NOT_FINITE:
        problems.add(_Problem.NOT_FINITE, row.torch)
    elif fault == _NEGATIVE:
        problems.add(_Problem.NEGATIVE, row.torch)
    else:
        problems.add(_Problem.WRONG_DTYPE, f"{row.torch} ({fault})")
    return False


def _check_tables(tensors: _Tensors, architecture: _Architecture, problems: _Problems) -> dict[str, np.ndarray]:
    """Compare the stored index tables with those computed from the image size.

    If a table only orders the offsets differently, it determines the order of the stored attention biases.

    Returns:
        For each table of attention biases in another order (by its path), the checkpoint's row of each of our rows.
    """
    orders = {}
    config, paths = architecture.model.config, architecture.layout.tables(architecture.structure)
    for name in tensors:
        if name.rpartition(".")[2] not in _IGNORED:
            continue
        if name not in paths:
            problems.add(_Problem.WRONG_TABLE, f"{name} (there is no attention layer with this name)")
            continue
        table, stored = _index_table(config, paths[name]), tensors[name]
        if stored.shape != table.shape or stored.dtype.kind not in "iu":
            wrong = f"{name} (expected integers {table.shape}, found {stored.dtype} {stored.shape})"
            problems.add(_Problem.WRONG_TABLE, wrong)
        elif (stored != table).any():
            order = _find_order(table, stored)
            if order is None:
                query, key = np.argwhere(stored != table)[0]
                wrong = f"first at query {query}, key {key}: expected {table[query, key]}, found {stored[query, key]}"
                problems.add(_Problem.WRONG_TABLE, f"{name} ({wrong})")
            else:
                orders[paths[name]] = order
    return orders


def _find_order(table: np.ndarray, stored: np.ndarray) -> np.ndarray | None:
    """Return the stored row of each of our rows, or None if the tables differ by more than the order."""
    order = np.empty(table.max() + 1, np.int64)
    order[table] = stored  # one arbitrary pair per offset; the next line checks that all pairs agree
    consistent = (order[table] == stored).all() and np.array_equal(np.sort(order), np.arange(len(order)))
    return order if consistent else None
