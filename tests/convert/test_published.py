"""The published checkpoints and the answers that others published for them. All of it needs the network."""

import hashlib
import urllib.request

import jax
import numpy as np
import pytest

import levit_flax as lf
from levit_flax import convert

pytestmark = pytest.mark.network

CATS = (
    "https://raw.githubusercontent.com/huggingface/transformers/main/tests/fixtures/tests_samples/COCO/000000039769.png"
)
ORIGINAL = "https://dl.fbaipublicfiles.com/LeViT/"

# Source: transformers tests/models/levit/test_modeling_levit.py, with its tolerance.
CATS_LOGITS, CATS_TOLERANCE = [1.0448, -0.3745, -1.8317], 2e-4
# Source: facebookresearch/LeViT issue 28, logits of LeViT-384 on an all-zero image; batches differ by 2e-7 there.
ZERO_LOGITS, ZERO_TOLERANCE = [-0.3287484, -0.11664876], 1e-5
# Source: facebookresearch/LeViT issue 9, of `blocks.0.m.attention_biases` in LeViT-128S.
BIAS_DEVIATION = 5.0527262687683105

FAMILIES = ["facebook/levit-{}", "timm/levit_{}.fb_dist_in1k", "timm/levit_conv_{}.fb_dist_in1k"]


def load(family, size):
    return lf.from_pretrained(family.format(size if "facebook" in family else size.lower()))


def fetch(address, path):
    urllib.request.urlretrieve(address, path)
    return path


def logits(model, variables, pixel_values):
    exact = model.clone(precision="highest")
    return np.asarray(jax.jit(lambda v, x: exact.apply(v, x).logits)(variables, pixel_values))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_two_cats_are_the_published_ones(family, tmp_path):
    """The classifier's processor too has to be right for this one; timm's resizes otherwise, so ours is given."""
    image = fetch(CATS, tmp_path / "cats.png")
    pixel_values = lf.LevitImageProcessor()(image, return_tensors="np")["pixel_values"]
    model, variables = load(family, "128S")
    found = logits(model, variables, pixel_values)
    np.testing.assert_allclose(found[0, :3], CATS_LOGITS, rtol=CATS_TOLERANCE, atol=CATS_TOLERANCE)
    assert model.config.id2label[found.argmax()] == "tabby, tabby cat"


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_zero_image_are_the_published_ones(family):
    model, variables = load(family, "384")
    found = logits(model, variables, np.zeros((1, 224, 224, 3), np.float32))
    np.testing.assert_allclose(found[0, :2], ZERO_LOGITS, atol=ZERO_TOLERANCE)
    merged = logits(*lf.fold_batch_norm(*lf.merge_heads(model, variables)), np.zeros((1, 224, 224, 3), np.float32))
    np.testing.assert_allclose(merged[0, :2], ZERO_LOGITS, atol=ZERO_TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_first_attention_biases_have_the_published_deviation(family):
    biases = load(family, "128S")[1]["params"]["stage_0"]["block_0"]["attention"]["attention_biases"]
    assert np.std(np.asarray(biases, np.float64), ddof=1) == pytest.approx(BIAS_DEVIATION, rel=1e-6)


@pytest.mark.parametrize(
    "name",
    ["LeViT-128S-96703c44", "LeViT-128-b88c2750", "LeViT-192-92712e41", "LeViT-256-13b5763e", "LeViT-384-9bdaf2e2"],
)
def test_original_files_hold_the_same_tensors(name, tmp_path):
    """The same tensors as transformers' copy, and a name that tells the hash."""
    path = fetch(f"{ORIGINAL}{name}.pth", tmp_path / f"{name}.pth")
    assert hashlib.sha256(path.read_bytes()).hexdigest().startswith(name[-8:])
    model, variables = convert.from_torch(path)
    variant = "-".join(["levit", name.split("-")[1]])
    assert model.config.hidden_sizes == lf.VARIANTS[variant].hidden_sizes
    jax.tree.map(np.testing.assert_array_equal, variables, lf.from_pretrained(f"facebook/{variant}")[1])
