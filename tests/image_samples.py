"""Seeded images that the tests of image processing share."""

import numpy as np
from PIL import Image

from levit_flax.image_processing import LevitImageProcessor

SEED = 20210402


def random_levels(seed: int = SEED, height: int = 40, width: int = 50, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def make_image(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(random_levels()).convert(mode)


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert np.ascontiguousarray(ours).tobytes() == np.ascontiguousarray(theirs).tobytes()


def values(image: object, **options: object) -> np.ndarray:
    return LevitImageProcessor(size=16, crop_size=16)(image, return_tensors="np", **options)["pixel_values"]


FINE = random_levels(height=8, width=8)
