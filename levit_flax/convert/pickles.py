"""Read PyTorch checkpoints without PyTorch, and without running code from them.

Tensors are read-only views of one memory map, each checked against the bounds of its storage. Only big-endian numbers
are copied, so memory use is proportional to the file size.
"""

import mmap
import pickle
import re
import struct
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .errors import ConversionError
from .pickle_machine import (
    _SAVE_WEIGHTS_ALONE,
    _STORAGES,
    _check_nesting,
    _Global,
    _Inert,
    _Machine,
    _refused_global,
    _Storage,
)

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
_LONGEST_MAGIC = 64
_OTHER_STORAGE = re.compile(r"torch\.(storage\.)?\w+Storage")  # of dtypes that no model of ours has
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, then the lengths of the name and of the extra field

# Exceptions of the standard library on malformed pickles and zip files, and of torch.load, which does not wrap them.
_MALFORMED = (ValueError, TypeError, LookupError, struct.error)
_MALFORMED_ZIP = (*_MALFORMED, zipfile.BadZipFile, NotImplementedError)
_MALFORMED_LEGACY = (*_MALFORMED, pickle.UnpicklingError, RuntimeError, EOFError, AssertionError, AttributeError)


def _read_pickle(path: Path) -> object:
    """Read a checkpoint written by `torch.save` (`.pth`, `.pt`, `.bin`) without running code from it.

    PyTorch is not required, except for files in the format used before PyTorch 1.6, which `torch.load` reads with
    `weights_only=True`.

    Args:
        path: the checkpoint file. It must not change while arrays from it are in use.

    Returns:
        The saved object. Dicts, lists, tuples, numbers and strings keep their type. Tensors and parameters become
        read-only NumPy arrays of the same shape, strides and dtype (`ml_dtypes.bfloat16` for bfloat16), `torch.Size`
        becomes a tuple, dtypes become strings ("torch.float32"), and all other objects become `_Inert` records, which
        are never built. Attributes of an OrderedDict, such as a state dict's `_metadata`, are dropped.

    Raises:
        ConversionError: the file is not such a checkpoint, is damaged, or has an instruction that data does not need.
        OSError: the file cannot be opened.

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
    """Describe a file that `torch.save` did not write, from its first bytes."""
    if not start:
        return "the file is empty; copy or download it again"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself; download the file with `git lfs pull`"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, probably the error page of a failed download; download the file again"
    return f"torch.save writes zip files, and this file begins with {start[:8]!r}; pass a file written by torch.save"


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
        """Return the single top-level folder, which is named after the file that was first saved."""
        folders = [name.removesuffix("/data.pkl") for name in self._entries if name.endswith("/data.pkl")]
        if len(folders) != 1:
            raise ConversionError(
                f"a zip file from torch.save has one entry named data.pkl, and this one has {len(folders)}; "
                "pass a file written by torch.save"
            )
        if f"{folders[0]}/constants.pkl" in self._entries:
            raise ConversionError(
                "it is a TorchScript program, not plain weights; load it with torch.jit.load and save its state dict "
                "with torch.save(model.state_dict(), path)"
            )
        return folders[0]

    def _read_byteorder(self) -> str:
        if f"{self._folder}/byteorder" not in self._entries:
            return "little"  # PyTorch has recorded the byte order since 2.1; almost all machines are little-endian
        byteorder = self.read_entry("byteorder").tobytes().decode()
        if byteorder not in ("little", "big"):
            raise ValueError(f"its byte order is {byteorder!r:.20}")
        return byteorder

    def read_entry(self, name: str) -> memoryview:
        """Return the bytes of an entry without a copy, after checking them."""
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
            raise ValueError(f"its entry {name!r:.50} is not at the offset in the zip directory")
        # PyTorch ignores the checksums, but a silently damaged weight is worse than the time they cost. Zero means no
        # checksum; torch.serialization.set_crc32_options(False) writes it.
        if entry.CRC not in (0, zlib.crc32(content)):
            raise ValueError(f"its entry {name!r:.50} does not match its checksum")
        return content

    def load_storage(self, identifier: object) -> _Storage | _Inert:
        """Return the storage of a persistent identifier ("storage", class, key, device, length).

        Storages of other dtypes stay records of their class.
        """
        match identifier:
            case ("storage", _Global(name), str(key), str(), int(length)) if name in _STORAGES:
                dtype = _STORAGES[name]
            case ("storage", _Global(name), str(), str(), int()) if _OTHER_STORAGE.fullmatch(name):
                return _Inert(name, ())
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
            raise ValueError(f"storage {key!r:.50} does not have the type or length in the reference to it")
        return storage


def _read_legacy(path: Path) -> object:
    try:
        import torch
    except ImportError as error:
        raise ConversionError(
            "it has the format used before PyTorch 1.6, which only PyTorch can read; "
            "run: pip install 'levit-flax[torch]'"
        ) from error
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
        _check_nesting(value)
        return _with_arrays(value)
    except ConversionError:
        raise
    except _MALFORMED_LEGACY as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise _refused_global(refused[1]) from error
        raise ConversionError(
            "torch.load(weights_only=True) rejects it as damaged or as more than plain weights; copy or download it"
            " again, or " + _SAVE_WEIGHTS_ALONE
        ) from error


def _with_arrays(value: Any) -> Any:
    """Return the value with every tensor in it as a read-only NumPy array."""
    import torch

    if isinstance(value, torch.Tensor):
        array = _as_numpy(value)
        array.flags.writeable = False
        return array
    if isinstance(value, dict):
        return {key: _with_arrays(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_arrays(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_with_arrays(item) for item in value)
    return str(value) if isinstance(value, torch.dtype) else value


def _as_numpy(tensor: Any) -> np.ndarray:
    """Return a tensor of any library as a NumPy array; PyTorch is imported only for its own tensors."""
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if str(tensor.dtype) == "torch.bfloat16":  # Tensor.numpy does not support it
        import torch

        return np.asarray(tensor.view(torch.int16)).view(ml_dtypes.bfloat16)
    return np.asarray(tensor)
