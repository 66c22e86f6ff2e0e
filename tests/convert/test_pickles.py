"""Checkpoints that torch.save wrote are read as PyTorch reads them; other and damaged files are refused."""

import argparse
import contextlib
import pickle
import random
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from handmade_pickles import ELEMENTS, plain, refusal, replace_byte, storage, tensor, write

from levit_flax.convert.errors import ConversionError
from levit_flax.convert.pickle_machine import _Inert
from levit_flax.convert.pickles import _read_pickle

DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


# Files of PyTorch


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_equal_pytorch(torch: Any, path: Path, dtype: str, legacy: bool) -> None:
    numbers = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).mul(50).to(getattr(torch, dtype))
    state = {
        "matrix": numbers,
        "transposed": numbers.t(),
        "middle": numbers[1:3, 2:5],
        "every other": numbers[::2, ::3],
        "expanded": numbers[0].expand(3, 6),
        "scalar": numbers[2, 3],
        "empty": torch.empty(0, 3, dtype=numbers.dtype),
        "end": numbers[4:],
    }
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    expected = torch.load(path)
    result: Any = _read_pickle(path)
    assert plain(result) == plain(expected)
    for key, array in result.items():
        assert not array.flags.writeable
        assert array.size == 0 or np.array(array.strides).tolist() == [
            stride * array.itemsize for stride in expected[key].stride()
        ]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_containers_equal_pytorch(torch: Any, path: Path, protocol: int) -> None:
    layer = torch.nn.Linear(3, 2)
    value = {
        "model": layer.state_dict(),
        "layer": OrderedDict(layer.named_parameters()),
        "epoch": 3,
        "numbers": [0, -1, 255, 256, 65536, -(2**31), 2**31, 2**70, 1.5, float("inf"), True, False, None],
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, (4, [5, {}]))),
        "text": ["", "plain", "Ä€😀", "long" * 200],
        7: [[]],
        None: {},
    }
    value["again"] = value["numbers"]
    torch.save(value, path, pickle_protocol=protocol)
    result: Any = _read_pickle(path)
    assert plain(result) == plain(torch.load(path, weights_only=False))
    assert type(result["model"]) is OrderedDict
    assert result["again"] is result["numbers"]


@pytest.mark.parametrize("protocol", [2, 4])
def test_objects_beside_the_weights_are_inert(torch: Any, path: Path, protocol: int) -> None:
    value = {
        "args": argparse.Namespace(lr=0.1, output=Path("runs/1")),
        "device": torch.device("cuda", 1),
        "milestones": Counter([30, 60, 60]),
        "best": np.float64(81.6),
        "state": np.arange(3),
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
    }
    torch.save(value, path, pickle_protocol=protocol)
    result: Any = _read_pickle(path)
    args = result["args"]
    assert (type(args), args.name, args.arguments, args.state["lr"]) == (_Inert, "argparse.Namespace", (), 0.1)
    assert "/".join(args.state["output"].arguments) == "runs/1"
    assert (result["device"].name, result["device"].arguments) == ("torch.device", ("cuda", 1))
    assert result["milestones"] == _Inert("collections.Counter", ({30: 1, 60: 2},))
    assert type(result["best"]) is type(result["state"]) is _Inert
    assert (result["size"], result["dtype"]) == ((2, 3), "torch.bfloat16")


def test_legacy_containers_are_plain(torch: Any, path: Path) -> None:
    value = {"size": torch.Size([2, 3]), "dtype": torch.bfloat16, "model": OrderedDict(weights=[torch.ones(2)])}
    torch.save(value, path, _use_new_zipfile_serialization=False)
    expected = {"size": (2, 3), "dtype": "torch.bfloat16", "model": {"weights": [np.ones(2, "f4")]}}
    assert plain(_read_pickle(path)) == plain(expected)


def test_parameters_with_state_are_their_tensors(torch: Any, path: Path) -> None:
    parameter = torch.nn.Parameter(torch.arange(3.0))
    parameter.note = "kept by PyTorch, not here"
    torch.save([parameter], path)
    assert plain(_read_pickle(path)) == plain([torch.arange(3.0)])


def test_shared_storage_stays_shared(torch: Any, path: Path) -> None:
    numbers = torch.arange(12.0)
    torch.save({"all": numbers, "tail": numbers[8:], "other": numbers.clone()}, path)
    result: Any = _read_pickle(path)
    assert np.shares_memory(result["all"], result["tail"])
    assert not np.shares_memory(result["all"], result["other"])


def test_tensors_are_views_of_the_file(torch: Any, path: Path) -> None:
    torch.save({"large": torch.ones(8 * 2**20)}, path)
    tracemalloc.start()
    result: Any = _read_pickle(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
    assert result["large"].sum() == 8 * 2**20
    with pytest.raises(ValueError, match="read-only"):
        result["large"][0] = 2


def test_checkpoint_without_checksums_is_read(torch: Any, path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.arange(99.0)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is not None
    assert plain(_read_pickle(path)) == plain({"weight": torch.arange(99.0)})


@pytest.mark.parametrize("kind", ["FloatStorage", "BFloat16Storage", "ByteStorage"])
def test_big_endian_numbers_are_swapped(path: Path, kind: str) -> None:
    dtype = np.dtype({"FloatStorage": "f4", "BFloat16Storage": ml_dtypes.bfloat16, "ByteStorage": "u1"}[kind])
    numbers = np.arange(6).astype(dtype)
    big = numbers.view(f"u{dtype.itemsize}").astype(f">u{dtype.itemsize}").tobytes()
    data = storage(f"torch.{kind}", length=6)
    result: Any = _read_pickle(write(path, tensor(0, (6,), (1,), data), {"byteorder": b"big", "data/0": big}))
    assert plain(result) == plain(numbers)
    assert not result.flags.writeable


def test_byte_order_defaults_to_little_endian(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("levit/data.pkl", b"\x80\x02" + tensor(2, (2, 3), (4, 1)) + b".")
        archive.writestr("levit/data/0", ELEMENTS.tobytes())
    assert plain(_read_pickle(path)) == plain(np.array([[2, 3, 4], [6, 7, 8]], "f4"))


def test_reading_without_pytorch(torch: Any, path: Path) -> None:
    paths = {legacy: path.with_name(f"{legacy}.pth") for legacy in (False, True)}
    for legacy, file in paths.items():
        torch.save({"weight": torch.arange(3).bfloat16()}, file, _use_new_zipfile_serialization=not legacy)
    program = Path(__file__).parents[1] / "programs" / "read_pickles_without_torch.py"
    command = [sys.executable, program, *paths.values()]
    output = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=True).stdout
    read, refused = output.splitlines()
    assert read == "[0.0, 1.0, 2.0] bfloat16"
    assert refused.endswith(
        "it has the format used before PyTorch 1.6, which only PyTorch can read; run: pip install 'levit-flax[torch]'."
    )


# Files that are no checkpoints


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n", "it is a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>404</html>", "it is a web page"),
        (b"<?xml version='1.0'?><Error/>", "it is a web page"),
        (b"hello, world", "torch.save writes zip files, and this file begins with b'hello, w'"),
        (pickle.dumps({"weight": [1]}), "torch.save writes zip files, and this file begins with b'\\x80"),
        (b"PK\x03\x04 and no more", "it is truncated or damaged (File is not a zip file)"),
    ],
)
def test_foreign_file_is_named(path: Path, content: bytes, reason: str) -> None:
    path.write_bytes(content)
    assert reason in refusal(path)


def test_missing_file_is_an_os_error(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        _read_pickle(path)


def test_zip_file_without_pickle_is_named(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, ELEMENTS)
    assert "has one entry named data.pkl, and this one has 0" in refusal(path)


def test_torchscript_is_named(path: Path) -> None:
    write(path, b"N", {"constants.pkl": b"", "code/model.py": b""})
    assert "it is a TorchScript program" in refusal(path)


def test_compressed_entries_are_named(path: Path) -> None:
    write(path, tensor(0, (1,), (1,)), compression=zipfile.ZIP_DEFLATED)
    assert "is compressed; load it with torch.load and save it again" in refusal(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name_are_refused(path: Path) -> None:
    write(path, tensor(0, (1,), (1,)))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", bytes(64))
    assert "two of its entries have the same name" in refusal(path)


def test_wrong_checksum_is_refused(path: Path) -> None:
    write(path, tensor(0, (16,), (1,)))
    content = bytearray(path.read_bytes())
    content[content.index(ELEMENTS.tobytes()) + 30] ^= 1
    path.write_bytes(content)
    assert "its entry 'data/0' does not match its checksum" in refusal(path)


# The size that the directory gives, and the position of the header relative to the elements. The last header looks
# valid: its two lengths are the four zero bytes of the first element.
@pytest.mark.parametrize(
    ("size", "place", "reason"),
    [
        (10**6, -44, "its entry 'data/0' is not at the offset in the zip directory"),
        (64, 10**6, "unpack requires a buffer of 30 bytes"),
        (64, -26, "its entry 'data/0' is not at the offset in the zip directory"),
    ],
)
def test_wrong_directory_is_refused(path: Path, size: int, place: int, reason: str) -> None:
    write(path, tensor(0, (16,), (1,)))
    content = bytearray(path.read_bytes())
    record = content.rindex(b"archive/data/0") - 46
    no_checksum = 0
    struct.pack_into("<I", content, record + 16, no_checksum)
    struct.pack_into("<I", content, record + 24, size)
    struct.pack_into("<I", content, record + 42, content.index(ELEMENTS.tobytes()) + place)
    path.write_bytes(content)
    assert f"it is truncated or damaged ({reason})" in refusal(path)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"byteorder": b"middle"}, "its byte order is 'middle'"),
        ({"data/0": bytes(60)}, "storage '0' does not have the type or length"),
        ({"data/0": bytes(63)}, "buffer size must be a multiple of element size"),
        ({"data.pkl": b"\x80\x02" + tensor(0, (1,), (1,), storage(key="1")) + b"."}, "its entry 'data/1' is missing"),
        ({"data.pkl": b""}, "pickle exhausted before seeing STOP"),
        ({"data.pkl": b"\x80\x02NN."}, "too many values to unpack"),
        ({"data.pkl": b"\x80\x02\x86."}, "pop from empty list"),
        ({"data.pkl": b"\x80\x02h\x05."}, "damaged (5)"),
    ],
)
def test_inconsistent_checkpoint_is_refused(path: Path, entries: dict[str, bytes], reason: str) -> None:
    assert reason in refusal(write(path, tensor(0, (1,), (1,)), entries))


# Damage at random places


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch = pytest.importorskip("torch")
    numbers = torch.arange(24.0)
    path = tmp_path_factory.mktemp("healthy") / "levit.pth"
    value = {
        "model": torch.nn.BatchNorm1d(3).state_dict(),
        "views": [numbers.view(4, 6).t(), numbers[3:9], torch.tensor(7), torch.empty(0, 3), torch.ones(5).bfloat16()],
        "parameter": torch.nn.Parameter(torch.ones(2, 3)),
        "epoch": (3, 2.5, None, True, "text"),
    }
    torch.save(value, path)
    return path


def with_pickle(healthy: Path, change: Any, path: Path) -> None:
    """Copy a checkpoint with its pickle changed and every checksum right."""
    with zipfile.ZipFile(healthy) as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.namelist():
            content = source.read(entry)
            target.writestr(entry, change(content) if entry.endswith("/data.pkl") else content)


def test_truncated_files_are_refused(healthy: Path, path: Path) -> None:
    content = healthy.read_bytes()
    generator = random.Random(0)
    for _ in range(50):
        path.write_bytes(content[: generator.randrange(4, len(content))])
        assert "it is truncated or damaged" in refusal(path)


def test_damaged_files_are_refused_or_read_as_they_were(healthy: Path, path: Path) -> None:
    content, expected = healthy.read_bytes(), plain(_read_pickle(healthy))
    generator = random.Random(1)
    refused = 0
    for _ in range(200):
        path.write_bytes(replace_byte(content, generator))
        try:
            result = plain(_read_pickle(path))
        except ConversionError:
            refused += 1
        else:
            assert result == expected
    assert 0 < refused < 200


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_changed_pickles_are_refused_or_read_as_by_pytorch(torch: Any, healthy: Path, path: Path) -> None:
    generator = random.Random(2)
    refused = 0
    for _ in range(200):
        with_pickle(healthy, lambda content: replace_byte(content, generator), path)
        try:
            result = plain(_read_pickle(path))
        except ConversionError:
            refused += 1
            continue
        with contextlib.suppress(pickle.UnpicklingError):  # a global that PyTorch refuses stays a record here
            assert result == plain(torch.load(path, map_location="cpu", weights_only=True))
    assert 0 < refused < 200


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_legacy_files_are_refused_or_read(torch: Any, path: Path) -> None:
    torch.save({"weight": torch.arange(4.0), "epoch": 3}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    generator = random.Random(4)
    for length in generator.sample(range(len(content)), 50):
        path.write_bytes(content[:length])
        refusal(path)
    for _ in range(100):
        path.write_bytes(replace_byte(content, generator))
        try:
            result = plain(_read_pickle(path))
        except ConversionError:
            continue
        assert result == plain(torch.load(path, map_location="cpu", weights_only=True))
