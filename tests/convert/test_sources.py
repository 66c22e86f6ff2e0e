"""Checkpoints as training scripts leave them: wrapped, prefixed, averaged, and named by their hash."""

import argparse
import hashlib
import json
import os
import re
import sys
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import levit_flax as lf
from configs import SMALL, in_another_order, random_variables
from levit_flax import convert
from levit_flax.convert import ConversionError
from levit_flax.convert.sources import _open_source


@pytest.fixture
def tensors():
    model = lf.LevitForImageClassificationWithTeacher(lf.LevitConfig(**SMALL))
    return convert.to_torch(model, random_variables(model), "facebook")


@pytest.fixture
def averaged():
    model = lf.LevitForImageClassificationWithTeacher(lf.LevitConfig(**SMALL))
    return convert.to_torch(model, random_variables(model, seed=1), "facebook")


def assert_holds(source, tensors, **options):
    variables = convert.from_torch(source, **options)[1]
    jax.tree.map(np.testing.assert_array_equal, variables, convert.from_torch(tensors)[1])


@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_and_prefixes_are_removed(tensors, wrapper, prefix):
    wrapped = {wrapper: {prefix + name: array for name, array in tensors.items()}, "epoch": 3}
    assert_holds(wrapped, tensors)
    taken_off = "".join(_open_source(wrapped).wrappers[1:])
    assert _open_source(wrapped).wrappers[0] == wrapper and taken_off == prefix


def test_prefixes_in_files_are_removed(tensors, tmp_path):
    save_file({f"module.{name}": array for name, array in tensors.items()}, tmp_path / "levit.safetensors")
    assert_holds(tmp_path / "levit.safetensors", tensors)


def test_classification_model_without_heads_is_read():
    """The classification models of transformers have no heads if there are no classes."""
    model = lf.LevitModel(lf.LevitConfig(**{**SMALL, "num_labels": 0}))
    tensors = convert.to_torch(model, random_variables(model))
    assert_holds({f"levit.{name}": array for name, array in tensors.items()}, tensors)


def test_partial_prefix_is_kept(tensors):
    _, first, *_ = tensors
    with pytest.raises(ConversionError, match=f"1 unexpected: module.{first}"):
        convert.from_torch({f"module.{name}" if name == first else name: array for name, array in tensors.items()})


@pytest.mark.parametrize(("plain", "average"), [("model", "model_ema"), ("state_dict", "state_dict_ema")])
def test_averaged_weights_need_ema(tensors, averaged, plain, average):
    both = {plain: tensors, average: averaged}
    assert_holds(both, tensors)
    assert_holds(both, averaged, ema=True)
    assert any("ema=True" in note for note in _open_source(both).notes)
    assert _open_source(both, ema=True).wrappers == (average,)
    with pytest.raises(ConversionError, match=rf"has only averaged weights: .* found {average}. Pass ema=True"):
        convert.from_torch({average: averaged})


def test_missing_averaged_weights_are_refused(tensors, tmp_path):
    with pytest.raises(ConversionError, match=r"has no averaged weights: .* Remove ema=True"):
        convert.from_torch({"model": tensors}, ema=True)
    save_file(tensors, tmp_path / "levit.safetensors")
    with pytest.raises(ConversionError, match="has no averaged weights"):
        convert.from_torch(tmp_path / "levit.safetensors", ema=True)


def test_training_checkpoint_of_the_original_repository_is_read(tensors, averaged, tmp_path):
    """main.py of the original repository also saves an optimizer, a scaler and the arguments."""
    torch = pytest.importorskip("torch")
    as_tensors = [{n: torch.from_numpy(np.array(a)) for n, a in state.items()} for state in (tensors, averaged)]
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    checkpoint = {
        "model": as_tensors[0],
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"base_values": [0.0005], "metric": None, "noise_range_t": None},
        "epoch": 999,
        "model_ema": as_tensors[1],
        "scaler": {"scale": 65536.0, "growth_tracker": 0},
        "args": argparse.Namespace(model="LeViT_128S", lr=5e-4, data_path="/data", distributed=True, gpu=0),
    }
    path = tmp_path / "checkpoint.pth"
    torch.save(checkpoint, path)
    assert_holds(path, tensors)
    assert_holds(path, averaged, ema=True)


def test_object_in_the_place_of_a_tensor_is_refused(tensors):
    with pytest.raises(ConversionError, match=r"1 not tensors: head\.bn\.bias \(found an object of type float\)"):
        convert.from_torch({**tensors, "head.bn.bias": 0.5})


class Wrapper:
    """Stands for a class of the training script, which the reader does not have."""

    def __init__(self, **fields):
        vars(self).update(fields)


@pytest.mark.parametrize(
    ("wrap", "wrappers"),
    [
        (lambda t: {"state_dict": {f"model.{n}": a for n, a in t.items()}, "epoch": 3}, ("state_dict", "model.")),
        (lambda t: {f"net.{n}": a for n, a in t.items()}, ("net.",)),
        (lambda t: {f"a.b.encoder.{n}": a for n, a in t.items()}, ("a.b.encoder.",)),
        (lambda t: {"module": t, "global_steps": 10}, ("module",)),
        (lambda t: {"model_state_dict": t, "loss": 0.5}, ("model_state_dict",)),
        (lambda t: {"n_averaged": np.int64(3), **{f"module.{n}": a for n, a in t.items()}}, ("module.",)),
    ],
)
def test_model_is_found_inside_wrappers(tensors, wrap, wrappers):
    assert_holds(wrap(tensors), tensors)
    assert _open_source(wrap(tensors)).wrappers == wrappers


def test_entries_outside_the_model_are_left_out_by_name(tensors):
    beside = {"criterion.weight": np.ones(10), "train_acc.tp": np.zeros(10), "note": "text"}
    source = {**{f"model.{name}": array for name, array in tensors.items()}, **beside}
    assert_holds(source, tensors)
    [note] = _open_source(source).notes
    assert note == (
        "3 entries do not belong to the model, whose names begin with 'model.', and were left out: criterion.weight,"
        " note, train_acc.tp."
    )
    with pytest.raises(ConversionError, match=r"1 unexpected: criterion\.weight"):
        convert.from_torch({**tensors, "criterion.weight": np.ones(10)})  # without a prefix it may be a misspelled name


def test_several_models_need_a_prefix(tensors, averaged):
    both = {f"student.{n}": a for n, a in tensors.items()} | {f"teacher.{n}": a for n, a in averaged.items()}
    with pytest.raises(
        ConversionError, match=r"contains 2 LeViT models: expected one, found the prefixes 'student', 'teacher'"
    ):
        convert.from_torch(both)
    assert_holds(both, averaged, prefix="teacher")
    assert_holds(both, tensors, prefix="student.")
    with pytest.raises(ConversionError, match="no LeViT under the prefix 'head': expected one of 'student', 'teacher'"):
        convert.from_torch(both, prefix="head")


def test_checkpoint_with_objects_of_unknown_classes_is_read(tensors, tmp_path):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}
    torch.save({"state_dict": state, "config": Wrapper(lr=0.1, seen={1, 2}), "hook": Wrapper}, tmp_path / "last.ckpt")
    assert_holds(tmp_path / "last.ckpt", tensors)
    torch.save(Wrapper(weights=state), tmp_path / "object.pt")
    with pytest.raises(ConversionError, match=r"found an object of type .*Wrapper\. Save the state dict of the model"):
        convert.from_torch(tmp_path / "object.pt")


@pytest.mark.parametrize("right", [True, False])
def test_wrong_hash_in_a_file_name_warns(tensors, tmp_path, right):
    save_file(tensors, tmp_path / "levit.safetensors")
    digest = hashlib.sha256((tmp_path / "levit.safetensors").read_bytes()).hexdigest()
    named = digest[:8] if right else "96703c44"
    path = (tmp_path / "levit.safetensors").rename(tmp_path / f"LeViT-128S-{named}.safetensors")
    if right:
        assert _open_source(path).notes == ()
    else:
        message = f"does not match the hash in its name: .* begins with 96703c44, found {digest[:8]}"
        with pytest.warns(UserWarning, match=message):
            opened = _open_source(path)
        assert "96703c44" in opened.notes[0]


def test_index_tables_in_another_order_permute_the_biases(tensors):
    """If a table only orders the offsets differently, the biases are permuted to match."""
    expected = convert.from_torch(tensors)[1]
    tables = {name: array for name, array in tensors.items() if name.endswith("attention_bias_idxs")}
    reordered = in_another_order(tensors, tables)
    jax.tree.map(np.testing.assert_array_equal, convert.from_torch(reordered)[1], expected)
    from levit_flax.convert import conversion, verification

    source = _open_source(reordered)
    converted = conversion._convert(source)
    assert len(converted.reordered) == 5 and any("another order" in note for note in converted.notes)
    assert verification._find_differing_bytes(source, converted) == []


@pytest.mark.parametrize("damage", ["one entry", "queries shuffled", "too large", "float", "shape"])
def test_wrong_index_tables_are_refused(tensors, damage):
    name = "blocks.0.m.attention_bias_idxs"
    table = tensors[name].copy()
    if damage == "one entry":
        table[3, 5] = table[3, 6]
    elif damage == "queries shuffled":
        table = table[[1, 0, *range(2, len(table))]]
    elif damage == "too large":
        table += 1
    elif damage == "float":
        table = table.astype(np.float32)
    else:
        table = table[:-1]
    message = {"one entry": r"first at query 3, key 5: expected \d+, found \d+", "float": "expected integers"}
    with pytest.raises(ConversionError, match=rf"{name} \({message.get(damage, '')}"):
        convert.from_torch({**tensors, name: table})


def test_image_size_is_reported_and_can_be_overridden(tensors):
    from levit_flax.convert import conversion

    source = _open_source(tensors)
    assert any("64 is the square multiple of 16" in note for note in conversion._convert(source).notes)
    assert conversion._convert(source, source_image_size=(50, 61)).model.config.image_size == (50, 61)
    assert conversion._convert(source, source_image_size=50).notes == ()
    with pytest.raises(ConversionError, match=r"of the wrong shape: blocks.0.m.attention_biases"):
        convert.from_torch(tensors, source_image_size=96)


def damaged_config(**changes):
    return {**lf.LevitConfig(**SMALL).to_dict(), **changes}


@pytest.mark.parametrize(
    "values",
    [
        damaged_config(down_ops=5),
        damaged_config(down_ops=[["Subsample", None, 2, 2, 2, 2]] * 2),
        damaged_config(hidden_sizes="x"),
        damaged_config(hidden_sizes=[16, {}, 48]),
        damaged_config(depths=None),
        damaged_config(image_size=float("inf")),
        damaged_config(num_channels=[]),
        damaged_config(id2label=5),
        damaged_config(id2label={"first": "cat"}),
        {**{key: value for key, value in damaged_config().items() if key != "id2label"}, "num_labels": []},
        damaged_config(initializer_range=10**400),
        damaged_config(hidden_act={}),
        damaged_config(model_type=["levit"]),
        damaged_config(levit_flax=5),
    ],
    ids=lambda values: ",".join(key for key in values if values[key] != damaged_config().get(key)),
)
def test_malformed_configs_are_refused(tmp_path, tensors, values):
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConversionError, match=rf"^The config\.json of {tmp_path} is malformed: "):
        convert.from_torch(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", '{"a": ', ""])
def test_configs_that_are_no_object_are_refused(tmp_path, tensors, text):
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    message = r"(is not valid JSON|is malformed: expected a JSON object, found an array)"
    with pytest.raises(ConversionError, match=rf"^{tmp_path}/config\.json {message}"):
        convert.from_torch(tmp_path)


def test_image_size_overrides_the_config(tensors, tmp_path):
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(lf.LevitConfig(**SMALL).to_dict()))
    assert convert.from_torch(tmp_path)[0].config.image_size == 64
    assert convert.from_torch(tmp_path, source_image_size=60)[0].config.image_size == 60


@pytest.mark.parametrize("named", ["LevitForImageClassification", "LevitModel"])
def test_config_with_other_heads_is_refused(tmp_path, named):
    model = lf.LevitForImageClassificationWithTeacher(lf.LevitConfig(**SMALL))
    save_file(convert.to_torch(model, random_variables(model)), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**model.config.to_dict(), "architectures": [named]}))
    with pytest.raises(
        ConversionError,
        match=rf"expected the heads of {named} with 5 classes .*, found head, head_dist in the tensors",
    ):
        convert.from_torch(tmp_path)


def test_non_square_table_needs_an_image_size():
    model = lf.LevitForImageClassification(lf.LevitConfig(**{**SMALL, "image_size": (64, 96)}))
    tensors = convert.to_torch(model, random_variables(model), "timm")
    with pytest.raises(
        ConversionError, match=r"expected a square number of offsets .*, found 24\. Pass source_image_size="
    ):
        convert.from_torch(tensors)
    assert convert.from_torch(tensors, source_image_size=(64, 96))[0].config == model.config


def test_thousand_classes_get_the_imagenet_names():
    config = lf.LevitConfig(**{**SMALL, "num_labels": 1000})
    model = lf.LevitForImageClassification(config)
    tensors = convert.to_torch(model, random_variables(model), "timm")
    from levit_flax.convert import conversion

    converted = conversion._convert(_open_source(tensors))
    assert converted.model.config.id2label[281] == "tabby, tabby cat"
    assert any("ImageNet's names" in note for note in converted.notes)
    named = lf.LevitConfig(**{**SMALL, "num_labels": 1000, "id2label": tuple(f"class {i}" for i in range(1000))})
    assert convert.from_torch(tensors, config=named)[0].config.id2label[281] == "class 281"


def test_mixed_layouts_and_lone_heads_are_refused(tensors):
    with pytest.raises(ConversionError, match=r"mixes layouts: .* found the first convolution of facebook and timm"):
        convert.from_torch({**tensors, "stem.conv1.linear.weight": np.zeros((2, 3, 3, 3), np.float32)})
    with pytest.raises(ConversionError, match="has a distillation head but no classifier head"):
        convert.from_torch({name: array for name, array in tensors.items() if not name.startswith("head.")})


def test_image_size_resizes_the_result(tensors):
    model, variables = convert.from_torch(tensors, image_size=96)
    expected, expected_variables = lf.resize_image(*convert.from_torch(tensors), 96)
    assert model.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, variables, expected_variables)


# Small files that claim to be giant


def save_header(path, tensors):
    header = json.dumps({name: {"dtype": "F32", "shape": s, "data_offsets": [0, 0]} for name, s in tensors.items()})
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())


def assert_refused_at_once(source, message, **options):
    start = time.perf_counter()
    with pytest.raises(ValueError, match=message) as caught:
        convert.from_torch(source, **options)
    assert time.perf_counter() - start < 2 and len(str(caught.value)) < 2000


def test_giant_table_of_biases_is_refused(tensors):
    giant = np.broadcast_to(np.float32(0), (2, 10**10))
    tables = {name: giant for name in tensors if name.endswith("attention_biases") and name.startswith("blocks.0.")}
    without = {name: array for name, array in tensors.items() if not name.endswith("bias_idxs")}
    assert_refused_at_once({**without, **tables}, "image_size must be an integer from 1 to 4096, found 1600000")


def test_header_with_a_million_names_is_refused(tmp_path):
    save_header(tmp_path / "model.safetensors", {f"layer.{i}.weight": [0] for i in range(1_000_000)})
    assert_refused_at_once(tmp_path / "model.safetensors", "expected a header of at most 8 MiB, found one of")
    lf.save_pretrained(tmp_path / "own", *lf.from_pretrained("cifar10"))
    (tmp_path / "own" / "flax_model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    start = time.perf_counter()
    with pytest.raises(ValueError, match="expected a header of at most 8 MiB, found one of"):
        lf.from_pretrained(tmp_path / "own")
    assert time.perf_counter() - start < 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs named pipes")
@pytest.mark.parametrize("load", [convert.from_torch, lf.from_pretrained])
def test_weights_that_are_no_file_raise(tmp_path, load):
    weights = tmp_path / "model.safetensors"
    weights.mkdir()
    with pytest.raises(OSError, match=r"model\.safetensors cannot be read: expected a regular file, found a directory"):
        load(tmp_path)
    weights.rmdir()
    os.mkfifo(weights)
    with pytest.raises(OSError, match=r"cannot be read: expected a regular file, found a named pipe"):
        load(tmp_path)
    weights.unlink()
    weights.symlink_to("gone")
    with pytest.raises(OSError, match=r"cannot be read: it is a link to gone, which does not exist"):
        load(tmp_path)


@pytest.mark.parametrize("layout", ["timm", "hf", "facebook"])
def test_layer_with_a_giant_number_is_refused(layout):
    model = lf.LevitForImageClassification(lf.LevitConfig(**SMALL))
    tensors = convert.to_torch(model, random_variables(model), layout)
    [example, *_] = [name for name in tensors if re.search(r"(stages|blocks)\.0\.", name)]
    name = re.sub(r"(stages|blocks)\.0\.", r"\1.99999999999.", example, count=1)
    assert_refused_at_once({**tensors, name: tensors[example]}, "stage|unexpected")


def test_index_with_too_many_names_is_refused(tmp_path):
    save_file({}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model.safetensors.index.json"
    for count, message in (
        (100_001, "too many tensors: expected at most 100000"),
        (1_000_000, "is too large: expected"),
    ):
        path.write_text(json.dumps({"weight_map": {f"tensor{i}": "model.safetensors" for i in range(count)}}))
        assert_refused_at_once(path, message)


def test_header_with_a_giant_shape_is_refused(tmp_path):
    save_header(tmp_path / "model.safetensors", {"stem.conv1.linear.weight": [2**40, 0, 2**40, 1]})
    assert_refused_at_once(tmp_path / "model.safetensors", "is damaged: its tensor stem.conv1.linear.weight claims")


@pytest.mark.parametrize("option", ["image_size", "source_image_size"])
def test_giant_image_size_is_refused(tensors, option):
    assert_refused_at_once(tensors, "image_size must be an integer from 1 to 4096, found 100000", **{option: 100_000})


def test_special_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(OSError, match="expected a regular file, found a named pipe"):
        convert.from_torch(tmp_path)


def test_special_files_beside_the_weights_are_refused(tensors, tmp_path):
    save_file(tensors, tmp_path / "model.safetensors")
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(OSError, match=r"config\.json cannot be read: expected a regular file, found a named pipe"):
        convert.from_torch(tmp_path)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "preprocessor_config.json")
    with pytest.raises(OSError, match=r"preprocessor_config\.json cannot be read: .* found a named pipe"):
        lf.ImageClassifier.from_pretrained(tmp_path)


def test_dtypes_unknown_to_numpy_are_refused(tensors, tmp_path):
    torch = pytest.importorskip("torch")
    save_torch_file = pytest.importorskip("safetensors.torch").save_file
    narrow = {
        n: torch.from_numpy(np.array(a)).to(torch.float8_e4m3fn) for n, a in tensors.items() if a.dtype.kind == "f"
    }
    save_torch_file({name: tensor.contiguous() for name, tensor in narrow.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=r"float8.* cannot be read|cannot be read: "):
        convert.from_torch(tmp_path / "model.safetensors")
