"""Build plain data and tensors from a pickle, without running code from it.

A pickle is a program whose instructions import names and call them, so Python's unpicklers are not used. `pickletools`
splits the pickle into instructions, and `_Machine` executes the few that containers, numbers, strings and tensors need:

- A global is a name and never imported.
- Values on the stack are data, never callables. A call looks up its target's name in a fixed table of constructors.
- All other objects that training scripts save with the weights stay `_Inert` records of their names and arguments.
- Instructions that neither data nor records need raise an error that names them.
"""

import dataclasses
import math
import pickletools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import ml_dtypes
import numpy as np

from .errors import ConversionError

_STORAGES = {
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}
_DTYPES = frozenset(
    {
        "torch.float64",
        "torch.float32",
        "torch.float16",
        "torch.bfloat16",
        "torch.int64",
        "torch.int32",
        "torch.int16",
        "torch.int8",
        "torch.uint8",
        "torch.bool",
    }
)
# Instructions that push their argument.
_PUSHED = frozenset(
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 NONE BININT BININT1 BININT2"
    " LONG1 LONG4 BINFLOAT".split()
)
_KEY_TYPES = (str, int, float, bool, bytes, type(None))
# A training checkpoint nests about six containers; the limit protects recursive code that reads the result.
_MAX_DEPTH = 64
_MAX_DIMENSIONS = 64  # numpy's limit
# torch.Tensor.expand repeats a storage for free, but copies of the tensor have the full size.
_MAX_EXPANDED = 2**20
_SAVE_WEIGHTS_ALONE = "if you trust the file, load it with PyTorch and save its state dict alone with torch.save"


@dataclasses.dataclass
class _Inert:
    """A record of an object that a checkpoint contains besides weights; the object itself is never built.

    Attributes:
        name: the class or function that would have built it, such as `argparse.Namespace`.
        arguments: its arguments.
        state: the object's attributes, usually a dict; None if the pickle sets none.
        items: the items of a dictionary of an unknown class. Those of other containers are dropped.
    """

    name: str
    arguments: tuple[Any, ...]
    state: Any = None
    items: dict[Any, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class _Storage:
    """The flat array that tensors are views of: C-contiguous, read-only, in native byte order."""

    elements: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Global:
    """Placeholder for a class or function, which is never imported."""

    name: str


def _rebuild_tensor(
    storage: "_Storage | _Inert",
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    requires_grad: bool,
    backward_hooks: object,
    metadata: object = None,
) -> "np.ndarray | _Inert":
    """Return a read-only view of a storage; offset and strides are in elements.

    Tensors that no model of ours has stay records: other dtypes, and views that repeat or have yet to be computed.
    """
    if type(storage) is _Inert:
        return _Inert(f"a tensor with the {storage.name}", ())
    numbers = (offset, *shape, *strides)
    if type(storage) is not _Storage or any(type(n) is not int or not 0 <= n <= sys.maxsize for n in numbers):
        raise ValueError("a tensor is not described by a storage and integers")
    if len(shape) != len(strides) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"a tensor has {len(shape)} dimensions and {len(strides)} strides")
    if metadata:
        return _Inert("a tensor with a pending conjugation or negation", ())
    elements, count = storage.elements, math.prod(shape)
    if count == 0:
        return np.ndarray(shape, elements.dtype, b"")
    if offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) >= elements.size:
        raise ValueError("a tensor reaches outside its storage")
    if count > max(elements.size, _MAX_EXPANDED):
        return _Inert(f"a tensor that expands {elements.size} numbers to {count}", ())
    width = elements.itemsize
    return np.ndarray(shape, elements.dtype, elements, offset * width, [stride * width for stride in strides])


def _rebuild_parameter(
    tensor: np.ndarray | _Inert, requires_grad: bool, backward_hooks: object, state: object = None
) -> np.ndarray | _Inert:
    if type(tensor) not in (np.ndarray, _Inert):
        raise ValueError("a parameter is not built from a tensor")
    return tensor


def _rebuild_size(sizes: tuple[Any, ...]) -> tuple[Any, ...]:
    if type(sizes) is not tuple:
        raise ValueError("a torch.Size is not built from a tuple")
    return sizes


def _rebuild_ordered_dict() -> OrderedDict[Any, Any]:
    return OrderedDict()


_CONSTRUCTORS: dict[str, Callable[..., object]] = {
    "collections.OrderedDict": _rebuild_ordered_dict,
    "torch.Size": _rebuild_size,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
}


def _refused_global(name: str) -> ConversionError:
    """Return the error for a global that is not allowed."""
    return ConversionError(
        f"it contains {name!r:.100}, which is not plain data and could execute code; " + _SAVE_WEIGHTS_ALONE
    )


class _Machine:
    """Execute the pickle instructions that plain data and tensors need.

    Source: CPython Lib/pickletools.py, which documents every instruction.
    """

    def __init__(self, load_storage: Callable[[object], _Storage | _Inert]) -> None:
        self._load_storage = load_storage
        self._stack: list[Any] = []
        self._outer_stacks: list[list[Any]] = []  # one per open mark
        self._memo: dict[int, Any] = {}

    def run(self, program: bytes) -> object:
        """Execute a pickle and return the one value left on the stack."""
        for opcode, argument, _ in pickletools.genops(program):
            self._step(opcode.name, argument)
        (result,) = self._stack
        return result

    # One case for each instruction reads better than a table of functions.
    def _step(self, instruction: str, argument: Any) -> None:  # noqa: C901, PLR0912, PLR0915
        match instruction:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _ if instruction in _PUSHED:
                self._stack.append(argument)
            case "NEWTRUE" | "NEWFALSE":
                self._stack.append(instruction == "NEWTRUE")
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = self._stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._stack[-1]
            case "BINGET" | "LONG_BINGET":
                self._stack.append(self._memo[argument])
            case "MARK":
                self._outer_stacks.append(self._stack)
                self._stack = []
            case "EMPTY_TUPLE":
                self._stack.append(())
            case "TUPLE":
                items = self._pop_to_mark()
                self._stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = self._pop(int(instruction[-1]))
                self._stack.append(tuple(items))
            case "EMPTY_LIST":
                self._stack.append([])
            case "APPEND":
                self._extend(self._pop(1))
            case "APPENDS" | "ADDITEMS":
                self._extend(self._pop_to_mark())
            case "EMPTY_DICT":
                self._stack.append({})
            case "SETITEM":
                self._update(self._pop(2))
            case "SETITEMS":
                self._update(self._pop_to_mark())
            case "GLOBAL":
                self._look_up(*argument.split(" ", 1))
            case "STACK_GLOBAL":
                self._look_up(*self._pop(2))
            case "BINPERSID":
                self._stack.append(self._load_storage(self._stack.pop()))
            case "EMPTY_SET":
                self._stack.append(_Inert("builtins.set", ()))
            case "FROZENSET":
                items = self._pop_to_mark()
                self._stack.append(_Inert("builtins.frozenset", tuple(items)))
            case "REDUCE" | "NEWOBJ":
                self._call(*self._pop(2))
            case "NEWOBJ_EX":
                target, arguments, _ = self._pop(3)
                self._call(target, arguments)
            case "BUILD":
                self._set_state(*self._pop(1))
            case _:
                raise ConversionError(
                    f"its pickle has the instruction {instruction}, which torch.save does not write for plain data; "
                    + _SAVE_WEIGHTS_ALONE
                )

    def _pop(self, count: int) -> list[Any]:
        items = [self._stack.pop() for _ in range(count)]
        return items[::-1]

    def _pop_to_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._outer_stacks.pop()
        return items

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is not _Inert:
            raise ValueError("it appends to an object that is not a list")

    def _update(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is _Inert:
            target = target.items
        if type(target) not in (dict, OrderedDict):
            raise ValueError("it assigns items to an object that is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) in _KEY_TYPES:  # no name of a weight is anything else
                target[key] = value

    def _look_up(self, module: object, name: object) -> None:
        if type(module) is not str or type(name) is not str:
            raise ValueError("the name of a global is not a string")
        full_name = f"{module}.{name}"
        if full_name in _DTYPES:
            self._stack.append(full_name)
        else:
            self._stack.append(_Global(full_name))

    def _call(self, target: object, arguments: object) -> None:
        if type(target) is not _Global or target.name in _STORAGES or type(arguments) is not tuple:
            raise ValueError("it calls an object that is not a constructor")
        constructor = _CONSTRUCTORS.get(target.name)
        self._stack.append(_Inert(target.name, arguments) if constructor is None else constructor(*arguments))

    def _set_state(self, state: object) -> None:
        target = self._stack[-1]
        if type(target) is _Inert:
            target.state = state
        elif type(target) is not OrderedDict:  # attributes of an OrderedDict are dropped
            raise ValueError("it sets attributes on an object that has none")


def _check_nesting(value: object) -> None:
    """Raise ConversionError if containers contain themselves or are nested too deeply."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = list({id(child): child for parent in level for child in _children(parent)}.values())
        if not level:
            return
    raise ConversionError(f"its containers are nested more than {_MAX_DEPTH} levels deep; " + _SAVE_WEIGHTS_ALONE)


def _children(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, _Inert):
        return (value.arguments, value.state, value.items)
    return ()
