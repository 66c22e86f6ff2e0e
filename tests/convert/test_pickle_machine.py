"""The pickle machine runs no code, for any instructions, and takes little memory."""

import collections
import contextlib
import copyreg
import datetime
import decimal
import os
import pickle
import random
import struct
import tracemalloc
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from handmade_pickles import call, dump, name, refusal, replace_byte, storage, tensor, write

from levit_flax.convert.errors import ConversionError
from levit_flax.convert.pickle_machine import _Global, _Inert
from levit_flax.convert.pickles import _read_pickle

SPACE = 64 * 2**20  # bytes that reading a file of a few kilobytes may take


# Code

OTHER_NAMES = (
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
    "levit_flax.convert.pickle_machine._Inert",
    "collections.OrderedDict.fromkeys",
    "collections.OrderedDict.fromkeys.__globals__",
    "collections.OrderedDict.__class__",
    "argparse.Namespace.__init__.__globals__",
    "argparse._os.system",
    "torch._utils._rebuild_tensor_v2.__globals__",
    "no_such_module.name",
)


@pytest.mark.parametrize("full_name", OTHER_NAMES)
def test_other_names_become_records(path: Path, full_name: str) -> None:
    module, _, attribute = full_name.rpartition(".")
    for instructions in (name(full_name), dump(module) + dump(attribute) + b"\x93"):
        assert _read_pickle(write(path, instructions)) == _Global(full_name)
        called: Any = _read_pickle(write(path, instructions + dump("argument") + b"\x85R"))
        assert called == _Inert(full_name, ("argument",))


MKDIR = name("os.mkdir")
NAMESPACE = name("argparse.Namespace") + b")\x81"
# Instructions that make a directory in Python's own unpickler; the argument pushes its name.
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
    sentinel.rmdir()  # it exists, so the exploit works
    with contextlib.suppress(ConversionError):
        _read_pickle(write(path, instructions))
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
        (b"Pstorage\n", "PERSID"),
        (b"N2", "DUP"),
        (b"N0", "POP"),
        (b"\x97", "NEXT_BUFFER"),
        (b"S'text'\n", "STRING"),
    ],
)
def test_other_instructions_are_refused(path: Path, instructions: bytes, instruction: str) -> None:
    message = refusal(write(path, instructions))
    assert (
        f"its pickle has the instruction {instruction}, which torch.save does not write for plain data; if you trust"
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
        (b"]NNs", "it assigns items to an object that is not a dict"),
        (b")Na", "it appends to an object that is not a list"),
        (b"NN\x93", "the name of a global is not a string"),
    ],
)
def test_misused_values_are_refused(path: Path, instructions: bytes, reason: str) -> None:
    assert reason in refusal(write(path, instructions))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_objects_beside_the_weights_become_records(path: Path, protocol: int) -> None:
    beside = {
        "set": {1, 2},
        "frozen": frozenset({1}),
        "when": datetime.datetime(2024, 1, 1),
        "counts": collections.defaultdict(int, {"cat": 1}),
        "counter": collections.Counter("aab"),
        "range": range(3),
        "bytes": bytearray(b"x"),
        "path": Path("/data"),
        "class": collections.ChainMap,
        "queue": collections.deque([1, 2]),
        "complex": 1j,
        "decimal": decimal.Decimal("0.5"),
        (1, 2): "a key of another type",
    }
    instructions = pickle.dumps(beside, protocol)
    instructions = instructions[2:-1]  # without the protocol and the end
    result: Any = _read_pickle(write(path, instructions))
    assert set(result) == {key for key in beside if isinstance(key, str)}
    records = {key: value.name for key, value in result.items() if isinstance(value, _Inert | _Global)}
    assert records["when"] == "datetime.datetime" and records["counts"] == "collections.defaultdict"
    assert len(records) >= len(result) - 1  # protocol 5 has an instruction for bytearrays


def test_state_stays_data(path: Path) -> None:
    state = b"}" + dump("__class__") + name("torch.device") + b"s" + dump("__setstate__") + name("torch.device") + b"s"
    result: Any = _read_pickle(write(path, NAMESPACE + state + b"b" + dump({"lr": 1}) + b"b"))
    assert result == _Inert("argparse.Namespace", (), {"lr": 1})
    result = _read_pickle(write(path, call("collections.OrderedDict") + state + b"b" + SLOTS + b"b"))
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
    ],
)
def test_impossible_tensors_are_refused(path: Path, offset: Any, shape: Any, strides: Any, reason: str) -> None:
    assert reason in refusal(write(path, tensor(offset, shape, strides)))


def test_tensors_of_something_else_than_a_storage_are_refused(path: Path) -> None:
    for data in (b"N", tensor(0, (16,), (1,)), dump(bytearray(8).decode()), name("torch.FloatStorage")):
        assert NO_NUMBERS in refusal(write(path, tensor(0, (1,), (1,), data)))


@pytest.mark.parametrize(
    ("instructions", "record"),
    [
        (tensor(0, (1,), (1,), metadata={"neg": True}), "a tensor with a pending conjugation or negation"),
        (tensor(0, (2**40,), (0,)), f"a tensor that expands 16 numbers to {2**40}"),
        (tensor(0, (2**40,) * 3, (0,) * 3), f"a tensor that expands 16 numbers to {2**120}"),
        (storage("torch.ComplexFloatStorage"), "torch.ComplexFloatStorage"),
        (storage("torch.storage.UntypedStorage"), "torch.storage.UntypedStorage"),
        (tensor(0, (1,), (1,), storage("torch.QInt8Storage")), "a tensor with the torch.QInt8Storage"),
    ],
)
def test_tensors_that_no_model_has_stay_records(path: Path, instructions: bytes, record: str) -> None:
    assert _read_pickle(write(path, instructions)) == _Inert(record, ())


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
            _read_pickle(path)
        assert [file.name for file in path.parent.iterdir()] == [path.name]


# Memory and depth

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
        b"})" + b"\x85" * DEEP + b"Ns",
    ],
    ids=["memo index", "frame length", "copies", "expanded", "key"],
)
def test_bombs_that_are_defused_take_no_memory(path: Path, instructions: bytes) -> None:
    write(path, instructions)
    tracemalloc.start()
    _read_pickle(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < SPACE
