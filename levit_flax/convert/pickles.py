"""Read PyTorch checkpoints without PyTorch, and without running anything that they hold.

A pickle is a program: its instructions import names and call them. So no unpickler of Python's runs here. `pickletools`
splits the pickle into instructions, and `_Machine` carries out the few that plain containers, numbers, strings and
tensors need. A global is looked up by its exact name in a fixed table, never imported; what lies on the machine's stack
is data, never a callable; a call looks its target's name up in a second table. Objects that training leaves beside the
weights (`argparse.Namespace` and the like) stay `Inert` records. Anything else is refused by name.

Nothing is copied but big-endian numbers: tensors are read-only views of one memory map, each checked against the bounds
of its storage. So memory stays in proportion to the file, whatever the pickle asks for.
"""

import dataclasses
import math
import mmap
import pickle
import pickletools
import re
import struct
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
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
# What training checkpoints hold beside weights: arguments, paths, learning-rate schedules, best scores, random states.
# In protocol 2, torch.save's default, bytes are a call of _codecs.encode.
_INERT = frozenset(
    {
        "_codecs.encode",
        "argparse.Namespace",
        "collections.Counter",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy.dtype",
        "numpy.ndarray",
        "pathlib.PosixPath",
        "pathlib.WindowsPath",
        "pathlib._local.PosixPath",
        "pathlib._local.WindowsPath",
        "torch.device",
    }
)
_KEY_TYPES = (str, int, float, bool, bytes, type(None))
# A training checkpoint is about six containers deep; the limit keeps recursive readers of the result safe.
_MAX_DEPTH = 64
_MAX_DIMENSIONS = 64  # numpy's limit
# torch.Tensor.expand repeats a storage at no cost in the file; a reader that copies the tensor pays in full.
_MAX_EXPANDED = 2**20
_SAVE_WEIGHTS_ALONE = "if you trust the file, load it with PyTorch and save its state dict alone with torch.save"

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
_LONGEST_MAGIC = 64
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, then the lengths of the name and of the extra field

# What malformed pickles and zip files raise in the standard library, and in torch.load, which lets everything through.
_MALFORMED = (ValueError, TypeError, LookupError, struct.error)
_MALFORMED_ZIP = (*_MALFORMED, zipfile.BadZipFile, NotImplementedError)
_MALFORMED_LEGACY = (*_MALFORMED, pickle.UnpicklingError, RuntimeError, EOFError, AssertionError, AttributeError)


@dataclasses.dataclass
class Inert:
    """Record an object that a checkpoint holds beside its weights, as data; the object itself is never built.

    Attributes:
        name: The class or function that would have built it, such as `argparse.Namespace`.
        arguments: What it would have been called with.
        state: Its attributes, usually a dict; None where the pickle gives none.
    """

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


def read_pickle(path: Path) -> object:
    """Read a checkpoint written by `torch.save` (`.pth`, `.pt`, `.bin`), running no code from it.

    The zip format of PyTorch 1.6 and later needs no PyTorch. The format before it is read by PyTorch with
    `weights_only=True`.

    Args:
        path: The checkpoint file. It must not change while arrays from it are in use.

    Returns:
        What was saved. Dicts, lists, tuples, numbers and strings come as they are; tensors and parameters as read-only
        numpy arrays of the same shape, strides and dtype (`ml_dtypes.bfloat16` for bfloat16); `torch.Size` as a tuple;
        dtypes by name ("torch.float32"); objects that hold no weights as `Inert` records. Attributes of an OrderedDict,
        such as the `_metadata` of a state dict, are left out.

    Raises:
        ConversionError: The file is not such a checkpoint, is damaged, or holds something that may run code.
        OSError: The file cannot be opened.

    Source: torch/serialization.py (file formats), torch/_utils.py (tensor constructors).
    """
    with path.open("rb") as file:
        start = file.read(_LONGEST_MAGIC)
    try:
        if start.startswith(_ZIP_MAGIC):
            return _read_zip(path)
        if _LEGACY_MAGIC in start:
            return _read_legacy(path)
        raise ConversionError(_describe_foreign_file(start))
    except ConversionError as error:
        raise ConversionError(f"{path} cannot be read as a PyTorch checkpoint: {error}.") from error.__cause__


def _describe_foreign_file(start: bytes) -> str:
    """Say what a file that `torch.save` did not write seems to be, from its first bytes."""
    if not start:
        return "the file is empty; copy or download it again"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself; fetch the file with `git lfs pull`"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, probably the error page of a failed download; download the file again"
    return f"torch.save writes a zip file, and this one begins with {start[:8]!r}; give a file that torch.save wrote"


def _read_zip(path: Path) -> object:
    try:
        checkpoint = _ZipCheckpoint(path)
        value = _Machine(checkpoint.load_storage).run(checkpoint.read_entry("data.pkl").tobytes())
    except ConversionError:
        raise
    except _MALFORMED_ZIP as error:
        raise ConversionError(f"it is truncated or damaged ({error!s:.200}); copy or download it again") from error
    _check_nesting(value)
    return value


@dataclasses.dataclass(frozen=True, eq=False)
class _Storage:
    """The flat memory that tensors are views of: C-contiguous and read-only, in this machine's byte order."""

    elements: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Global:
    """Stand for the class or function that an allowed name has in PyTorch or Python."""

    name: str


class _ZipCheckpoint:
    """The entries of a zip checkpoint, as read-only views of one memory map."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            self._bytes = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self._entries = {entry.filename: entry for entry in entries}
        if len(self._entries) != len(entries):
            raise ValueError("two of its entries have the same name")
        self._folder = self._find_folder()
        self._byteorder = self._read_byteorder()
        self._storages: dict[str, _Storage] = {}

    def _find_folder(self) -> str:
        """Return the one folder that everything in a checkpoint lies in, named after the file it was first saved as."""
        folders = [name.removesuffix("/data.pkl") for name in self._entries if name.endswith("/data.pkl")]
        if len(folders) != 1:
            raise ConversionError(
                f"a zip file from torch.save has one entry named data.pkl, and this one has {len(folders)}; "
                "give a file that torch.save wrote"
            )
        if f"{folders[0]}/constants.pkl" in self._entries:
            raise ConversionError(
                "it is a TorchScript program, not plain weights; load it with torch.jit.load and save its state dict "
                "with torch.save(model.state_dict(), path)"
            )
        return folders[0]

    def _read_byteorder(self) -> str:
        if f"{self._folder}/byteorder" not in self._entries:
            return "little"  # PyTorch records the byte order since 2.1; before, all but a few machines wrote this one
        byteorder = self.read_entry("byteorder").tobytes().decode()
        if byteorder not in ("little", "big"):
            raise ValueError(f"its byte order is {byteorder!r:.20}")
        return byteorder

    def read_entry(self, name: str) -> memoryview:
        """Return the checked bytes of an entry, not copied."""
        entry = self._entries.get(f"{self._folder}/{name}")
        if entry is None:
            raise ValueError(f"its entry {name!r:.50} is missing")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ConversionError(
                f"torch.save stores its entries uncompressed, and {name!r:.50} is compressed; "
                "load it with torch.load and save it again with torch.save"
            )
        header = self._bytes[entry.header_offset :][: _LOCAL_HEADER.size]
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        start = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        content = self._bytes[start : start + entry.file_size]
        if signature != _ZIP_MAGIC or len(content) != entry.file_size:
            raise ValueError(f"its entry {name!r:.50} does not lie where its directory says")
        # PyTorch itself ignores the checksums. They cost a third of a second per gigabyte; a weight that is wrong in
        # silence costs more. Zero stands for none: torch.serialization.set_crc32_options(False) writes it.
        if entry.CRC not in (0, zlib.crc32(content)):
            raise ValueError(f"its entry {name!r:.50} does not match its checksum")
        return content

    def load_storage(self, identifier: object) -> _Storage:
        """Return the storage that a persistent identifier, ("storage", class, key, device, length), stands for."""
        match identifier:
            case ("storage", _Global(name), str(key), str(), int(length)) if name in _STORAGES:
                dtype = _STORAGES[name]
            case _:
                raise ValueError("a reference to a storage is malformed")
        if key not in self._storages:
            elements = np.frombuffer(self.read_entry(f"data/{key}"), dtype)
            if self._byteorder != sys.byteorder:
                elements = elements.view(f"u{dtype.itemsize}").byteswap().view(dtype)
                elements.flags.writeable = False
            self._storages[key] = _Storage(elements)
        storage = self._storages[key]
        if (storage.elements.dtype, storage.elements.size) != (dtype, length):
            raise ValueError(f"storage {key!r:.50} has another type or length than the reference to it says")
        return storage


def _rebuild_tensor(
    storage: _Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    requires_grad: bool,
    backward_hooks: object,
    metadata: object = None,
) -> np.ndarray:
    """Return a read-only view of a storage; offset and strides count elements."""
    numbers = (offset, *shape, *strides)
    if type(storage) is not _Storage or any(type(n) is not int or not 0 <= n <= sys.maxsize for n in numbers):
        raise ValueError("a tensor is not described by a storage and whole numbers")
    if len(shape) != len(strides) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"a tensor has {len(shape)} dimensions and {len(strides)} strides")
    if metadata:
        raise ConversionError("it has a tensor with a pending conjugation or negation; resolve it before saving")
    elements, count = storage.elements, math.prod(shape)
    if count == 0:
        return np.ndarray(shape, elements.dtype, b"")
    if offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) >= elements.size:
        raise ValueError("a tensor reaches outside its storage")
    if count > max(elements.size, _MAX_EXPANDED):
        raise ConversionError(f"it has a tensor that repeats {elements.size} numbers to {count}; save it contiguous")
    # numpy checks the bounds once more.
    width = elements.itemsize
    return np.ndarray(shape, elements.dtype, elements, offset * width, [stride * width for stride in strides])


def _rebuild_parameter(
    tensor: np.ndarray, requires_grad: bool, backward_hooks: object, state: object = None
) -> np.ndarray:
    if type(tensor) is not np.ndarray:
        raise ValueError("a parameter holds no tensor")
    return tensor


def _rebuild_size(sizes: tuple[Any, ...]) -> tuple[Any, ...]:
    if type(sizes) is not tuple:
        raise ValueError("a torch.Size holds no tuple")
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
    return ConversionError(
        f"it holds {name!r:.100}, which is no part of plain weights and may run code when it is built; "
        + _SAVE_WEIGHTS_ALONE
    )


class _Machine:
    """Carry out the pickle instructions that plain data and tensors need.

    Source: CPython Lib/pickletools.py, which documents every instruction.
    """

    def __init__(self, load_storage: Callable[[object], _Storage]) -> None:
        self._load_storage = load_storage
        self._stack: list[Any] = []
        self._outer_stacks: list[list[Any]] = []  # one for each open mark
        self._memo: dict[int, Any] = {}

    def run(self, program: bytes) -> object:
        """Return what the program leaves on the stack when it stops."""
        for opcode, argument, _ in pickletools.genops(program):
            self._step(opcode.name, argument)
        (result,) = self._stack
        return result

    def _step(self, instruction: str, argument: Any) -> None:
        match instruction:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8":
                self._stack.append(argument)
            case "NONE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4" | "BINFLOAT":
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
            case "APPENDS":
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
            case "REDUCE" | "NEWOBJ":
                self._call(*self._pop(2))
            case "BUILD":
                self._set_state(*self._pop(1))
            case _:
                raise ConversionError(
                    f"its pickle has the instruction {instruction}, which weights do not need and which may run code; "
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
        if type(target) is not list:
            raise ValueError("something that is no list is appended to")
        target.extend(items)

    def _update(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) not in (dict, OrderedDict):
            raise ValueError("something that is no dict is assigned to")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in _KEY_TYPES:
                raise ValueError("a key of a dict is neither a string nor a number")
            target[key] = value

    def _look_up(self, module: object, name: object) -> None:
        if type(module) is not str or type(name) is not str:
            raise ValueError("the name of a global is no string")
        full_name = f"{module}.{name}"
        if full_name in _DTYPES:
            self._stack.append(full_name)
        elif full_name in _CONSTRUCTORS or full_name in _STORAGES or full_name in _INERT:
            self._stack.append(_Global(full_name))
        else:
            raise _refused_global(full_name)

    def _call(self, target: object, arguments: object) -> None:
        if type(target) is not _Global or target.name in _STORAGES or type(arguments) is not tuple:
            raise ValueError("something that is no constructor is called")
        if target.name in _INERT:
            self._stack.append(Inert(target.name, arguments))
        else:
            self._stack.append(_CONSTRUCTORS[target.name](*arguments))

    def _set_state(self, state: object) -> None:
        target = self._stack[-1]
        if type(target) is Inert:
            target.state = state
        elif type(target) is not OrderedDict:  # the attributes of an OrderedDict are left out
            raise ValueError("something that has no attributes is given some")


def _check_nesting(value: object) -> None:
    """Refuse containers that contain themselves or lie too deep for a recursive reader."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = list({id(child): child for parent in level for child in _children(parent)}.values())
        if not level:
            return
    raise ConversionError(f"its containers lie more than {_MAX_DEPTH} deep in one another; " + _SAVE_WEIGHTS_ALONE)


def _children(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, Inert):
        return (value.arguments, value.state)
    return ()


def _read_legacy(path: Path) -> object:
    try:
        import torch
    except ImportError as error:
        raise ConversionError(
            "it has the format from before PyTorch 1.6, which PyTorch itself must read; "
            "install it with `pip install levit-flax[torch]`"
        ) from error
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
        _check_nesting(value)
        return _to_numpy(value)
    except ConversionError:
        raise
    except _MALFORMED_LEGACY as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise _refused_global(refused[1]) from error
        raise ConversionError(
            "torch.load(weights_only=True) finds it damaged or more than weights; copy or download it again, or "
            + _SAVE_WEIGHTS_ALONE
        ) from error


def _to_numpy(value: Any) -> Any:
    """Return the value with every tensor in it as a read-only numpy array."""
    import torch

    if isinstance(value, torch.Tensor):
        if value.dtype == torch.bfloat16:
            array = value.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            array = value.detach().numpy()
        array.flags.writeable = False
        return array
    if isinstance(value, dict):
        return {key: _to_numpy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_to_numpy(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_to_numpy(item) for item in value)
    return str(value) if isinstance(value, torch.dtype) else value
