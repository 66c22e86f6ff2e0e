"""Checkpoints from handwritten pickle instructions, which the tests of the pickle reader share.

Most functions return instructions; `write` makes a checkpoint of them.
"""

import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from levit_flax.convert.errors import ConversionError
from levit_flax.convert.pickles import _read_pickle

ELEMENTS = np.arange(16, dtype="<f4")


def dump(value: object) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def name(full_name: str) -> bytes:
    module, _, attribute = full_name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def call(full_name: str, *arguments: bytes) -> bytes:
    return name(full_name) + b"(" + b"".join(arguments) + b"tR"


def storage(kind: str = "torch.FloatStorage", key: object = "0", length: object = ELEMENTS.size) -> bytes:
    return b"(" + dump("storage") + name(kind) + dump(key) + dump("cpu") + dump(length) + b"tQ"


def tensor(offset: object, shape: object, strides: object, data: bytes | None = None, metadata: object = None) -> bytes:
    view = dump(offset) + dump(shape) + dump(strides)
    hooks = call("collections.OrderedDict")
    return call(
        "torch._utils._rebuild_tensor_v2",
        data or storage(),
        view,
        dump(False),
        hooks,
        dump(metadata) if metadata else b"",
    )


def write(
    path: Path, instructions: bytes, entries: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED
) -> Path:
    contents = {"data.pkl": b"\x80\x02" + instructions + b".", "byteorder": b"little", "data/0": ELEMENTS.tobytes()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for entry, content in (contents | (entries or {})).items():
            archive.writestr(f"archive/{entry}", content)
    return path


def refusal(path: Path) -> str:
    """Return the error that refuses a file."""
    with pytest.raises(ConversionError) as error:
        _read_pickle(path)
    message = str(error.value)
    assert message.startswith(f"{path} cannot be read as a PyTorch checkpoint: ")
    assert message.endswith(".")
    assert "\n" not in message
    return message


def plain(value: Any) -> Any:
    """Return a value that compares equal for equal containers and tensors of equal type, shape and bits."""
    if hasattr(value, "detach"):
        value = value.detach()
        is_bfloat16 = str(value.dtype) == "torch.bfloat16"
        value = value.float().numpy().astype(ml_dtypes.bfloat16) if is_bfloat16 else value.numpy()
    if isinstance(value, np.ndarray):
        return value.dtype.name, value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return isinstance(value, list), [plain(item) for item in value]
    return repr(value)


def replace_byte(content: bytes, generator: random.Random) -> bytes:
    damaged = bytearray(content)
    damaged[generator.randrange(len(damaged))] ^= generator.randrange(1, 256)
    return bytes(damaged)
