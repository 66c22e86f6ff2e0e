"""A model shares no memory with the objects that it was made from or converted to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import levit_flax as lf
from configs import SMALL, random_variables
from levit_flax import convert


@functools.cache
def model_and_variables():
    model = lf.LevitForImageClassificationWithTeacher(lf.LevitConfig(**SMALL))
    return model, random_variables(model)


def copies(tree):
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def assert_unchanged(tree, before):
    for leaf, copy in zip(jax.tree.leaves(tree), before, strict=True):
        np.testing.assert_array_equal(leaf, copy)


def aligned(array):
    """Return a copy whose memory begins at a multiple of 64 bytes, which JAX on CPU does not copy by itself."""
    memory = np.zeros(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@pytest.mark.parametrize("layout", ["hf", "timm"])
def test_converted_variables_do_not_follow_the_mapping(layout):
    tensors = {name: aligned(array) for name, array in convert.to_torch(*model_and_variables(), layout=layout).items()}
    _, variables = convert.from_torch(tensors)
    before = copies(variables)
    for array in tensors.values():
        array[...] = 0
    assert_unchanged(variables, before)


def test_loaded_variables_do_not_follow_the_pytorch_file(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "pytorch_model.bin"
    tensors = {name: torch.from_numpy(array) for name, array in convert.to_torch(*model_and_variables()).items()}
    torch.save(tensors, path)
    _, variables = lf.from_pretrained(tmp_path)
    before = copies(variables)
    path.write_bytes(bytes(path.stat().st_size))
    assert_unchanged(variables, before)
    path.write_bytes(b"")  # reading memory that is mapped to a truncated file would end the process
    assert_unchanged(variables, before)


def test_pytorch_tensors_can_be_changed_without_changing_the_model():
    model, variables = model_and_variables()
    on_device = jax.device_put(jax.tree.map(aligned, variables))
    before = copies(on_device)
    for array in convert.to_torch(model, on_device).values():
        array[...] = 0
    assert_unchanged(on_device, before)


def test_classifier_follows_neither_changes_nor_donation_of_the_variables():
    model, variables = lf.fold_batch_norm(*lf.merge_heads(*model_and_variables()))
    image = np.zeros((64, 64, 3), np.uint8)
    arrays = jax.tree.map(aligned, variables)
    classifier = lf.ImageClassifier(model, arrays)
    expected = classifier.logits(image[None])
    for leaf in jax.tree.leaves(arrays):
        leaf[...] = 0
    np.testing.assert_array_equal(classifier.logits(image[None]), expected)

    donated = jax.device_put(variables)
    classifier = lf.ImageClassifier(model, donated)
    jax.tree.map(lambda leaf: leaf.delete(), donated)
    np.testing.assert_array_equal(classifier.logits(image[None]), expected)


@pytest.mark.parametrize(
    "change",
    [
        lf.fold_batch_norm,
        lf.merge_heads,
        lambda model, variables: lf.resize_image(model, variables, 96),
        lambda model, variables: lf.resize_image(model, variables, model.config.image_size),
        lambda model, variables: lf.replace_head(model, variables, 3, jax.random.key(0)),
    ],
    ids=["fold", "merge", "resize", "same size", "replace"],
)
def test_changed_model_survives_donation_of_the_old_variables(change):
    model, variables = model_and_variables()
    old = jax.device_put(variables)
    _, new = change(model, old)
    before = copies(new)
    jax.tree.map(lambda leaf: leaf.delete(), old)
    assert_unchanged(new, before)
    numpy_arrays = jax.tree.map(np.array, variables)
    _, new = change(model, numpy_arrays)
    before = copies(new)
    for leaf in jax.tree.leaves(numpy_arrays):
        leaf[...] = 0
    assert_unchanged(new, before)


def test_narrow_checkpoint_trains_in_float32(tmp_path):
    model, variables = model_and_variables()
    half = jax.tree.map(lambda leaf: leaf.astype(np.float16) if leaf.dtype == np.float32 else leaf, variables)
    lf.save_pretrained(tmp_path, model, half)
    _, loaded = lf.from_pretrained(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded["params"])} == {jnp.dtype("float32")}
