"""Checkpoints with unusual containers, keys and tensors beside the model's."""

import collections

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import levit_flax as lf
from configs import SMALL, random_variables
from levit_flax import convert
from levit_flax.cli import main
from levit_flax.convert import ConversionError

torch = pytest.importorskip("torch")


class Weights(dict):
    """A dictionary of a class that is unknown to the reader."""


@pytest.fixture(scope="module")
def loaded():
    model = lf.LevitForImageClassification(lf.LevitConfig(**SMALL))
    return model, random_variables(model)


@pytest.fixture(scope="module")
def weights(loaded):
    return {name: torch.from_numpy(array) for name, array in convert.to_torch(*loaded, "timm").items()}


def same(found, loaded):
    leaves = zip(jax.tree.leaves(found[1]), jax.tree.leaves(loaded[1]), strict=True)
    return all(np.array_equal(*pair) for pair in leaves)


CONTAINERS = {
    "defaultdict around": lambda w: collections.defaultdict(list, {"state_dict": w}),
    "defaultdict": lambda w: collections.defaultdict(list, w),
    "unknown class": lambda w: {"state_dict": Weights(w)},
    "unlisted key": lambda w: {"generator": w, "step": 3},
    "two levels": lambda w: {"nets": {"student": w}},
}


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("as_file", [True, False])
def test_models_in_any_container_are_found(loaded, weights, tmp_path, name, as_file):
    source = CONTAINERS[name](weights)
    if as_file:
        torch.save(source, tmp_path / "a.pth")
        source = tmp_path / "a.pth"
    assert same(convert.from_torch(source), loaded)


def test_models_under_keys_are_chosen_by_prefix(loaded, weights):
    other = {name: tensor + 1 for name, tensor in weights.items()}
    both = {"student": weights, "teacher": other}
    with pytest.raises(ConversionError, match=r"contains 2 LeViT models: .* 'student', 'teacher'\. Choose one with"):
        convert.from_torch(both)
    assert same(convert.from_torch(both, prefix="student"), loaded)


def test_averaged_weights_of_an_unknown_class_are_found(loaded, weights, tmp_path):
    other = {name: tensor + 1 for name, tensor in weights.items()}
    torch.save({"model": other, "model_ema": Weights(weights)}, tmp_path / "a.pth")
    assert same(convert.from_torch(tmp_path / "a.pth", ema=True), loaded)


ONE = torch.ones(1)
TENSORS = {
    "complex": ONE.to(torch.complex64),
    "float8": ONE.to(torch.float8_e4m3fn),
    "conjugated": torch.ones(2, dtype=torch.complex64).conj(),
    "negated": torch.ones(2, dtype=torch.complex64).conj().imag,
    "expanded": ONE.expand(5_000_000),
}
ONLY_IN_MEMORY = {"meta": ONE.to("meta"), "sparse": torch.eye(3).to_sparse()}


@pytest.mark.parametrize("name", TENSORS)
def test_other_tensors_in_files_are_left_out(loaded, weights, tmp_path, name):
    torch.save({"state_dict": weights, "x": TENSORS[name]}, tmp_path / "a.pth")
    assert same(convert.from_torch(tmp_path / "a.pth"), loaded)


@pytest.mark.parametrize("name", [*TENSORS, *ONLY_IN_MEMORY])
def test_other_tensors_in_mappings_are_left_out(loaded, weights, name):
    wrapped = {f"model.{key}": tensor for key, tensor in weights.items()}
    assert same(convert.from_torch({**wrapped, "criterion.w": {**TENSORS, **ONLY_IN_MEMORY}[name]}), loaded)


@pytest.mark.parametrize("name", ["meta", "sparse", "float8"])
def test_weights_of_other_kinds_are_named(weights, name):
    key = "stem.conv1.bn.weight"
    odd = {"float8": weights[key].to(torch.float8_e4m3fn), "meta": weights[key].to("meta")}
    odd["sparse"] = weights[key].to_sparse()
    with pytest.raises(ConversionError, match=r"1 not tensors: stem\.conv1\.bn\.weight \(found .* tensor of torch\."):
        convert.from_torch({**weights, key: odd[name]})


def test_unexpected_tensors_come_with_advice(weights):
    with pytest.raises(ConversionError, match=r"1 unexpected: criterion\.weight\nRemove tensors of other modules"):
        convert.from_torch({**weights, "criterion.weight": ONE})


@pytest.mark.parametrize("dtype", ["int8", "bool", "complex64", "S4", "object", "float8_e4m3fn"])
def test_dtypes_without_fractions_are_refused(weights, dtype):
    with pytest.raises(ValueError, match="dtype must be one of float16, bfloat16, float32, float64"):
        convert.from_torch(weights, dtype=dtype)


def test_dtypes_of_pytorch_are_accepted(weights):
    assert convert.from_torch(weights, dtype=torch.float16)[0].param_dtype == np.float16
    assert convert.from_torch(weights, dtype="auto")[0].param_dtype == np.float32


def test_values_that_cannot_be_read_back_are_not_written(loaded, tmp_path):
    model, variables = loaded
    broken = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan) if leaf.ndim == 4 else leaf, variables)
    for write in (convert.to_torch, lambda *arguments: convert.save_torch(tmp_path / "a.safetensors", *arguments)):
        with pytest.raises(ValueError, match=r"cannot be converted: params/.* \(expected finite values, found NaN"):
            write(model, broken)
    deleted = jax.device_put(variables)
    jax.tree.map(lambda leaf: leaf.delete(), deleted)
    with pytest.raises(ValueError, match="expected values, found a tracer or a deleted array"):
        convert.to_torch(model, deleted)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a", "a.foo"])
def test_unknown_suffixes_are_refused(loaded, tmp_path, name):
    with pytest.raises(ValueError, match=r"has an unknown suffix: expected \.safetensors, \.pth, \.pt, \.bin, found"):
        convert.save_torch(tmp_path / name, *loaded)


def test_pointers_and_empty_names_raise(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ConversionError, match="is a Git LFS pointer, not the file itself"):
        convert.from_torch(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="The source is empty: expected a weight file"):
        convert.from_torch("")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image-size", "100000"], "expected sides from 1 to 4096 pixels"),
        (["--to", "hf", "--fold"], "transformers has no layout for folded models"),
    ],
)
def test_wrong_calls_are_refused_before_the_work(tmp_path, capsys, options, message):
    save_file({"a": np.zeros(1)}, tmp_path / "not-a-levit.safetensors")  # reading it would raise another error
    assert main(["convert", str(tmp_path / "not-a-levit.safetensors"), str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
