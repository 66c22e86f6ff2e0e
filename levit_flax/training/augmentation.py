"""Augment training images: single images with Pillow, batches on the device.

Source: timm (data/auto_augment.py, data/transforms.py, data/random_erasing.py, data/mixup.py), as used by
facebookresearch/LeViT.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from levit_flax.image_processing import LevitImageProcessor
from levit_flax.images import _with_channels

from .recipe import Recipe

_CROP_ATTEMPTS = 10
_ERASE_ATTEMPTS = 10
_ERASE_AREA = (0.02, 1 / 3)
_ERASE_RATIO = (0.3, 1 / 0.3)
_RESAMPLINGS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def _augment(
    image: Image.Image, rng: np.random.Generator, recipe: Recipe, processor: LevitImageProcessor
) -> np.ndarray:
    """Return a randomly cropped, flipped and altered RGB image as uint8 [H W C] of the processor's crop size.

    The processor resizes and crops if the recipe has no random crop.
    """
    if recipe.crop_padding:
        image = _crop_with_border(image, rng, recipe.crop_padding)
    if recipe.crop_scale:
        image = _random_resized_crop(image, rng, recipe, (processor.crop_size["width"], processor.crop_size["height"]))
    if rng.random() < recipe.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if recipe.rand_augment:
        fill = tuple(round(255 * mean) for mean in np.broadcast_to(processor.image_mean, 3))
        image = _rand_augment(image, rng, recipe, fill)
    if recipe.color_jitter:
        image = _color_jitter(image, rng, recipe.color_jitter)
    if not recipe.crop_scale:
        return processor.resize_and_crop(image)
    pixels = np.asarray(_with_channels(image, processor._channels))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _crop_with_border(image: Image.Image, rng: np.random.Generator, border: int) -> Image.Image:
    """Add a reflected border and return a random crop of the original size."""
    width, height = image.size
    pad = min(border, width - 1, height - 1)  # NumPy cannot reflect more than the image
    padded = np.pad(np.asarray(image), ((pad, pad), (pad, pad), (0, 0)), mode="reflect")
    top, left = rng.integers(0, 2 * pad + 1, 2)
    return Image.fromarray(padded[top : top + height, left : left + width])


def _random_resized_crop(
    image: Image.Image, rng: np.random.Generator, recipe: Recipe, size: tuple[int, int]
) -> Image.Image:
    """Return a random crop resized to `size` (width, height)."""
    box = _random_box(image.size, rng, recipe.crop_scale, recipe.crop_ratio)
    return image.crop(box).resize(size, _draw_resampling(rng, recipe))


def _random_box(
    size: tuple[int, int], rng: np.random.Generator, scale: tuple[float, ...], ratio: tuple[float, ...]
) -> tuple[int, int, int, int]:
    """Return a random box (left, top, right, bottom) with an area and an aspect ratio in the given ranges.

    If no attempt fits into the image, return the largest centered box with an allowed ratio.
    """
    width, height = size
    for _ in range(_CROP_ATTEMPTS):
        area = rng.uniform(scale[0], scale[1]) * width * height
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _draw_resampling(rng: np.random.Generator, recipe: Recipe) -> Image.Resampling:
    """Return the filter of the recipe, drawn at random for "random"."""
    name = str(rng.choice(list(_RESAMPLINGS))) if recipe.interpolation == "random" else recipe.interpolation
    return _RESAMPLINGS[name]


def _color_jitter(image: Image.Image, rng: np.random.Generator, strength: float) -> Image.Image:
    """Scale brightness, contrast and saturation in random order, each by a factor in 1 ± strength."""
    for i in rng.permutation(3):
        enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[i]
        image = enhance(image).enhance(rng.uniform(max(0.0, 1 - strength), 1 + strength))
    return image


def _rand_augment(image: Image.Image, rng: np.random.Generator, recipe: Recipe, fill: tuple[int, ...]) -> Image.Image:
    """Apply random operations of RandAugment, drawn with replacement; each is skipped with probability 1/2.

    `fill` is the color of the pixels that come from outside the image.

    Source: Cubuk et al. 2020, "RandAugment"; timm's variant "rand-m9-mstd0.5-inc1", in which a larger magnitude makes
        every operation stronger.
    """
    for name in rng.choice(list(_OPERATIONS), recipe.rand_augment):
        if rng.random() < 0.5:
            continue
        magnitude = rng.normal(recipe.rand_augment_magnitude, recipe.rand_augment_deviation)
        strength = min(max(magnitude, 0.0), 10.0) / 10
        sign = int(rng.choice((-1, 1)))
        image = _OPERATIONS[name](image, strength, sign, fill, _draw_resampling(rng, recipe))
    return image


_Operation = Callable[[Image.Image, float, int, tuple[int, ...], Image.Resampling], Image.Image]


def _affine(coefficients: Callable[[Image.Image, float], tuple[float, ...]]) -> _Operation:
    def move(
        image: Image.Image, strength: float, sign: int, fill: tuple[int, ...], resample: Image.Resampling
    ) -> Image.Image:
        matrix = coefficients(image, sign * strength)
        return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=fill)

    return move


def _enhance(enhancer: Callable[[Image.Image], ImageEnhance._Enhance]) -> _Operation:
    return lambda image, strength, sign, *_: enhancer(image).enhance(max(0.1, 1 + sign * 0.9 * strength))


def _add_below_middle(image: Image.Image, amount: int) -> Image.Image:
    table = [min(255, level + amount) if level < 128 else level for level in range(256)]
    return image.point(table * len(image.getbands()))


_OPERATIONS: dict[str, _Operation] = {
    "auto_contrast": lambda image, *_: ImageOps.autocontrast(image),
    "equalize": lambda image, *_: ImageOps.equalize(image),
    "invert": lambda image, *_: ImageOps.invert(image),
    "rotate": lambda image, strength, sign, fill, resample: image.rotate(
        sign * 30 * strength, resample=resample, fillcolor=fill
    ),
    # At least one bit, because Pillow does not accept zero; timm would return a black image.
    "posterize": lambda image, strength, *_: ImageOps.posterize(image, max(1, 4 - int(4 * strength))),
    "solarize": lambda image, strength, *_: ImageOps.solarize(image, 256 - int(256 * strength)),
    "solarize_add": lambda image, strength, *_: _add_below_middle(image, int(110 * strength)),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _affine(lambda image, amount: (1, 0.3 * amount, 0, 0, 1, 0)),
    "shear_y": _affine(lambda image, amount: (1, 0, 0, 0.3 * amount, 1, 0)),
    "translate_x": _affine(lambda image, amount: (1, 0, 0.45 * amount * image.width, 0, 1, 0)),
    "translate_y": _affine(lambda image, amount: (1, 0, 0, 0, 1, 0.45 * amount * image.height)),
}


def _erase(key: jax.Array, pixel_values: jax.Array, probability: float) -> jax.Array:
    """Replace a random rectangle with normal noise, in randomly chosen images of a batch [B H W C].

    Source: Zhong et al. 2020, "Random Erasing Data Augmentation"; timm's "pixel" mode.
    """
    batch, height, width, _ = pixel_values.shape
    choose, area_key, ratio_key, place_key, noise_key = jax.random.split(key, 5)
    draws = (batch, _ERASE_ATTEMPTS)
    area = jax.random.uniform(area_key, draws, minval=_ERASE_AREA[0], maxval=_ERASE_AREA[1]) * height * width
    low, high = map(math.log, _ERASE_RATIO)
    ratio = jnp.exp(jax.random.uniform(ratio_key, draws, minval=low, maxval=high))
    heights, widths = jnp.rint(jnp.sqrt(area * ratio)), jnp.rint(jnp.sqrt(area / ratio))
    fits = (heights < height) & (widths < width)
    first = jnp.argmax(fits, axis=1)[:, None]
    h, w = (jnp.take_along_axis(side, first, axis=1)[:, 0] for side in (heights, widths))
    place = jax.random.uniform(place_key, (2, batch))
    top, left = jnp.floor(place[0] * (height - h + 1)), jnp.floor(place[1] * (width - w + 1))
    rows, columns = jnp.arange(height)[None, :], jnp.arange(width)[None, :]
    in_rows = (rows >= top[:, None]) & (rows < (top + h)[:, None])  # [B H]
    in_columns = (columns >= left[:, None]) & (columns < (left + w)[:, None])  # [B W]
    chosen = (jax.random.uniform(choose, (batch,)) < probability) & fits.any(1)
    inside = chosen[:, None, None] & in_rows[:, :, None] & in_columns[:, None, :]  # [B H W]
    noise = jax.random.normal(noise_key, pixel_values.shape, pixel_values.dtype)
    return jnp.where(inside[..., None], noise, pixel_values)


def _mix(key: jax.Array, pixel_values: jax.Array, targets: jax.Array, recipe: Recipe) -> tuple[jax.Array, jax.Array]:
    """Mix images [B H W C] and targets [B L] with their reverse by mixup or cutmix, or return them unchanged.

    Source: Zhang et al. 2018, "mixup"; Yun et al. 2019, "CutMix"; timm's "batch" mode.
    """
    _, height, width, _ = pixel_values.shape
    use_key, switch_key, share_key, cut_key, place_key = jax.random.split(key, 5)
    use = jax.random.uniform(use_key) < recipe.mix_probability
    switch = recipe.mix_switch if recipe.mixup and recipe.cutmix else float(bool(recipe.cutmix))
    cut = jax.random.uniform(switch_key) < switch
    kept = 1.0 if not recipe.mixup else jax.random.beta(share_key, recipe.mixup, recipe.mixup)
    kept_by_cut = 1.0 if not recipe.cutmix else jax.random.beta(cut_key, recipe.cutmix, recipe.cutmix)

    side = jnp.sqrt(1 - kept_by_cut)
    center = jnp.floor(jax.random.uniform(place_key, (2,)) * jnp.array([height, width]))
    extent = jnp.floor(side * jnp.array([height, width]))
    low = jnp.clip(center - extent // 2, 0, jnp.array([height, width]))
    high = jnp.clip(center + (extent + 1) // 2, 0, jnp.array([height, width]))
    rows, columns = jnp.arange(height), jnp.arange(width)
    inside = ((rows >= low[0]) & (rows < high[0]))[:, None] & ((columns >= low[1]) & (columns < high[1]))[None, :]
    kept_by_cut = 1 - inside.mean()  # the true share, after clipping at the border

    dtype = pixel_values.dtype
    weights = jnp.where(cut, 1 - inside.astype(dtype), jnp.asarray(kept, dtype))  # [H W], weight of the image itself
    weights = jnp.where(use, weights, 1)[None, :, :, None].astype(dtype)
    share = jnp.where(use, jnp.where(cut, kept_by_cut, kept), 1).astype(targets.dtype)
    # weights * x + (1 - weights) * y alone would turn an infinity in y into NaN where x is not mixed.
    mixed = jnp.where(weights == 1, pixel_values, weights * pixel_values + (1 - weights) * pixel_values[::-1])
    return mixed, share * targets + (1 - share) * targets[::-1]
