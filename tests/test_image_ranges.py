"""Images of all dtypes and ranges keep their brightness, or raise an error."""

import numpy as np
import pytest
from PIL import Image

from levit_flax.image_processing import LevitImageProcessor
from levit_flax.images import ImageError

GRADIENT = np.linspace(0, 1, 64 * 64).reshape(64, 64)


@pytest.mark.parametrize(
    "pixels",
    [
        GRADIENT.astype(np.float32),
        (GRADIENT * 255).astype(np.float32),
        (GRADIENT * 65535).astype(np.float32),
        (GRADIENT * 255).astype(np.int32),
        (GRADIENT * 65535).astype(np.int32),
        (GRADIENT * 65535).astype(np.uint16),
    ],
    ids=["float 1", "float 255", "float 65535", "int32 255", "int32 65535", "uint16"],
)
def test_images_of_any_range_keep_their_brightness(tmp_path, pixels):
    image = Image.fromarray(pixels)
    image.save(tmp_path / "image.tif")
    expected = np.repeat((GRADIENT * 255)[..., None], 3, axis=-1)
    processor = LevitImageProcessor(do_resize=False, do_center_crop=False)
    for given in (image, tmp_path / "image.tif"):
        np.testing.assert_allclose(processor.resize_and_crop(given), expected, atol=1)


def test_boolean_images_are_black_and_white():
    pixels = GRADIENT > 0.5
    for given in (pixels, Image.fromarray(pixels)):
        found = LevitImageProcessor(do_resize=False, do_center_crop=False).resize_and_crop(given)
        np.testing.assert_array_equal(found[..., 0], np.where(pixels, 255, 0))


def brightness(image):
    return float(np.mean(LevitImageProcessor(do_normalize=False)(image)["pixel_values"][0]))


@pytest.mark.parametrize("largest", [1, 1.001, 1.05, 254.5, 255, 255.5, 260, 65535])
def test_overshoot_keeps_the_brightness(largest):
    assert brightness(Image.fromarray((GRADIENT * largest).astype(np.float32))) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("levels", [1.5 * GRADIENT, 300 * GRADIENT, 1023 * GRADIENT, 70000 * GRADIENT, GRADIENT - 0.5])
def test_ambiguous_ranges_raise(levels):
    with pytest.raises(ImageError, match=r"The range of the image is not known: expected values in \[0, 1\]"):
        brightness(Image.fromarray(levels.astype(np.float32)))


@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_integers_keep_their_brightness(dtype):
    for largest in (255, 65535):
        levels = np.round(GRADIENT * largest).astype(dtype)
        assert brightness(Image.fromarray(levels)) == pytest.approx(0.5, abs=0.01)
    if dtype == np.int32:
        with pytest.raises(ImageError, match=r"The range of the image is not known: .*, found 0 to 1000"):
            brightness(Image.fromarray(np.round(GRADIENT * 1000).astype(dtype)))


def test_arrays_out_of_range_raise_without_resizing():
    processor = LevitImageProcessor(do_resize=False, do_center_crop=False)
    for array in (GRADIENT * 65535, np.full((8, 8, 3), 10**6), GRADIENT - 1):
        with pytest.raises(ImageError, match=r"out of range: expected integers from 0 to 255 or values in \[0, 1\]"):
            processor(array)
