"""Reading PyTorch checkpoints: what PyTorch itself reads, and files that were made to do harm."""

import argparse
import contextlib
import copyreg
import os
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

from levit_flax.convert.errors import ConversionError
from levit_flax.convert.pickle_machine import Inert
from levit_flax.convert.pickles import read_pickle

DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
ELEMENTS = np.arange(16, dtype="<f4")
SPACE = 64 * 2**20  # bytes that a file of a few kilobytes may take while it is read


@pytest.fixture(name="torch")
def import_torch() -> Any:
    return pytest.importorskip("torch")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "levit.pth"


# Pickles by hand: these functions return instructions, and `write` makes a checkpoint of them.


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
    """Return the sentence that refuses a file; it names the file."""
    with pytest.raises(ConversionError) as error:
        read_pickle(path)
    message = str(error.value)
    assert message.startswith(f"{path} cannot be read as a PyTorch checkpoint: ")
    assert message.endswith(".")
    assert "\n" not in message
    return message


def plain(value: Any) -> Any:
    """Return a value that compares equal where containers do, and tensors do in type, shape and every bit."""
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


# What PyTorch writes


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_equal_pytorchs(torch: Any, path: Path, dtype: str, legacy: bool) -> None:
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
    result: Any = read_pickle(path)
    assert plain(result) == plain(expected)
    for key, array in result.items():
        assert not array.flags.writeable
        assert array.size == 0 or np.array(array.strides).tolist() == [
            stride * array.itemsize for stride in expected[key].stride()
        ]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_containers_equal_pytorchs(torch: Any, path: Path, protocol: int) -> None:
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
    result: Any = read_pickle(path)
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
    result: Any = read_pickle(path)
    args = result["args"]
    assert (type(args), args.name, args.arguments, args.state["lr"]) == (Inert, "argparse.Namespace", (), 0.1)
    assert "/".join(args.state["output"].arguments) == "runs/1"
    assert (result["device"].name, result["device"].arguments) == ("torch.device", ("cuda", 1))
    assert result["milestones"] == Inert("collections.Counter", ({30: 1, 60: 2},))
    assert type(result["best"]) is type(result["state"]) is Inert
    assert (result["size"], result["dtype"]) == ((2, 3), "torch.bfloat16")


def test_legacy_containers_are_plain(torch: Any, path: Path) -> None:
    value = {"size": torch.Size([2, 3]), "dtype": torch.bfloat16, "model": OrderedDict(weights=[torch.ones(2)])}
    torch.save(value, path, _use_new_zipfile_serialization=False)
    expected = {"size": (2, 3), "dtype": "torch.bfloat16", "model": {"weights": [np.ones(2, "f4")]}}
    assert plain(read_pickle(path)) == plain(expected)


def test_parameters_with_state_are_their_tensors(torch: Any, path: Path) -> None:
    parameter = torch.nn.Parameter(torch.arange(3.0))
    parameter.note = "kept by PyTorch, not here"
    torch.save([parameter], path)
    assert plain(read_pickle(path)) == plain([torch.arange(3.0)])


def test_shared_storage_stays_shared(torch: Any, path: Path) -> None:
    numbers = torch.arange(12.0)
    torch.save({"all": numbers, "tail": numbers[8:], "other": numbers.clone()}, path)
    result: Any = read_pickle(path)
    assert np.shares_memory(result["all"], result["tail"])
    assert not np.shares_memory(result["all"], result["other"])


def test_tensors_are_views_of_the_file(torch: Any, path: Path) -> None:
    torch.save({"large": torch.ones(8 * 2**20)}, path)
    tracemalloc.start()
    result: Any = read_pickle(path)
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
    assert plain(read_pickle(path)) == plain({"weight": torch.arange(99.0)})


@pytest.mark.parametrize("kind", ["FloatStorage", "BFloat16Storage", "ByteStorage"])
def test_big_endian_numbers_are_swapped(path: Path, kind: str) -> None:
    dtype = np.dtype({"FloatStorage": "f4", "BFloat16Storage": ml_dtypes.bfloat16, "ByteStorage": "u1"}[kind])
    numbers = np.arange(6).astype(dtype)
    big = numbers.view(f"u{dtype.itemsize}").astype(f">u{dtype.itemsize}").tobytes()
    data = storage(f"torch.{kind}", length=6)
    result: Any = read_pickle(write(path, tensor(0, (6,), (1,), data), {"byteorder": b"big", "data/0": big}))
    assert plain(result) == plain(numbers)
    assert not result.flags.writeable


def test_byte_order_is_little_where_it_is_not_written(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("levit/data.pkl", b"\x80\x02" + tensor(2, (2, 3), (4, 1)) + b".")
        archive.writestr("levit/data/0", ELEMENTS.tobytes())
    assert plain(read_pickle(path)) == plain(np.array([[2, 3, 4], [6, 7, 8]], "f4"))


BLOCKED_TORCH = """
import sys
from pathlib import Path

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

sys.meta_path.insert(0, Block())
from levit_flax.convert.pickles import read_pickle
try:
    result = read_pickle(Path(sys.argv[1]))
    print(result["weight"].tolist(), result["weight"].dtype)
except ValueError as error:
    print(error)
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_reading_without_pytorch(torch: Any, path: Path, legacy: bool) -> None:
    torch.save({"weight": torch.arange(3).bfloat16()}, path, _use_new_zipfile_serialization=not legacy)
    command = [sys.executable, "-c", BLOCKED_TORCH, str(path)]
    output = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=True).stdout
    if legacy:
        assert output.endswith(
            "it has the format used before PyTorch 1.6, which only PyTorch can read; "
            "install PyTorch with `pip install levit-flax[torch]`.\n"
        )
    else:
        assert output == "[0.0, 1.0, 2.0] bfloat16\n"


# What is no checkpoint


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
        read_pickle(path)


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


# Where the directory gives the size of an entry, and the place of its header relative to the bytes of the elements.
# The last header would read well: its two lengths would be the four zero bytes of the first element.
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


# What runs code

REFUSED_NAMES = (
    "os.system",
    "posix.system",
    "nt.system",
    "builtins.eval",
    "builtins.exec",
    "builtins.getattr",
    "__builtin__.getattr",
    "importlib.import_module",
    "runpy._run_code",
    "operator.attrgetter",
    "functools.partial",
    "copyreg._reconstructor",
    "subprocess.Popen",
    "collections.defaultdict",
    "argparse.FileType",
    "pathlib.Path",
    "numpy.load",
    "torch.load",
    "torch.storage._load_from_bytes",
    "torch.nn.modules.linear.Linear",
    "levit_flax.convert.pickle_machine.Inert",
)


@pytest.mark.parametrize("full_name", REFUSED_NAMES)
def test_other_names_are_refused(path: Path, full_name: str) -> None:
    module, _, attribute = full_name.rpartition(".")
    for instructions in (name(full_name), dump(module) + dump(attribute) + b"\x93"):
        message = refusal(write(path, instructions))
        assert f"it contains '{full_name}', which is not plain data and could execute code" in message
        assert "if you trust the file, load it with PyTorch and save its state dict alone with torch.save" in message


@pytest.mark.parametrize(
    ("module", "attribute"),
    [
        ("collections", "OrderedDict.fromkeys"),
        ("collections", "OrderedDict.fromkeys.__globals__"),
        ("collections.OrderedDict", "__class__"),
        ("argparse", "Namespace.__init__.__globals__"),
        ("argparse", "_os.system"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
    ],
)
def test_attributes_of_allowed_names_are_refused(path: Path, module: str, attribute: str) -> None:
    for instructions in (f"c{module}\n{attribute}\n".encode(), dump(module) + dump(attribute) + b"\x93"):
        assert f"it contains '{module}.{attribute}'" in refusal(write(path, instructions))


MKDIR = name("os.mkdir")
NAMESPACE = name("argparse.Namespace") + b")\x81"
# Instructions that make the directory of the given name (an instruction pushes it) in Python's own unpickler.
EXPLOITS = {
    "REDUCE": lambda target: MKDIR + target + b"\x85R",
    "STACK_GLOBAL": lambda target: dump("os") + dump("mkdir") + b"\x93" + target + b"\x85R",
    "dotted": lambda target: dump("argparse") + dump("_os.mkdir") + b"\x93" + target + b"\x85R",
    "INST": lambda target: b"(" + target + b"ios\nmkdir\n",
    "OBJ": lambda target: b"(" + MKDIR + target + b"o",
    "EXT1": lambda target: b"\x82\xf0" + target + b"\x85R",
    "BUILD": lambda target: NAMESPACE + b"}" + dump("__setstate__") + MKDIR + b"sb" + target + b"b",
}


@pytest.fixture
def extension_registry() -> Any:
    copyreg.add_extension("os", "mkdir", 0xF0)
    yield
    copyreg.remove_extension("os", "mkdir", 0xF0)


@pytest.mark.usefixtures("extension_registry")
@pytest.mark.parametrize("exploit", EXPLOITS)
def test_no_exploit_runs(path: Path, exploit: str) -> None:
    sentinel = path.parent / "sentinel"
    instructions = EXPLOITS[exploit](dump(str(sentinel)))
    pickle.loads(b"\x80\x04" + instructions + b".")
    sentinel.rmdir()  # it was there: the exploit works
    refusal(write(path, instructions))
    assert not sentinel.exists()


def test_no_exploit_runs_in_the_legacy_format(torch: Any, path: Path) -> None:
    sentinel = path.parent / "sentinel"

    class Exploit:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(sentinel),)

    torch.save({"weight": Exploit()}, path, _use_new_zipfile_serialization=False)
    torch.load(path, weights_only=False)
    sentinel.rmdir()
    assert ".mkdir', which is not plain data and could execute code" in refusal(path)
    assert not sentinel.exists()


def test_legacy_tensors_of_something_else_are_refused(torch: Any, path: Path) -> None:
    class Exploit:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, ("no storage", 0, (1,), (1,), False, OrderedDict())

    torch.save(Exploit(), path, _use_new_zipfile_serialization=False)
    assert "torch.load(weights_only=True) rejects it as damaged or as more than plain weights" in refusal(path)


@pytest.mark.parametrize(
    ("instructions", "instruction"),
    [
        (b"\x82\xf0", "EXT1"),
        (b"\x83\xf0\x00", "EXT2"),
        (b"\x84\xf0\x00\x00\x00", "EXT4"),
        (b"(icollections\nOrderedDict\n", "INST"),
        (b"(ccollections\nOrderedDict\no", "OBJ"),
        (b"ccollections\nOrderedDict\n)}\x92", "NEWOBJ_EX"),
        (b"Pstorage\n", "PERSID"),
        (b"N2", "DUP"),
        (b"N0", "POP"),
        (b"\x8f", "EMPTY_SET"),
        (b"\x97", "NEXT_BUFFER"),
        (b"S'text'\n", "STRING"),
    ],
)
def test_other_instructions_are_refused(path: Path, instructions: bytes, instruction: str) -> None:
    message = refusal(write(path, instructions))
    assert (
        f"its pickle has the instruction {instruction}, which plain data does not need and which could execute code"
        in message
    )


SLOTS = b"N}" + dump("__class__") + dump("owned") + b"s\x86"  # the state (None, {"__class__": "owned"})


@pytest.mark.parametrize(
    ("instructions", "reason"),
    [
        (dump("os.system") + b")R", "it calls an object that is not a constructor"),
        (name("torch.FloatStorage") + b")R", "it calls an object that is not a constructor"),
        (name("torch.float32") + b")R", "it calls an object that is not a constructor"),
        (NAMESPACE + b")R", "it calls an object that is not a constructor"),
        (storage() + b")R", "it calls an object that is not a constructor"),
        (name("collections.OrderedDict") + b"]R", "it calls an object that is not a constructor"),
        (call("collections.OrderedDict", b"]"), "takes 0 positional arguments but 1 was given"),
        (name("collections.OrderedDict") + b"N\x85\x81", "takes 0 positional arguments but 1 was given"),
        (call("torch.Size", b"]"), "a torch.Size is not built from a tuple"),
        (call("torch._utils._rebuild_parameter", b"N\x88N"), "a parameter is not built from a tensor"),
        (tensor(0, (1,), (1,)) + SLOTS + b"b", "it sets attributes on an object that has none"),
        (name("torch._utils._rebuild_tensor_v2") + SLOTS + b"b", "it sets attributes on an object that has none"),
        (name("argparse.Namespace") + SLOTS + b"b", "it sets attributes on an object that has none"),
        (storage() + SLOTS + b"b", "it sets attributes on an object that has none"),
        (b"}" + SLOTS + b"b", "it sets attributes on an object that has none"),
        (NAMESPACE + b"NNs", "it assigns items to an object that is not a dict"),
        (b")Na", "it appends to an object that is not a list"),
        (b"}]Ns", "a key of a dict is neither a string nor a number"),
        (b"NN\x93", "the name of a global is not a string"),
    ],
)
def test_misused_values_are_refused(path: Path, instructions: bytes, reason: str) -> None:
    assert reason in refusal(write(path, instructions))


def test_state_stays_data(path: Path) -> None:
    state = b"}" + dump("__class__") + name("torch.device") + b"s" + dump("__setstate__") + name("torch.device") + b"s"
    result: Any = read_pickle(write(path, NAMESPACE + state + b"b" + dump({"lr": 1}) + b"b"))
    assert result == Inert("argparse.Namespace", (), {"lr": 1})
    result = read_pickle(write(path, call("collections.OrderedDict") + state + b"b" + SLOTS + b"b"))
    assert (type(result), vars(result)) == (OrderedDict, {})


@pytest.mark.parametrize(
    "identifier",
    [
        b"N",
        dump("storage"),
        dump(("storage",)),
        dump(("storage", "torch.FloatStorage", "0", "cpu", 16)),
        storage()[:-1].replace(b"storage", b"modules"),
        dump("storage") + name("torch.float32") + dump("0") + dump("cpu") + b"\x87",
        *(storage(*arguments)[:-1] for arguments in (("torch.device",), ("torch.Size",))),
        *(storage(key=key)[:-1] for key in (0, None, ("0",))),
        *(storage(length=length)[:-1] for length in ("16", 16.0, None)),
        b"(" + storage()[1:-2] + b"Nt",
    ],
)
def test_malformed_storages_are_refused(path: Path, identifier: bytes) -> None:
    assert "a reference to a storage is malformed" in refusal(write(path, identifier + b"Q"))


@pytest.mark.parametrize("key", ["1", "../data.pkl", "/etc/passwd", ""])
def test_storages_outside_the_data_are_refused(path: Path, key: str) -> None:
    assert f"its entry 'data/{key}' is missing" in refusal(write(path, storage(key=key)))


@pytest.mark.parametrize("length", [-1, 0, 15, 17, 2**31, 2**64])
def test_storages_of_another_length_are_refused(path: Path, length: int) -> None:
    assert "storage '0' does not have the type or length" in refusal(write(path, storage(length=length)))


def test_a_storage_of_two_types_is_refused(path: Path) -> None:
    both = storage() + storage("torch.IntStorage") + b"\x86"
    assert "storage '0' does not have the type or length" in refusal(write(path, both))


OUTSIDE = "a tensor reaches outside its storage"
NO_NUMBERS = "a tensor is not described by a storage and integers"


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "reason"),
    [
        (0, (17,), (1,), OUTSIDE),
        (16, (1,), (1,), OUTSIDE),
        (16, (), (), OUTSIDE),
        (1, (4, 4), (4, 1), OUTSIDE),
        (0, (2, 2), (15, 1), OUTSIDE),
        (2**62, (1,), (1,), OUTSIDE),
        (0, (2,), (2**62,), OUTSIDE),
        (0, (2, 2), (2**62, 2**62), OUTSIDE),
        (0, (2**62,), (1,), OUTSIDE),
        (-1, (1,), (1,), NO_NUMBERS),
        (15, (2,), (-1,), NO_NUMBERS),
        (0, (-1,), (1,), NO_NUMBERS),
        (0, (-4, -4), (4, 1), NO_NUMBERS),
        (2**64, (1,), (1,), NO_NUMBERS),
        (0, (2**64,), (0,), NO_NUMBERS),
        (0, (2,), (2**64,), NO_NUMBERS),
        (True, (1,), (1,), NO_NUMBERS),
        (0, (2.0,), (1,), NO_NUMBERS),
        (0, "ab", "cd", NO_NUMBERS),
        (None, (1,), (1,), NO_NUMBERS),
        (0, None, (1,), "must be an iterable, not NoneType"),
        (0, (1, 1), (1,), "a tensor has 2 dimensions and 1 strides"),
        (0, (1,) * 65, (1,) * 65, "a tensor has 65 dimensions"),
        (0, (0, 2**62, 2**62), (1, 1, 1), "is larger than the maximum possible size"),
        (0, (2**40,), (0,), f"a tensor that expands 16 numbers to {2**40}"),
        (0, (2**40, 2**40, 2**40), (0, 0, 0), f"a tensor that expands 16 numbers to {2**120}"),
    ],
)
def test_impossible_tensors_are_refused(path: Path, offset: Any, shape: Any, strides: Any, reason: str) -> None:
    assert reason in refusal(write(path, tensor(offset, shape, strides)))


def test_tensors_of_something_else_than_a_storage_are_refused(path: Path) -> None:
    for data in (b"N", tensor(0, (16,), (1,)), dump(bytearray(8).decode()), name("torch.FloatStorage")):
        assert NO_NUMBERS in refusal(write(path, tensor(0, (1,), (1,), data)))


def test_pending_negation_is_refused(path: Path) -> None:
    assert "pending conjugation or negation" in refusal(write(path, tensor(0, (1,), (1,), metadata={"neg": True})))


# What takes too much memory, or too deep a stack

DEEP = 30_000
TOO_DEEP = "its containers are nested more than 64 levels deep"


@pytest.mark.parametrize(
    ("instructions", "reason"),
    [
        (b"B" + struct.pack("<I", 2**32 - 1), "expected 4294967295 bytes in a bytes4, but only 1 remain"),
        (b"X" + struct.pack("<I", 2**32 - 1), "expected 4294967295 bytes in a unicodestring4, but only 1 remain"),
        (b"\x8e" + struct.pack("<Q", 2**62), f"expected {2**62} bytes in a bytes8, but only 1 remain"),
        (b"\x8b" + struct.pack("<i", 2**31 - 1), "not enough data in stream to read long4"),
        (b"(" * DEEP, "not enough values to unpack"),
        (b")" + b"\x85" * DEEP, TOO_DEEP),
        (b"]" * DEEP + b"a" * (DEEP - 1), TOO_DEEP),
        (b"}" + b"N}" * DEEP + b"s" * DEEP, TOO_DEEP),
        (b"]q\x00h\x00a", TOO_DEEP),
        (NAMESPACE + b"q\x00h\x00b", TOO_DEEP),
        (b"})" + b"\x85" * DEEP + b"Ns", "a key of a dict is neither a string nor a number"),
        (name("torch.Size") + b")" + b"\x85" * DEEP + b"\x93", "the name of a global is not a string"),
        (b")" + b"\x85" * DEEP + b"Q", "a reference to a storage is malformed"),
    ],
)
def test_bombs_are_refused(path: Path, instructions: bytes, reason: str) -> None:
    write(path, instructions)
    tracemalloc.start()
    message = refusal(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert reason in message
    assert peak < SPACE


@pytest.mark.parametrize(
    "instructions",
    [
        b"Nr\xff\xff\xff\xff",
        b"\x95" + struct.pack("<Q", 2**63) + b"N",
        b"(" + b"N" * 10_000 + b"tq\x00](" + (name("torch.Size") + b"h\x00\x85R") * 4_000 + b"e\x86",
        tensor(0, (2**20,), (0,)),
    ],
    ids=["memo index", "frame length", "copies", "expanded"],
)
def test_bombs_that_are_defused_take_no_memory(path: Path, instructions: bytes) -> None:
    write(path, instructions)
    tracemalloc.start()
    read_pickle(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < SPACE


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


def replace_byte(content: bytes, generator: random.Random) -> bytes:
    damaged = bytearray(content)
    damaged[generator.randrange(len(damaged))] ^= generator.randrange(1, 256)
    return bytes(damaged)


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
    content, expected = healthy.read_bytes(), plain(read_pickle(healthy))
    generator = random.Random(1)
    refused = 0
    for _ in range(200):
        path.write_bytes(replace_byte(content, generator))
        try:
            result = plain(read_pickle(path))
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
            result = plain(read_pickle(path))
        except ConversionError:
            refused += 1
        else:
            assert result == plain(torch.load(path, map_location="cpu", weights_only=True))
    assert 0 < refused < 200


@pytest.mark.filterwarnings("ignore:.*invalid escape sequence")  # of pickletools, if damage makes a backslash
@pytest.mark.usefixtures("extension_registry")
@pytest.mark.parametrize("exploit", EXPLOITS)
def test_changed_exploits_never_run(path: Path, exploit: str) -> None:
    generator = random.Random(3)
    sentinel = path.parent / "sentinel"
    content = EXPLOITS[exploit](dump(str(sentinel)))
    for _ in range(100):
        write(path, replace_byte(content, generator))
        with contextlib.suppress(ConversionError):
            read_pickle(path)
        assert [file.name for file in path.parent.iterdir()] == [path.name]


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
            result = plain(read_pickle(path))
        except ConversionError:
            continue
        assert result == plain(torch.load(path, map_location="cpu", weights_only=True))
