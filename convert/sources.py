"""Open a PyTorch checkpoint, wherever it is, as a mapping from tensor names to arrays that are read when asked for."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import ml_dtypes  # registers bfloat16 with NumPy, which safetensors then finds by name
import numpy as np
from safetensors import SafetensorError, safe_open

from levit_flax.checkpoint import CONFIG_FILE, TORCH_WEIGHT_FILES, resolve

from .errors import ConversionError
from .pickles import read_pickle

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".json")

Tensors = Mapping[str, np.ndarray]


class Source(NamedTuple):
    """An opened checkpoint.

    Attributes:
        where: what to call it in messages.
        tensors: arrays by name, read when asked for.
        config: the parsed config.json beside the weights, or None.
        directory: where the weights and what belongs to them lie; None for a mapping.
        provenance: what a reader of the result needs to find the source again, JSON-ready.
    """

    where: str
    tensors: Tensors
    config: dict[str, Any] | None
    directory: Path | None
    provenance: dict[str, Any]


class SafetensorsFile(Mapping[str, np.ndarray]):
    """The tensors of one safetensors file, each read when asked for.

    Raises:
        ConversionError: the file is not whole, or not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = safe_open(path, framework="np")
        except (SafetensorError, OSError) as error:
            raise ConversionError(
                f"{path} is not a whole safetensors file ({error}): copy or download it again."
            ) from None
        self.names = tuple(self.file.keys())

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.names:
            raise KeyError(name)
        try:
            return self.file.get_tensor(name)
        except (SafetensorError, TypeError) as error:
            raise ConversionError(f"The tensor {name} of {self.path} cannot be read: {error}.") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Shards(Mapping[str, np.ndarray]):
    """The tensors of several files as one mapping."""

    def __init__(self, homes: dict[str, Tensors]) -> None:
        self.homes = homes

    def __getitem__(self, name: str) -> np.ndarray:
        return self.homes[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.homes)

    def __len__(self) -> int:
        return len(self.homes)


def open_source(
    source: str | Path | Mapping[str, Any],
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
    local_files_only: bool = False,
) -> Source:
    """Open a weight file, a directory, a Hub repository or a mapping.

    Args:
        source: a path, a Hub id, or a mapping from tensor names to arrays or tensors.
        revision: branch, tag or commit of a Hub repository.
        token: access token for the Hub.
        cache_dir: where downloads are kept.
        local_files_only: do not touch the network.

    Raises:
        ConversionError: what is there is not a checkpoint.
        OSError: nothing is there, or it cannot be read or fetched.
    """
    if isinstance(source, Mapping):
        tensors = check_tensors(source, "the mapping")
        return Source("the mapping", tensors, None, None, {"source": "a mapping of tensors"})
    provenance: dict[str, Any] = {"source": str(source)}
    path = Path(source).expanduser()
    if not path.exists() and path.suffix in WEIGHT_SUFFIXES:
        raise FileNotFoundError(f"There is no file {path}: expected a weight file, a directory or a Hub id.")
    if not path.is_file():
        resolved = resolve(
            source,
            weights=TORCH_WEIGHT_FILES,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        if resolved.revision:
            provenance["revision"] = resolved.revision
        path = cast(Path, resolved.weights)
    files = list_shards(path) if path.suffix == ".json" else {path: None}
    provenance["files"] = {file.name: sha256(file) for file in files}
    homes: dict[str, Tensors] = {}
    for file, names in files.items():
        tensors = read_weights(file)
        for name in tensors if names is None else names:
            if name not in tensors:
                raise ConversionError(f"{path} says that {file.name} holds {name}, which it does not.")
            homes[name] = tensors
    return Source(str(source), Shards(homes), read_config(path.parent), path.parent, provenance)


def list_shards(index: Path) -> dict[Path, list[str]]:
    """Return the files that an index names, with the tensors that each should hold."""
    entries = read_json(index).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise ConversionError(f"{index} has no weight_map: expected the index of a checkpoint in several files.")
    files: dict[Path, list[str]] = {}
    for name, file_name in entries.items():
        if Path(str(file_name)).name != file_name:
            raise ConversionError(f"{index} names {file_name!r}: a shard must lie beside its index.")
        if not (index.parent / file_name).is_file():
            raise ConversionError(f"{index} names {file_name}, which is missing: copy or download it too.")
        files.setdefault(index.parent / file_name, []).append(name)
    return files


def read_weights(path: Path) -> Tensors:
    """Open one weight file, by its content."""
    with path.open("rb") as file:
        start = file.read(9)
    if not start:
        raise ConversionError(f"{path} is empty: copy or download it again.")
    if path.suffix == ".safetensors" or start[8:] == b"{":
        return SafetensorsFile(path)
    return check_tensors(read_pickle(path), str(path))


def check_tensors(value: object, where: str) -> Tensors:
    """Return a mapping whose keys are strings and whose values are arrays, or say what it is instead."""
    if not isinstance(value, Mapping):
        raise ConversionError(f"{where} holds a {type(value).__name__}: expected a mapping from names to tensors.")
    tensors = {}
    for name, tensor in value.items():
        if not isinstance(name, str) or not hasattr(tensor, "shape"):
            raise ConversionError(
                f"{where} is no state dict: expected a tensor under every name, found a {type(tensor).__name__} under"
                f" {name!r}."
            )
        tensors[name] = as_numpy(tensor)
    return tensors


def as_numpy(tensor: Any) -> np.ndarray:
    """Return a NumPy array of a tensor, without importing the library that it comes from."""
    if hasattr(tensor, "detach"):  # PyTorch's: NumPy knows no bfloat16, which float32 holds exactly
        tensor = tensor.detach().cpu()
        if str(tensor.dtype) == "torch.bfloat16":
            return tensor.float().numpy().astype(ml_dtypes.bfloat16)
        return tensor.numpy()
    return np.asarray(tensor)


def read_config(directory: Path) -> dict[str, Any] | None:
    """Return the parsed config.json of a directory, or None where there is none."""
    path = directory / CONFIG_FILE
    return read_json(path) if path.is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds, or raise a ConversionError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path} is not JSON ({error}): copy or download it again.") from None
    if not isinstance(value, dict):
        raise ConversionError(f"{path} holds a JSON {type(value).__name__}: expected an object.")
    return value


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
