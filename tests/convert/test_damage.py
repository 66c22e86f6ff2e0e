"""Damaged checkpoints: each is refused with an error, or computes the same as PyTorch from the same file.

No partial output is left. Run with -s to see the table of outcomes; the slow case has a thousand files.
"""

import json
import struct
from collections import Counter

import numpy as np
import pytest
from safetensors.numpy import save_file

for package in ("torch", "transformers", "timm"):
    pytest.importorskip(package)

import levit_flax as lf  # noqa: E402
from configs import SMALL, random_variables  # noqa: E402
from levit_flax import convert  # noqa: E402
from levit_flax.checkpoint import _OWN_FILES  # noqa: E402
from levit_flax.convert import workflow  # noqa: E402

SEED = 20211
ROUNDS = 11  # of every damage to every checkpoint: 11 * 14 * 7 = 1,078
SHORT_ROUNDS = 1

CHECKPOINTS = [
    (layout, folded) for layout in convert.WRITTEN_LAYOUTS for folded in (False, True) if layout != "hf" or not folded
]


def pick(tensors, generator, kinds="f"):
    return str(generator.choice([name for name, array in tensors.items() if array.dtype.kind in kinds]))


# Damage to tensors: each function changes the mapping.


def drop(tensors, generator, _):
    for name in generator.choice(list(tensors), generator.integers(1, 4), replace=False):
        del tensors[str(name)]


def add(tensors, generator, _):
    name = pick(tensors, generator)
    extra = str(generator.choice(["head.extra", f"{name}_scale", name.replace("0", "7"), "ema." + name, ""]))
    tensors[extra] = np.zeros(generator.integers(1, 9, 2), np.float32)


def rename(tensors, generator, _):
    name = pick(tensors, generator)
    old, new = [("weight", "wieght"), ("0", "1"), (".", "/"), ("bias", "beta"), ("b", "B")][generator.integers(5)]
    array = tensors.pop(name)
    tensors[name.replace(old, new)] = array


def swap(tensors, generator, _):
    """Exchange two tensors; if their shapes are equal, nothing is detectable and PyTorch computes the same."""
    one, other = (pick(tensors, generator) for _ in range(2))
    tensors[one], tensors[other] = tensors[other], tensors[one]


def reshape(tensors, generator, _):
    name = pick(tensors, generator)
    array = tensors[name]
    shapes = [array.reshape(-1), array[None], array.T, array[..., :-1], np.repeat(array, 2, -1), array[..., None]]
    tensors[name] = np.ascontiguousarray(shapes[generator.integers(len(shapes))])


def retype(tensors, generator, _):
    name = pick(tensors, generator, "fi")
    dtypes = [np.float16, np.float64, np.int32, np.int64, np.uint8, np.bool_]
    with np.errstate(invalid="ignore", over="ignore"):
        tensors[name] = tensors[name].astype(dtypes[generator.integers(len(dtypes))])


def poison(tensors, generator, _):
    name = pick(tensors, generator)
    array = tensors[name].copy()
    array.flat[generator.integers(array.size)] = generator.choice([np.nan, np.inf, -np.inf, 3e38, -1.0, 0.0])
    tensors[name] = array


def recount(tensors, generator, _):
    """Change an integer: a batch counter or an entry of an index table, if there are any."""
    names = [name for name, array in tensors.items() if array.dtype.kind == "i"]
    if names:
        name = str(generator.choice(names))
        array = tensors[name].copy()
        array.flat[generator.integers(array.size)] += generator.choice([-(2**40), -1, 1, 2**33])
        tensors[name] = array


def shuffle_table(tensors, generator, _):
    """Shuffle an index table, or add a wrong one if the layout has none."""
    names = [name for name in tensors if name.endswith("attention_bias_idxs")]
    if not names:
        biases = str(generator.choice([name for name in tensors if name.endswith("attention_biases")]))
        tensors[biases.replace("biases", "bias_idxs")] = generator.integers(0, 16, (16, 16))
        return
    name = str(generator.choice(names))
    table = tensors[name].copy()
    if generator.integers(2):
        generator.shuffle(table, axis=int(generator.integers(2)))
    else:
        table = generator.permutation(table.max() + 1)[table]  # another numbering of the same distances
    tensors[name] = table


def mix(tensors, generator, others):
    """Add some tensors of another layout."""
    other = others[generator.integers(len(others))]
    for name in generator.choice(list(other), generator.integers(1, 20), replace=False):
        tensors[str(name)] = other[str(name)]


# Damage to files: each function returns other bytes.


def truncate(data, generator):
    return data[: generator.integers(len(data))]


def flip(data, generator):
    damaged = bytearray(data)
    for place in generator.integers(0, len(data), generator.integers(1, 4)):
        damaged[place] ^= 1 << generator.integers(8)
    return bytes(damaged)


def flip_header(data, generator):
    damaged = bytearray(data)
    damaged[generator.integers(8 + struct.unpack("<Q", data[:8])[0])] ^= 1 << generator.integers(8)
    return bytes(damaged)


def lie(data, generator):
    """Write a well-formed header with wrong content."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    name = str(generator.choice([name for name in header if name != "__metadata__"]))
    entry = header[name]
    kind = generator.integers(5)
    if kind == 0:
        entry["shape"] = [int(size) + 1 for size in entry["shape"]]
    elif kind == 1:
        entry["dtype"] = str(generator.choice(["F64", "F16", "BF16", "I64", "F8_E4M3", "Q9"]))
    elif kind == 2:
        entry["data_offsets"] = [0, 2**40]
    elif kind == 3:
        entry["shape"] = entry["shape"][::-1]
    else:
        header[name] = {**entry, "data_offsets": entry["data_offsets"][::-1]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) + int(generator.integers(-3, 1))) + text + data[8 + length :]


TENSOR_DAMAGE = (drop, add, rename, swap, reshape, retype, poison, recount, shuffle_table, mix)
FILE_DAMAGE = (truncate, flip, flip_header, lie)


@pytest.fixture(scope="module")
def checkpoints():
    model = lf.LevitForImageClassificationWithTeacher(lf.LevitConfig(**SMALL))
    variables = random_variables(model)
    forms = {False: (model, variables), True: lf.fold_batch_norm(model, variables)}
    return {(layout, folded): convert.to_torch(*forms[folded], layout) for layout, folded in CHECKPOINTS}


def outcome_of(path, out):
    """Convert with verification and return the outcome; unexpected exceptions propagate."""
    try:
        report = workflow._convert_to_directory(str(path), out).to_dict()
    except (ValueError, OSError) as error:
        message = str(error)
        assert message and "Traceback" not in message
        compared = "Verification failed" in message or "own outputs are not finite" in message
        kind = "refused after comparing" if compared else "refused"
        assert not out.exists()
    else:
        assert report["proof"]["round trip"]["passed"]
        assert set(_OWN_FILES) == {file.name for file in out.iterdir()}
        # Either PyTorch computes the same from this file, or the report gives the reason why it was not compared.
        kind = "equal to PyTorch" if report["proof"]["PyTorch"]["passed"] else "not comparable"
        assert report["proof"]["PyTorch"]["passed"] is not False
        for file in out.iterdir():
            file.unlink()
        out.rmdir()
    return kind


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of PyTorch's and NumPy's, on numbers made to overflow
@pytest.mark.parametrize("rounds", [SHORT_ROUNDS, pytest.param(ROUNDS, marks=pytest.mark.slow)])
def test_damaged_checkpoints_are_refused_or_read_as_by_pytorch(checkpoints, tmp_path, rounds):
    generator = np.random.default_rng(SEED)
    outcomes: dict[str, Counter[str]] = {}
    path, out = tmp_path / "levit.safetensors", tmp_path / "out"
    for key, tensors in checkpoints.items():
        save_file(tensors, path)
        assert outcome_of(path, out) == "equal to PyTorch"
        whole = path.read_bytes()
        others = [other for other_key, other in checkpoints.items() if other_key != key]
        for _ in range(rounds):
            for damage in (*TENSOR_DAMAGE, *FILE_DAMAGE):
                if damage in FILE_DAMAGE:
                    path.write_bytes(damage(whole, generator))
                else:
                    damaged = dict(tensors)
                    damage(damaged, generator, others)
                    save_file({name: np.array(array, order="C") for name, array in damaged.items()}, path)
                outcomes.setdefault(damage.__name__, Counter())[outcome_of(path, out)] += 1
                assert [file.name for file in tmp_path.iterdir()] == [path.name]
    kinds = sorted({kind for counter in outcomes.values() for kind in counter})
    print(f"\n{'damage':14}" + "".join(f"{kind:>25}" for kind in kinds))
    for damage, counter in outcomes.items():
        print(f"{damage:14}" + "".join(f"{counter[kind]:25}" for kind in kinds))
    assert sum(counter.total() for counter in outcomes.values()) >= 1000 * rounds // ROUNDS
    assert outcomes["truncate"].keys() == {"refused"} and outcomes["drop"].keys() == {"refused"}
    assert not any(counter["not comparable"] for counter in outcomes.values())
    for damage in ("swap", "retype", "poison", "flip", "shuffle_table"):  # so that the other outcome is tested too
        assert outcomes[damage]["equal to PyTorch"] >= max(1, 5 * rounds // ROUNDS), damage
