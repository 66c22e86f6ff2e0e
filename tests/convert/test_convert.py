"""The conversion table and the converter: complete, invertible, strict, and without PyTorch."""

import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

import levit_flax as lf
from configs import SMALL, UNUSUAL, random_variables, unusual_config
from levit_flax import convert
from levit_flax.attention import _offset_index
from levit_flax.convert import ConversionError
from levit_flax.convert.layouts import _LAYOUTS, _Permutation, _Structure
from levit_flax.modeling import _MODEL_CLASSES, LevitBase
from levit_flax.modeling_variables import _abstract_variables

# Tensors in a transformers checkpoint with two heads, one, and none. Source: counted on transformers' state dicts.
TENSORS = {"levit-128S": (325, 318, 311), "levit-128": (400, 393, 386), "levit-192": (400, 393, 386)}
TENSORS |= {"levit-256": (400, 393, 386), "levit-384": (400, 393, 386)}


def small_model(model_class=lf.LevitForImageClassificationWithTeacher, **fields) -> LevitBase:
    return model_class(lf.LevitConfig(**{**SMALL, **fields}))


@pytest.fixture
def checkpoint():
    """A model, its variables, and its state dict."""
    model = small_model()
    variables = random_variables(model)
    return model, variables, convert.to_torch(model, variables)


def assert_same_trees(found, expected):
    found, expected = flatten_dict(found, sep="/"), flatten_dict(expected, sep="/")
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert found[path].dtype == leaf.dtype, path
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "levit-128S" else pytest.mark.slow) for name in lf.VARIANTS]
)
def test_conversion_tables_are_complete(name):
    for model_class, count in zip(reversed(_MODEL_CLASSES), TENSORS[name], strict=True):
        model = model_class(lf.VARIANTS[name])
        rows = list(_LAYOUTS["hf"].rows(_Structure.of(model.config, model.head_names)))
        assert len(rows) == len({row.torch for row in rows}) == count
        assert {row.flax for row in rows} == _abstract_variables(model).keys()


@pytest.mark.parametrize("name", UNUSUAL)
def test_names_equal_those_of_transformers(name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from oracles import state_dict, torch_model

    for model_class in _MODEL_CLASSES:
        reference = state_dict(torch_model(unusual_config(name), model_class.__name__))
        rows = list(_LAYOUTS["hf"].rows(_Structure.of(unusual_config(name), model_class.head_names)))
        assert {row.torch for row in rows} == reference.keys()


@pytest.mark.parametrize("permutation", _Permutation)
def test_permutations_invert_themselves(permutation):
    shapes = {_Permutation.OIHW_TO_HWIO: (1, 2, 3, 4), _Permutation.OI11_TO_IO: (4, 6, 1, 1)}
    array = np.arange(24).reshape(shapes.get(permutation, (4, 6)))
    turned = permutation.to_flax(array)
    assert permutation.flax_shape(array.shape) == turned.shape
    assert permutation.torch_shape(turned.shape) == array.shape
    np.testing.assert_array_equal(permutation.to_torch(turned), array)


# The short run has one class per config, in turn.
ROUND_TRIPS = [
    pytest.param(name, model_class, marks=() if (i + j) % 3 == 2 or name == "small" else pytest.mark.slow)
    for i, name in enumerate(UNUSUAL)
    for j, model_class in enumerate(_MODEL_CLASSES)
]


@pytest.mark.parametrize(("name", "model_class"), ROUND_TRIPS)
def test_round_trip_and_inference_from_shapes(name, model_class):
    """The tensors alone determine the model, except labels, drop path and the stride of a step to a single token."""
    config = unusual_config(name)
    model = model_class(config)
    variables = random_variables(model)
    tensors = convert.to_torch(model, variables)
    assert all(array.dtype == np.int64 for key, array in tensors.items() if key.endswith("num_batches_tracked"))
    given = config if name == "other downsampling" else None
    back, back_variables = convert.from_torch(tensors, config=given)
    assert type(back) is model_class
    fields = ("hidden_sizes", "num_attention_heads", "depths", "key_dim", "mlp_ratio", "attention_ratio", "down_ops")
    for field in (*fields, "image_size", "num_channels", "kernel_size", "padding"):
        assert getattr(back.config, field) == getattr(config, field), field
    assert_same_trees(back_variables, variables)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype_of_the_file_is_kept(checkpoint, dtype, tmp_path):
    tensors = {n: a.astype(jax.numpy.dtype(dtype)) if a.dtype == np.float32 else a for n, a in checkpoint[2].items()}
    save_file(tensors, tmp_path / "model.safetensors")
    model, variables = convert.from_torch(tmp_path / "model.safetensors")
    assert model.param_dtype == dtype
    back = convert.to_torch(model, variables)
    assert back.keys() == tensors.keys()
    for name, array in tensors.items():
        assert back[name].dtype == array.dtype
        assert back[name].tobytes() == np.ascontiguousarray(array).tobytes()
    wide, variables = convert.from_torch(tensors, dtype="float32")
    assert wide.param_dtype == np.float32
    assert variables["params"]["head"]["linear"]["bias"].dtype == np.float32
    assert variables["batch_stats"]["head"]["norm"]["count"].dtype == np.int32


def test_float64_needs_a_dtype(checkpoint):
    tensors = {name: a.astype(np.float64) if a.dtype == np.float32 else a for name, a in checkpoint[2].items()}
    with pytest.raises(
        ValueError, match=r"contains float64 arrays, which JAX would truncate to float32\. Choose float32 with dtype="
    ):
        convert.from_torch(tensors)
    assert convert.from_torch(tensors, dtype="float32")[0].param_dtype == np.float32


def test_wrong_index_table_is_refused(checkpoint):
    _, variables, tensors = checkpoint
    prefix = "levit.encoder.stages.0.layers"
    tables = {
        f"{prefix}.0.module.attention_bias_idxs": _offset_index((4, 4)).astype(np.int64),
        f"{prefix}.4.attention_bias_idxs": _offset_index((4, 4), 2).astype(np.int64),
    }
    assert_same_trees(convert.from_torch({**tensors, **tables})[1], variables)
    wrong = tables[f"{prefix}.4.attention_bias_idxs"].copy()
    wrong[2, 7] = 0
    with pytest.raises(
        ConversionError,
        match=r"1 index tables that disagree with the image size: levit\.encoder\.stages\.0\.layers\.4\."
        r"attention_bias_idxs \(first at query 2, key 7: expected 7, found 0\)",
    ):
        convert.from_torch({**tensors, **tables, f"{prefix}.4.attention_bias_idxs": wrong})


PROJ = "levit.encoder.stages.0.layers.0.module.projection.linear.weight"
MEAN = "classifier.batch_norm.running_mean"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({PROJ: None}, rf"cannot be inferred from the shapes: expected a tensor {PROJ} with 2 axes, found none"),
        ({MEAN: None, "head.weight": np.zeros(3)}, rf"1 missing: {MEAN}\n1 unexpected: head.weight"),
        ({"classifier.batch_norm.num_batches_tracked": None}, "1 missing: classifier.batch_norm.num_batches_tracked"),
        ({MEAN: np.zeros(47, np.float32)}, rf"1 of the wrong shape: {MEAN} \(expected \(48,\), found \(47,\)\)"),
        ({MEAN: np.full(48, np.nan, np.float32)}, rf"1 not finite: {MEAN}"),
        ({MEAN: np.zeros(48, np.int64)}, rf"1 of the wrong dtype: {MEAN} \(expected floating point, found int64\)"),
        (
            {"classifier.linear.bias": None, "classifier.linear.weight": None},
            r"expected a tensor classifier\.linear\.weight with 2",
        ),
    ],
)
def test_every_difference_is_reported(checkpoint, change, message):
    tensors = {**checkpoint[2], **change}
    with pytest.raises(ConversionError, match=message):
        convert.from_torch({name: array for name, array in tensors.items() if array is not None})


def test_missing_tensors_are_named_with_a_config(checkpoint):
    model, _, tensors = checkpoint
    tensors = {name: array for name, array in tensors.items() if name != PROJ}
    with pytest.raises(ConversionError, match=rf"WithTeacher in the hf layout:\n1 missing: {PROJ}$"):
        convert.from_torch(tensors, config=model.config)


def test_config_that_contradicts_the_tensors_is_refused(checkpoint):
    _, _, tensors = checkpoint
    other = lf.LevitConfig(**{**SMALL, "key_dim": (8, 4, 8), "num_labels": 7})
    with pytest.raises(
        ConversionError, match=r"key_dim is \(8, 4, 8\) in the config and \(8, 8, 8\) in the tensors; num_l"
    ):
        convert.from_torch(tensors, config=other)


def test_other_networks_are_refused():
    with pytest.raises(
        ConversionError, match=r"does not contain a LeViT in a known layout \(hf, timm, .*found 1 tensors \(layer1"
    ):
        convert.from_torch({"layer1.0.conv1.weight": np.zeros((64, 64, 1, 1), np.float32)})
    with pytest.raises(ConversionError, match="expected tensors, found an object of type dict under 'optimizer'"):
        convert.from_torch({"optimizer": {}})


def write_directory(directory, model, tensors, file="model.safetensors"):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(model.config.to_dict()))
    save_file(tensors, directory / file)


def test_directories_and_shards_are_read(checkpoint, tmp_path):
    model, variables, tensors = checkpoint
    write_directory(tmp_path / "whole", model, tensors)
    assert_same_trees(convert.from_torch(tmp_path / "whole")[1], variables)

    directory = tmp_path / "sharded"
    names = sorted(tensors)
    write_directory(directory, model, {n: tensors[n] for n in names[:50]}, "model-00001-of-00002.safetensors")
    save_file({n: tensors[n] for n in names[50:]}, directory / "model-00002-of-00002.safetensors")
    homes = {n: f"model-0000{1 if i < 50 else 2}-of-00002.safetensors" for i, n in enumerate(names)}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": homes}))
    assert_same_trees(convert.from_torch(directory)[1], variables)
    assert_same_trees(lf.from_pretrained(directory)[1], variables)

    homes[names[0]] = homes[names[-1]]
    index.write_text(json.dumps({"weight_map": homes}))
    with pytest.raises(ConversionError, match=rf"lists {names[0]} in model-00002.*, which does not contain it"):
        convert.from_torch(directory)
    index.write_text(json.dumps({"weight_map": {names[0]: "../model.safetensors"}}))
    with pytest.raises(ConversionError, match="lists a shard outside its directory"):
        convert.from_torch(directory)


def test_damaged_files_are_refused(tmp_path, checkpoint):
    _, _, tensors = checkpoint
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match=r"The file .* does not exist: expected a weight file"):
        convert.from_torch(path)
    path.write_bytes(b"")
    with pytest.raises(ConversionError, match="is empty: copy or download it again"):
        convert.from_torch(path)
    save_file(tensors, path)
    whole = path.read_bytes()
    for end in (5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(ConversionError, match="is truncated or not a safetensors file"):
            convert.from_torch(path)
    path.write_bytes(whole)
    (tmp_path / "config.json").write_text("<html>")
    with pytest.raises(ConversionError, match=r"config\.json is not valid JSON"):
        convert.from_torch(path)


def test_zip_pickles_are_read(checkpoint, tmp_path):
    torch = pytest.importorskip("torch")
    _, variables, tensors = checkpoint
    torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, tmp_path / "pytorch_model.bin")
    assert_same_trees(convert.from_torch(tmp_path)[1], variables)
    torch.save(torch.zeros(3), tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ConversionError, match="expected a mapping from names to tensors, found an object of type ndarray"
    ):
        convert.from_torch(tmp_path)


@pytest.mark.parametrize("model_class", _MODEL_CLASSES)
def test_transformers_opens_what_is_saved(model_class, tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = small_model(model_class, drop_path_rate=0.1, id2label=("a", "b", "c", "d", "e"))
    variables = random_variables(model)
    convert.save_torch(tmp_path / "model.safetensors", model, variables)
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    opened, loading = getattr(transformers, model_class.__name__).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    assert opened.config.id2label[1] == "b"
    for name, array in convert.to_torch(model, variables).items():
        np.testing.assert_array_equal(opened.state_dict()[name].numpy(), array)
    with pytest.raises(FileExistsError, match="Pass overwrite=True"):
        convert.save_torch(tmp_path / "model.safetensors", model, variables)


def test_unsupported_exports_are_refused(checkpoint):
    model, variables, _ = checkpoint
    with pytest.raises(ValueError, match="expected one of hf, timm, timm_conv, facebook, found 'keras'"):
        convert.to_torch(model, variables, layout="keras")
    with pytest.raises(ValueError, match="transformers has no layout for folded models"):
        convert.to_torch(model.clone(folded=True), variables)
    del variables["params"]["head"]["linear"]["bias"]
    with pytest.raises(
        ValueError, match=r"does not fit .* 1 of \d+ arrays differ, params/head/linear/bias \(expected \(5,\), found"
    ):
        convert.to_torch(model, variables)
