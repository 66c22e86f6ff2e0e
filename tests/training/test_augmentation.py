"""Augmentation: single operations equal timm pixel by pixel, and many draws have the right distribution.

All draws are seeded; bounds on random values are four standard deviations.
"""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("grain")
pytest.importorskip("orbax.checkpoint")

import levit_flax as lf
from levit_flax.training import augmentation
from levit_flax.training.augmentation import (
    _ERASE_AREA,
    _ERASE_RATIO,
    _OPERATIONS,
    _RESAMPLINGS,
    _augment,
    _color_jitter,
    _crop_with_border,
    _erase,
    _mix,
    _rand_augment,
    _random_box,
    _random_resized_crop,
)
from levit_flax.training.recipe import Recipe, _recipe_names, read_recipe

pytestmark = pytest.mark.usefixtures("standard_promotion")

FLOAT32_ROUNDING = 1e-6  # a few operations on numbers of size 1
# Optimizing takes longer than these functions take to run.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
FILL = (124, 116, 104)

TIMM_NAMES = {
    "auto_contrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
    "rotate": "Rotate",
    "posterize": "PosterizeIncreasing",
    "solarize": "SolarizeIncreasing",
    "solarize_add": "SolarizeAdd",
    "color": "ColorIncreasing",
    "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}
# The first three have no strength, and posterizing begins with four bits.
NEVER_IDENTITY = ("auto_contrast", "equalize", "invert", "posterize")
NOTHING = {"crop_scale": (), "flip": 0.0, "color_jitter": 0.0}


def make_image(width=61, height=47, seed=0):
    """Return an image with smooth colors, edges and noise, of levels that do not reach 0 or 255."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    levels = np.stack([90 + 60 * np.sin(x / 9), 90 + 60 * np.cos(y / 7), 40 + 1.3 * x + y], -1)
    levels[height // 3 : height // 2, width // 4 : width // 2] += 60
    return Image.fromarray((levels + generator.integers(0, 20, levels.shape)).clip(5, 240).astype(np.uint8))


def untouched_size(**changes):
    """Return a processor that neither resizes nor crops."""
    return lf.LevitImageProcessor(do_resize=False, do_center_crop=False, **changes)


def four_deviations(probability, count):
    return 4 * math.sqrt(probability * (1 - probability) / count)


def distance_from_uniform(values):
    """Return the largest difference between the values' distribution and the uniform one on [0, 1]."""
    values = np.sort(values)
    return np.abs(values - (np.arange(len(values)) + 0.5) / len(values)).max()


# One image


@pytest.mark.parametrize("name", _recipe_names())
def test_every_recipe_is_deterministic_and_has_the_size_of_the_processor(name):
    processor = lf.LevitImageProcessor(size={"shortest_edge": 48}, crop_size=(40, 32))
    recipe = read_recipe(name)
    for seed, size in enumerate([(61, 47), (33, 90), (5, 4), (300, 20)]):
        given = make_image(*size)
        first, second = (_augment(given, np.random.default_rng(seed), recipe, processor) for _ in range(2))
        assert first.shape == (40, 32, 3) and first.dtype == np.uint8
        np.testing.assert_array_equal(first, second)
        assert (_augment(given, np.random.default_rng(99), recipe, processor) != first).any()
        np.testing.assert_array_equal(given, make_image(*size))  # the caller's image is as it was


def test_image_without_augmentation_is_prepared_as_for_evaluation():
    processor = lf.LevitImageProcessor(size={"shortest_edge": 48}, crop_size=(40, 32))
    result = _augment(make_image(), np.random.default_rng(0), Recipe(**NOTHING), processor)
    np.testing.assert_array_equal(result, processor.resize_and_crop(make_image()))


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_images_are_flipped_with_their_probability(probability):
    given, generator, count = make_image(6, 5), np.random.default_rng(0), 500
    recipe = Recipe(**{**NOTHING, "flip": probability})
    mirrored = 0
    for _ in range(count):
        result = _augment(given, generator, recipe, untouched_size())
        flipped = np.array_equal(result, np.asarray(given)[:, ::-1])
        assert flipped or np.array_equal(result, given)
        mirrored += flipped
    assert mirrored / count == pytest.approx(probability, abs=four_deviations(probability, count) + 1e-9)


def test_boxes_have_uniform_areas_and_log_ratios():
    width, height, scale, ratio = 1600, 1200, (0.08, 0.4), (3 / 4, 4 / 3)
    generator, count = np.random.default_rng(0), 2000
    boxes = np.array([_random_box((width, height), generator, scale, ratio) for _ in range(count)])
    left, top, right, bottom = boxes.T
    w, h = right - left, bottom - top
    assert (left >= 0).all() and (top >= 0).all() and (right <= width).all() and (bottom <= height).all()
    for values, (low, high) in (
        (w * h / (width * height), scale),
        (np.log(w / h), np.log(ratio)),
        (left / (width - w), (0, 1)),
        (top / (height - h), (0, 1)),
    ):
        assert distance_from_uniform((values - low) / (high - low)) < 1.95 / math.sqrt(count)  # 1 in 1000


class Draws:
    """The same uniform numbers for timm's `random` and for our generator; every integer is 0."""

    def __init__(self, seed):
        self.generator = np.random.default_rng(seed)

    def uniform(self, low, high):
        return low + (high - low) * self.generator.random()

    def randint(self, low, high):
        return 0

    def integers(self, low, high):
        return 0


@pytest.mark.parametrize("size", [(61, 47), (20, 300), (300, 20), (7, 7)])
def test_boxes_equal_timm(size, monkeypatch):
    pytest.importorskip("torchvision")
    transforms = pytest.importorskip("timm.data.transforms")
    scale, ratio = (0.3, 1.0), (3 / 4, 4 / 3)
    for seed in range(100):
        monkeypatch.setattr(transforms, "random", Draws(seed))
        top, left, h, w = transforms.RandomResizedCropAndInterpolation.get_params(make_image(*size), scale, ratio)
        assert _random_box(size, Draws(seed), scale, ratio) == (left, top, left + w, top + h)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crops_are_resized_with_the_given_filter(interpolation):
    recipe = Recipe(crop_scale=(0.2, 0.6), interpolation=interpolation)
    result = _random_resized_crop(make_image(), np.random.default_rng(3), recipe, (24, 16))
    box = _random_box((61, 47), np.random.default_rng(3), recipe.crop_scale, recipe.crop_ratio)
    wanted = {
        name: np.asarray(make_image().crop(box).resize((24, 16), resampling))
        for name, resampling in _RESAMPLINGS.items()
    }
    np.testing.assert_array_equal(result, wanted.pop(interpolation))
    assert (np.asarray(result) != next(iter(wanted.values()))).any()


def test_random_filter_is_bicubic_or_bilinear():
    recipe = Recipe(crop_scale=(1.0, 1.0), crop_ratio=(61 / 47, 61 / 47), interpolation="random")
    wanted = [np.asarray(make_image().resize((24, 16), resampling)) for resampling in _RESAMPLINGS.values()]
    generator, seen = np.random.default_rng(0), [0, 0]
    for _ in range(200):
        result = np.asarray(_random_resized_crop(make_image(), generator, recipe, (24, 16)))
        seen[[np.array_equal(result, other) for other in wanted].index(True)] += 1
    assert seen[0] / 200 == pytest.approx(0.5, abs=four_deviations(0.5, 200))


def bordered(given, border):
    """Return the position of every window of the image's size in the image with a reflected border."""
    levels = np.asarray(given)

    def reflected(start, size):
        places = np.abs(np.arange(start, start + size))
        return np.minimum(places, 2 * (size - 1) - places)

    starts = range(-border, border + 1)
    return {
        levels[reflected(top, given.height)][:, reflected(left, given.width)].tobytes(): (top, left)
        for top in starts
        for left in starts
    }


# The border is at most as wide as the shorter side allows.
@pytest.mark.parametrize(("size", "border", "count"), [((6, 5), 2, 25), ((1, 1), 0, 1), ((1, 9), 0, 1), ((2, 3), 1, 6)])
def test_crops_from_a_reflected_border_take_every_place(size, border, count):
    given, generator = make_image(*size), np.random.default_rng(0)
    windows = bordered(given, border)
    results = [_crop_with_border(given, generator, max(border, 2)) for _ in range(400)]
    assert all(result.size == size for result in results)
    assert {windows[np.asarray(result).tobytes()] for result in results} == set(windows.values())
    assert len(windows) == count


@pytest.mark.parametrize("strength", [0.2, 1.5])
def test_brightness_changes_within_its_bounds(strength):
    gray, generator = Image.new("RGB", (3, 3), (100, 100, 100)), np.random.default_rng(0)
    # Contrast and saturation do nothing to an even gray.
    factors = np.array([np.asarray(_color_jitter(gray, generator, strength))[0, 0, 0] / 100 for _ in range(400)])
    low, high = max(0.0, 1 - strength), 1 + strength
    rounding = 0.011
    assert factors.min() >= low - rounding and factors.max() <= high + rounding
    assert factors.min() < low + 0.05 * (high - low) and factors.max() > high - 0.05 * (high - low)


def test_jitter_changes_saturation_and_contrast_too():
    generator = np.random.default_rng(0)
    colored = Image.new("RGB", (3, 3), (140, 100, 60))
    spreads = [float(np.ptp(np.asarray(_color_jitter(colored, generator, 0.2))[0, 0])) for _ in range(800)]
    # Each of the three spreads an even color by up to 1.2, so that two of them do by 1.44 at most.
    assert max(spreads) > 80 * 1.48 and min(spreads) < 80 * 0.61
    gray = Image.fromarray(np.repeat(np.array([[60], [140]], np.uint8)[..., None], 3, 2))
    ratios = []
    for _ in range(200):
        dark, light = np.asarray(_color_jitter(gray, generator, 0.2))[:, 0, 0].astype(float)
        ratios.append(light / dark)  # brightness leaves it
    assert max(ratios) > 140 / 60 * 1.1 and min(ratios) < 140 / 60 / 1.1


# RandAugment


def test_operations_are_those_of_timm():
    timm = pytest.importorskip("timm.data.auto_augment")
    assert list(TIMM_NAMES) == list(_OPERATIONS)
    assert list(TIMM_NAMES.values()) == timm._RAND_INCREASING_TRANSFORMS


@pytest.mark.parametrize("name", _OPERATIONS)
def test_operations_equal_timm_pixel_by_pixel(name, monkeypatch):
    timm = pytest.importorskip("timm.data.auto_augment")
    given, results = make_image(), []
    for sign in (-1, 1):
        monkeypatch.setattr(timm, "_randomly_negate", lambda value, sign=sign: sign * value)
        for level in (0.0, 1.7, 5.0, 8.61, 9.0, 9.99):
            for resample in _RESAMPLINGS.values():
                hparams = {"img_mean": FILL, "interpolation": resample}
                wanted = timm.AugmentOp(TIMM_NAMES[name], prob=1.0, magnitude=level, hparams=hparams)(given)
                result = _OPERATIONS[name](given, level / 10, sign, FILL, resample)
                assert result.size == given.size and result.mode == "RGB"
                np.testing.assert_array_equal(result, wanted, err_msg=f"{sign} {level} {resample}")
                results.append(np.asarray(result))
    assert all((result != np.asarray(given)).any() for result in results[-2:])


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("name", _OPERATIONS)
def test_operations_of_zero_strength_change_nothing(name, sign):
    for resample in _RESAMPLINGS.values():
        result = _OPERATIONS[name](make_image(), 0.0, sign, FILL, resample)
        assert np.array_equal(result, make_image()) == (name not in NEVER_IDENTITY)


@pytest.mark.parametrize("name", _OPERATIONS)
def test_operations_of_full_strength_keep_size_and_mode(name):
    for size in ((61, 47), (1, 1), (2, 9)):
        result = _OPERATIONS[name](make_image(*size), 1.0, 1, FILL, Image.Resampling.BICUBIC)
        assert result.size == size and result.mode == "RGB"


def test_posterizing_keeps_one_bit_at_full_strength():
    # timm asks Pillow for zero bits: old versions return a black image and new ones raise.
    levels = np.asarray(_OPERATIONS["posterize"](make_image(), 1.0, 1, FILL, Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(levels, np.asarray(make_image()) & 0x80)


def test_pixels_from_outside_have_the_mean_color():
    recipe = Recipe(**{**NOTHING, "rand_augment": 1, "rand_augment_magnitude": 10.0, "rand_augment_deviation": 0.0})
    processor = untouched_size(image_mean=(0.1, 0.5, 0.8))
    given, colors = Image.new("RGB", (20, 20), (200, 200, 200)), set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augmentation, "_OPERATIONS", {"translate_x": _OPERATIONS["translate_x"]})
        for seed in range(20):
            result = _augment(given, np.random.default_rng(seed), recipe, processor)
            colors |= {tuple(map(int, color)) for color in result.reshape(-1, 3)}
    assert {(26, 128, 204), (200, 200, 200)} <= colors  # bicubic edges lie between them


def test_operations_are_drawn_as_in_timm(monkeypatch):
    calls, count = [], 1500

    def note(name):
        return lambda image, *rest: calls.append((name, *rest)) or image

    monkeypatch.setattr(augmentation, "_OPERATIONS", {name: note(name) for name in "abc"})
    recipe = Recipe(rand_augment=2, rand_augment_magnitude=9.0, rand_augment_deviation=0.5, interpolation="random")
    generator = np.random.default_rng(0)
    applied = []
    for _ in range(count):
        before = len(calls)
        assert _rand_augment(make_image(2, 2), generator, recipe, FILL) is not None
        applied.append(len(calls) - before)
    for number, share in ((0, 0.25), (1, 0.5), (2, 0.25)):  # each is left out every other time
        assert np.mean(np.equal(applied, number)) == pytest.approx(share, abs=four_deviations(share, count))
    names, strengths, signs, fills, resamples = zip(*calls, strict=True)
    for values, share in ((np.equal(names, "a"), 1 / 3), (np.equal(signs, 1), 0.5)):
        assert values.mean() == pytest.approx(share, abs=four_deviations(share, len(calls)))
    assert set(signs) == {-1, 1} and set(fills) == {FILL} and set(resamples) == set(_RESAMPLINGS.values())
    strengths = np.array(strengths)
    assert strengths.max() == 1.0  # all above is cut off there
    assert (strengths == 1.0).mean() == pytest.approx(0.02275, abs=four_deviations(0.02275, len(calls)))
    assert np.median(strengths) == pytest.approx(0.9, abs=0.01)
    below = (strengths < 0.85).mean()  # one standard deviation below
    assert below == pytest.approx(0.1587, abs=four_deviations(0.1587, len(calls)))
    assert any(len({name for name, *_ in calls[i : i + 2]}) == 1 for i in range(50))  # with replacement
    calls.clear()
    for _ in range(50):
        _rand_augment(make_image(2, 2), generator, replace(recipe, interpolation="bilinear"), FILL)
    assert {resample for *_, resample in calls} == {_RESAMPLINGS["bilinear"]}


# A batch


def rectangle(mask):
    """Return (top, left, height, width) of a mask's True part, and assert that it is a filled rectangle."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left, height, width = rows[0], columns[0], len(rows), len(columns)
    assert rows[-1] - top + 1 == height and columns[-1] - left + 1 == width
    assert mask.sum() == height * width
    return top, left, height, width


def erased(probability, batch=600, height=40, width=24, seed=0):
    given = jnp.full((batch, height, width, 3), 100.0)
    result = np.asarray(
        jax.jit(_erase, static_argnums=2, compiler_options=QUICK)(jax.random.key(seed), given, probability)
    )
    changed = (result != 100).any(-1)
    assert ((result != 100).all(-1) == changed).all()  # all channels of a pixel
    return result, changed


def test_erased_rectangles_have_the_given_distribution():
    probability, height, width = 0.4, 40, 24
    result, changed = erased(probability, height=height, width=width)
    chosen = changed.any((1, 2))
    assert chosen.mean() == pytest.approx(probability, abs=four_deviations(probability, len(chosen)))
    boxes = np.array([rectangle(mask) for mask in changed[chosen]])
    top, left, h, w = boxes.T
    # Sides are rounded by half a pixel at most.
    assert ((h - 0.5) * (w - 0.5) <= _ERASE_AREA[1] * height * width).all()
    assert ((h + 0.5) * (w + 0.5) >= _ERASE_AREA[0] * height * width).all()
    assert ((h - 0.5) / (w + 0.5) <= _ERASE_RATIO[1]).all() and ((h + 0.5) / (w - 0.5) >= _ERASE_RATIO[0]).all()
    assert top.min() == left.min() == 0 and (top + h).max() == height and (left + w).max() == width
    noise = result[changed]
    assert abs(noise.mean()) < 4 / math.sqrt(noise.size) and noise.std() == pytest.approx(1, abs=0.02)
    assert len(np.unique(noise)) > 0.9 * noise.size  # each pixel and channel its own
    np.testing.assert_array_equal(result[~changed], 100)


def test_erasing_has_the_areas_and_ratios_of_timm():
    torch = pytest.importorskip("torch")
    timm = pytest.importorskip("timm.data.random_erasing")
    import random

    random.seed(0)
    torch.manual_seed(0)
    _, ours = erased(1.0)
    eraser = timm.RandomErasing(probability=1.0, mode="pixel", device="cpu")
    theirs = (eraser(torch.full((600, 1, 40, 24), 100.0)) != 100)[:, 0].numpy()
    assert ours.any((1, 2)).all() and theirs.any((1, 2)).all()
    for measure in (lambda box: box[2] * box[3], lambda box: math.log(box[2] / box[3]), lambda box: box[0] / 40):
        one, other = (np.array([measure(rectangle(mask)) for mask in masks]) for masks in (ours, theirs))
        deviation = math.sqrt((one.var() + other.var()) / 600)
        assert abs(one.mean() - other.mean()) < 4 * deviation
        assert one.std() == pytest.approx(other.std(), rel=0.15)


def test_erasing_probability_zero_and_one():
    assert not erased(0.0)[1].any()
    assert erased(1.0)[1].any((1, 2)).all()


def mixed(recipe, keys=200, batch=5, size=(12, 10), corner=0.0):
    """Return a batch, and the results of `mix` on it and on one-hot targets for many keys."""
    generator = np.random.default_rng(0)
    given = generator.standard_normal((batch, *size, 3)).astype(np.float32)
    given[0, 0, 0] = corner
    mix_all = jax.jit(jax.vmap(lambda key: _mix(key, given, jnp.eye(batch), recipe)), compiler_options=QUICK)
    results, targets = mix_all(jax.random.split(jax.random.key(1), keys))
    return given, np.asarray(results), np.asarray(targets)


def shares(targets):
    """Return the weight of the own class in the first target, and check the others."""
    batch = targets.shape[-1]
    own = targets[:, 0, 0]
    eye = np.eye(batch)
    wanted = own[:, None, None] * eye + (1 - own)[:, None, None] * eye[::-1]
    np.testing.assert_allclose(targets, wanted, atol=FLOAT32_ROUNDING)
    return own


def test_mixup_mixes_images_and_targets_alike():
    alpha = 0.3
    given, results, targets = mixed(Recipe(mixup=alpha))
    own = shares(targets)[:, None, None, None, None]
    np.testing.assert_allclose(results, own * given + (1 - own) * given[::-1], atol=4 * FLOAT32_ROUNDING)
    np.testing.assert_allclose(results[:, 2], np.broadcast_to(given[2], results[:, 2].shape), atol=FLOAT32_ROUNDING)
    variance = 1 / (4 * (2 * alpha + 1))  # of the beta distribution
    assert own.mean() == pytest.approx(0.5, abs=4 * math.sqrt(variance / len(own)))
    assert own.var() == pytest.approx(variance, rel=0.25)


def test_cutmix_counts_the_pixels_for_the_targets():
    given, results, targets = mixed(Recipe(cutmix=1.0), keys=300)
    own, areas, places = shares(targets), [], []
    for result, share in zip(results, own, strict=True):
        pasted = (result != given).any(-1)[[0, 1, 3, 4]]
        assert (pasted == pasted[0]).all()
        mask = pasted[0]
        np.testing.assert_array_equal(result, np.where(mask[None, ..., None], given[::-1], given))
        assert share == pytest.approx(1 - mask.mean(), abs=FLOAT32_ROUNDING)
        if mask.any():
            top, left, height, width = rectangle(mask)
            areas.append(mask.mean())
            places += [(top == 0) + 2 * (top + height == 12) + 4 * (left == 0) + 8 * (left + width == 10)]
    assert {1, 2, 4, 8} <= set(places)  # at one border only, each of the four
    assert min(areas) < 0.05 and max(areas) > 0.5


def test_cutmix_boxes_equal_timm(monkeypatch):
    pytest.importorskip("torch")
    timm = pytest.importorskip("timm.data.mixup")
    generator = np.random.default_rng(0)
    batch = np.zeros((2, 13, 10, 1), np.float32)
    batch[1] = 1
    recipe = Recipe(mixup=0.3, cutmix=1.0, mix_switch=1.0)
    for _ in range(40):
        kept, place = generator.random(), generator.random(2).astype(np.float32)
        center = list(np.floor(place * np.array([13, 10], np.float32)).astype(int))
        monkeypatch.setattr(np.random, "randint", lambda low, high, size=None, center=center: center.pop(0))
        top, bottom, left, right = timm.rand_bbox((13, 10), kept)
        monkeypatch.undo()
        with monkeypatch.context() as patch:
            patch.setattr(jax.random, "beta", lambda key, a, b, kept=kept: jnp.float32({0.3: 0.5, 1.0: kept}[a]))
            patch.setattr(
                jax.random, "uniform", lambda key, shape=(), place=place: jnp.asarray(place) if shape else jnp.zeros(())
            )
            result, targets = _mix(jax.random.key(0), jnp.asarray(batch), jnp.eye(2), recipe)
        wanted = np.zeros((13, 10))
        wanted[top:bottom, left:right] = 1
        np.testing.assert_array_equal(result[0, ..., 0], wanted)
        assert float(targets[0, 0]) == pytest.approx(1 - wanted.mean(), abs=FLOAT32_ROUNDING)


@pytest.mark.slow
def test_batches_are_mixed_and_cut_with_their_probabilities():
    recipe = Recipe(mixup=1.0, cutmix=1.0, mix_probability=0.6, mix_switch=0.25)
    given, results, targets = mixed(recipe, keys=600)
    changed = (results != given).any((1, 2, 3, 4))
    assert changed.mean() == pytest.approx(0.6, abs=four_deviations(0.6, 600) + 0.01)  # some boxes are empty
    np.testing.assert_array_equal(
        targets[~changed], np.broadcast_to(np.eye(5, dtype=np.float32), (sum(~changed), 5, 5))
    )
    cut = ((results == given) | (results == given[::-1])).all((1, 2, 3, 4))[changed]
    assert cut.mean() == pytest.approx(0.25, abs=four_deviations(0.25, changed.sum()) + 0.01)


@pytest.mark.parametrize("changes", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_unmixed_batches_keep_every_bit(changes):
    # An infinity stays in its image, so that the one that caused it can be found.
    given, results, targets = mixed(Recipe(**changes, mix_probability=0.0), keys=20, corner=np.inf)
    np.testing.assert_array_equal(results, np.broadcast_to(given, results.shape))
    np.testing.assert_array_equal(targets, np.broadcast_to(np.eye(5, dtype=np.float32), targets.shape))
