"""Distillation from a model, a function or stored logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tensorboardX")
pytest.importorskip("matplotlib")

from training_runs import (
    DISTILLED,
    PROCESSOR,
    random_config,
    tiny_recipe,
)

import levit_flax as lf
from levit_flax.training import finetune
from levit_flax.training.data import (
    _find_images,
)
from levit_flax.training.teacher import _make_teacher, _read_logits

pytestmark = pytest.mark.usefixtures("compiled")

ROUNDING = 1e-5  # float32, through a small model


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def by_hand(two_heads, teacher, folder, kind):
    """Return the loss of the first step, computed from the logits of both models."""
    train, _ = _find_images(folder, tiny_recipe(), ())
    pixels = np.stack([PROCESSOR.resize_and_crop(path) for path in train.images])
    model, variables = lf.from_pretrained(two_heads)
    prepared = PROCESSOR.rescale_and_normalize(pixels)
    out = jax.device_get(jax.jit(model.apply)(variables, prepared))
    taught = lf.ImageClassifier.from_pretrained(teacher).logits(pixels)[:, [1, 2, 0]]
    own = -(np.eye(3)[train.targets] * 0.9 + 0.1 / 3) * log_softmax(out.cls_logits)
    if kind == "hard":
        distilled = -log_softmax(out.distillation_logits)[np.arange(27), taught.argmax(1)].mean()
    else:
        ours, theirs = (log_softmax(logits / 2.0) for logits in (out.distillation_logits, taught))
        distilled = (np.exp(theirs) * (theirs - ours)).mean() * 2.0**2
    return 0.7 * own.sum(1).mean() + 0.3 * distilled


def as_function(teacher):
    """Return the teacher as a function of the student's pixel values."""
    classifier = lf.ImageClassifier.from_pretrained(teacher)
    model, variables, own = classifier.model, classifier.variables, classifier.processor

    def per_channel(values):
        return np.float32(values).reshape(1, 1, 1, 3)

    def teach(pixel_values):
        levels = pixel_values * per_channel(PROCESSOR.image_std) + per_channel(PROCESSOR.image_mean)
        out = model.apply(variables, (levels - per_channel(own.image_mean)) / per_channel(own.image_std))
        return out.logits[:, np.array([1, 2, 0])]

    return teach


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("hard", ("directory", "stored")),
        pytest.param("hard", ("function",), marks=pytest.mark.slow),
        pytest.param("soft", ("directory", "function", "stored"), marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_teacher_gives_the_same_loss(two_heads, teacher, stored, folder, tmp_path, kind, names):
    wanted = by_hand(two_heads, teacher, folder, kind)
    recipe = tiny_recipe(**DISTILLED, distillation=kind)
    sources = {"directory": teacher, "function": as_function(teacher), "stored": stored}
    for name in names:
        report = finetune(folder, tmp_path / name, model=two_heads, recipe=recipe, teacher=sources[name])
        assert report["last"]["step"] == 1
        assert report["last"]["train_loss"] == pytest.approx(wanted, rel=ROUNDING), name


def test_function_with_other_classes_is_refused(two_heads, folder, tmp_path):
    recipe = tiny_recipe(**DISTILLED, distillation="soft")
    with pytest.raises(ValueError, match=r"logits have the shape \(27, 10\): expected \(27, 3\), one row per image"):
        finetune(folder, tmp_path / "run", model=two_heads, recipe=recipe, teacher=lambda x: jnp.zeros((len(x), 10)))


def test_stored_logits_are_matched_by_path(teacher, stored, folder):
    """The order of images and of classes may differ from the stored one."""
    train, held_back = _find_images(folder, tiny_recipe(), ())
    classifier = lf.ImageClassifier.from_pretrained(teacher)
    for images in (train, held_back):
        wanted = np.array(list(classifier.stream_logits(images.images)))[:, [1, 2, 0]]
        recipe = tiny_recipe(distillation="soft")
        found = _make_teacher(stored, recipe, random_config(), PROCESSOR, images, folder).logits
        np.testing.assert_allclose(found, wanted, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (np.full((2, 3), np.nan, np.float32), "the logits are invalid, expected finite values"),
        (np.ones((2, 3), np.int32), "the logits are invalid, expected floating point, found int32"),
        (np.ones((2, 4), np.float32), "2 files and 3 labels, but logits of the shape"),
    ],
)
def test_damaged_logits_raise(folder, tmp_path, logits, message):
    train, _ = _find_images(folder, tiny_recipe(), ())
    np.savez(tmp_path / "logits.npz", files=np.array(["a", "b"]), labels=np.array(["x", "y", "z"]), logits=logits)
    with pytest.raises(ValueError, match=message):
        _read_logits(tmp_path / "logits.npz", train, folder, random_config())
