"""Images of every kind and file format, and the errors for unreadable ones."""

import io
import re
import struct
import subprocess
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from image_samples import FINE, SEED, assert_same_bits, make_image, random_levels, values
from levit_flax.image_processing import LevitImageProcessor
from levit_flax.images import ImageError, _image_suffixes, _load_image

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "F"])
def test_images_of_every_mode_become_rgb(mode):
    image = make_image("L").convert(mode) if mode in ("F", "PA") else make_image(mode)
    assert_same_bits(values(image), values(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
@pytest.mark.parametrize("from_file", [False, True])
def test_sixteen_bits_are_scaled_to_eight(mode, from_file, tmp_path):
    gray = random_levels()[..., 0]
    nearest = np.random.default_rng(SEED).integers(-128, 129, gray.shape)  # 16-bit levels that round to the same 8 bits
    levels = np.clip(gray.astype(np.int32) * 257 + nearest, 0, 65535)
    wide = Image.fromarray(levels.astype({"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]))
    assert wide.mode == mode
    if from_file:
        wide.save(tmp_path / "wide.tiff")
        wide = tmp_path / "wide.tiff"
    assert_same_bits(values(wide), values(Image.fromarray(gray)))


def test_levels_beyond_sixteen_bits_raise():
    with pytest.raises(ImageError, match=r"range of the image is not known: .* \[0, 65535\], found 0 to 70000"):
        values(Image.fromarray(np.array([[0, 70000]], dtype=np.int32)))


def test_transparency_is_laid_over_white_in_memory_and_dropped_from_a_file(tmp_path):
    image = Image.new("RGBA", (20, 20), (10, 20, 30, 0))
    image.save(tmp_path / "clear.png")
    assert_same_bits(values(image), values(Image.new("RGB", (20, 20), "white")))
    assert_same_bits(values(np.asarray(image)), values(Image.new("RGB", (20, 20), "white")))
    assert_same_bits(values(tmp_path / "clear.png"), values(Image.new("RGB", (20, 20), (10, 20, 30))))


def test_a_transparent_palette_is_read_without_a_warning(tmp_path):
    image = make_image("P")
    image.save(tmp_path / "palette.png", transparency=bytes(range(256)))
    assert_same_bits(values(tmp_path / "palette.png"), values(image.convert("RGB")))


def test_conversion_to_rgb_can_be_left_out():
    processor = LevitImageProcessor(size=16, crop_size=16, do_convert_rgb=False, image_mean=0.5, image_std=0.5)
    assert processor(make_image("L"), return_tensors="np")["pixel_values"].shape == (1, 16, 16, 1)
    assert processor(make_image("RGBA"), return_tensors="np")["pixel_values"].shape == (1, 16, 16, 4)


@pytest.mark.parametrize("shape", [(40, 50), (40, 50, 1), (1, 40, 50)])
def test_gray_arrays_of_every_layout(shape):
    gray = random_levels()[..., 0]
    assert_same_bits(values(gray.reshape(shape)), values(Image.fromarray(gray)))


def test_channel_order_is_inferred_and_can_be_given():
    levels = random_levels(height=3)  # [3 50 3] can be read both ways
    first = np.moveaxis(levels, -1, 0)
    expected = values(Image.fromarray(levels))
    assert_same_bits(values(levels, input_data_format="channels_last"), expected)
    assert_same_bits(values(first, input_data_format="channels_first"), expected)
    with pytest.warns(UserWarning, match=r"shape \(3, 50, 3\) is ambiguous, and channels first is assumed"):
        assert_same_bits(values(levels), values(levels, input_data_format="channels_first"))
    levels = random_levels()
    assert_same_bits(values(np.moveaxis(levels, -1, 0)), values(levels))


def test_floats_in_the_unit_range_are_read_as_levels():
    levels = random_levels()
    expected = values(levels)
    unit = (levels.astype(np.float64) / 255 + 1e-9).clip(0, 1)  # above the level, so that the way back truncates to it
    assert_same_bits(values(levels.astype(np.float32)), expected)
    assert_same_bits(values(unit, do_rescale=False), expected)


def test_rescaling_twice_is_warned_of():
    with pytest.warns(UserWarning, match=r"values are already in \[0, 1\].*do_rescale=False") as caught:
        values(random_levels() / 255)
    assert caught[0].filename == values.__code__.co_filename  # where the processor is called


def test_batches_of_every_form_are_the_same():
    jax = pytest.importorskip("jax")
    levels = np.stack([random_levels(1), random_levels(2)])
    images = [Image.fromarray(image) for image in levels]
    expected = values(images)
    assert expected.shape == (2, 16, 16, 3)
    for batch in (
        levels,
        [levels[:1], levels[1]],
        tuple(images),
        [[images[0]], [images[1]]],
        jax.numpy.asarray(levels),
    ):
        assert_same_bits(values(batch), expected)


def test_torch_tensors_are_taken_and_given():
    torch = pytest.importorskip("torch")
    levels = random_levels()
    tensor = torch.from_numpy(levels).permute(2, 0, 1)
    found = LevitImageProcessor(size=16, crop_size=16)(tensor, return_tensors="pt")["pixel_values"]
    assert isinstance(found, torch.Tensor)
    assert_same_bits(found.numpy(), values(levels))
    with pytest.raises(TypeError, match=r"The Tensor cannot be converted to a NumPy array \(.*detach"):
        values(torch.ones(3, 8, 8, requires_grad=True))


def test_images_of_different_sizes():
    images = [random_levels(height=30), random_levels(height=31)]
    assert values(images).shape == (2, 16, 16, 3)
    loose = LevitImageProcessor(size=16, do_center_crop=False)(images)["pixel_values"]
    assert [image.shape for image in loose] == [(18, 30, 3), (18, 29, 3)]


def test_types_and_layouts_of_the_result():
    jax = pytest.importorskip("jax")
    processor = LevitImageProcessor(size=16, crop_size=(16, 12))
    last = processor(make_image(), return_tensors="np")["pixel_values"]
    first = processor(make_image(), return_tensors="np", data_format="channels_first")["pixel_values"]
    on_device = processor(make_image(), return_tensors="jax")["pixel_values"]
    assert last.shape == (1, 16, 12, 3)
    assert first.flags.c_contiguous
    assert_same_bits(first, np.moveaxis(last, -1, 1))
    assert isinstance(on_device, jax.Array)
    assert_same_bits(np.asarray(on_device), last)
    (only,) = processor.preprocess(make_image())["pixel_values"]
    assert_same_bits(only, last[0])


def test_the_two_halves_make_the_whole():
    processor = LevitImageProcessor(size=16, crop_size=16)
    crop = processor.resize_and_crop(make_image())
    assert crop.dtype == np.uint8
    assert_same_bits(processor.rescale_and_normalize(crop[None]), values(make_image()))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_files_are_turned_upright_and_pil_images_are_left_alone(tmp_path, orientation, suffix):
    upright = make_image()
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the Transpose that undoes how the camera was held
    stored = upright.transpose(Image.Transpose(turns[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    stored.save(path, exif=exif, lossless=True)
    assert_same_bits(np.asarray(_load_image(path)), np.asarray(upright))
    assert_same_bits(values(path), values(upright))
    with Image.open(path) as opened:
        assert_same_bits(values(opened), values(stored))
        assert_same_bits(values(ImageOps.exif_transpose(opened)), values(upright))


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    for name in ("moving.gif", "moving.png", "moving.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert_same_bits(values(tmp_path / name), values(frames[0]))


def test_the_format_is_told_from_the_content(tmp_path):
    make_image().save(tmp_path / "lie.jpg", format="PNG")
    assert_same_bits(values(tmp_path / "lie.jpg"), values(make_image()))


def test_a_file_is_closed_and_left_as_it_was(tmp_path):
    path = tmp_path / "image.png"
    make_image().save(path)
    before = path.read_bytes()
    image = _load_image(path)
    path.unlink()
    assert image.mode == "RGB"
    assert_same_bits(np.asarray(image), random_levels())
    assert image.tobytes() != before


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1)])
def test_the_smallest_images(shape):
    assert values(Image.new("RGB", shape, "white")).shape == (1, 16, 16, 3)


def test_damaged_files_load_or_raise_one_sentence(tmp_path):
    rng = np.random.default_rng(SEED)
    path = tmp_path / "damaged"
    results = refused = 0
    for file_format in ("JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP", "PPM", "TGA", "ICO", "JPEG2000", "PCX", "SGI"):
        buffer = io.BytesIO()
        make_image("P" if file_format == "GIF" else "RGB").save(buffer, format=file_format)
        for _ in range(20):
            content = np.frombuffer(buffer.getvalue(), np.uint8).copy()
            content[rng.integers(0, min(len(content), 200), 3)] = rng.integers(0, 256, 3)
            path.write_bytes(content[: rng.integers(1, len(content)) if rng.random() < 0.3 else None].tobytes())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's own remarks on what it mends
                try:
                    results += values(path).shape == (1, 16, 16, 3)
                except ImageError as error:
                    assert str(path) in str(error) or "too large after resizing" in str(error)  # noqa: PT017
                    refused += 1
    assert results > 20
    assert refused > 20


def test_missing_path_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"The image {tmp_path / 'no.jpg'} does not exist.")):
        values([make_image(), tmp_path / "no.jpg"])


def test_unreadable_files_raise(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("This is not an image.\n" * 100)
    make_image().save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    for path, message in [
        (tmp_path, f"{tmp_path} is not a regular file: expected an image file, found a directory or a device."),
        (tmp_path / "empty.jpg", f"{tmp_path / 'empty.jpg'} is empty: expected an image file, found 0 bytes."),
        (tmp_path / "text.jpg", f"{tmp_path / 'text.jpg'} is not an image: expected one of the formats AVIF, BMP"),
        (
            tmp_path / "cut.jpg",
            f"{tmp_path / 'cut.jpg'} cannot be decoded and is probably damaged (image file is trunc",
        ),
    ]:
        with pytest.raises(ImageError, match="^" + re.escape(message)):
            _load_image(path)
        with pytest.raises(ImageError, match=re.escape(message)):
            values(path)
    with Image.open(tmp_path / "cut.jpg") as lazy, pytest.raises(ImageError, match=r"^The PIL image cannot be decoded"):
        values(lazy)


@pytest.mark.parametrize("action", ["error", "ignore"])  # what the user does with Pillow's own warning
@pytest.mark.parametrize("limit", [1500, 900])  # Pillow warns above its limit, and raises above twice as many
def test_a_decompression_bomb(tmp_path, monkeypatch, limit, action):
    path = tmp_path / "bomb.png"
    make_image().save(path)  # 2,000 pixels
    assert _load_image(path).size == (50, 40)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    expected = (
        f"^{re.escape(str(path))} is too large: expected at most {limit:,} pixels, found 2,000. "
        "If you trust the file, raise PIL"
    )
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        with pytest.raises(ImageError, match=expected):
            _load_image(path)


def test_a_tiny_file_that_claims_to_be_huge(tmp_path):
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + struct.pack(">I", 9) + b"IDAT"
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    with pytest.raises(ImageError, match=r"huge.png is too large: expected at most 89,478,485 pixels"):
        _load_image(tmp_path / "huge.png")


def test_a_strip_that_would_become_huge(monkeypatch):
    strip = Image.new("RGB", (1, 10_000))
    with pytest.raises(
        ImageError,
        match=r"^The image of 1 x 10000 pixels would be too large .* most 89,478,485 pixels, found 256 x 2560000\.",
    ):
        LevitImageProcessor()(strip)
    assert LevitImageProcessor(size=(256, 256))(strip)["pixel_values"][0].shape == (224, 224, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert LevitImageProcessor(size=16)(strip)["pixel_values"][0].shape == (224, 224, 3)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ImageError, "There are no images: expected at least one, found an empty list or batch."),
        (
            np.zeros((0, 8, 8, 3), np.uint8),
            ImageError,
            "There are no images: expected at least one, found an empty list or batch.",
        ),
        (None, ImageError, "The image is missing: expected an image, found None."),
        (
            {"a": FINE},
            TypeError,
            "An image has the wrong type: expected a path, a URL, bytes, an open file, a PIL image, an array or a list",
        ),
        (
            [FINE, 3],
            TypeError,
            "An image has the wrong type: expected a path, a URL, bytes, an open file, a PIL image, an array or a list",
        ),
        (np.array(["a.jpg"]), TypeError, "An image array has the wrong dtype: expected uint8 or float32, found <U5."),
        (
            FINE[0, 0],
            ImageError,
            "An image array has the wrong rank: expected 2 or 3 axes, or 4 for a batch, found shape (3,).",
        ),
        (
            FINE[None, None],
            ImageError,
            "An image array has the wrong rank: expected 2 or 3 axes, or 4 for a batch, found shape (1, 1, 8",
        ),
        (
            np.zeros((8, 8, 2), np.uint8),
            ImageError,
            (
                "An image array has the wrong number of channels: expected 1, 3 or 4 on the first or last axis, found "
                "shape (8, 8, 2)."
            ),
        ),
        (
            np.zeros((3, 0, 8), np.uint8),
            ImageError,
            "An image array is empty: expected at least one pixel, found [H W C] shape",
        ),
        (
            Image.new("RGB", (0, 5)),
            ImageError,
            "The PIL image is empty: expected at least one pixel, found size (0, 5).",
        ),
        (
            np.full((8, 8, 3), np.nan),
            ImageError,
            "The image is not valid: expected finite pixel values, found NaN or infinity.",
        ),
        (
            Image.new("F", (8, 8), np.inf),
            ImageError,
            "The image is not valid: expected finite pixel values, found NaN or inf",
        ),
        (
            np.full((8, 8, 3), 300),
            ImageError,
            "The pixel values are out of range: expected integers from 0 to 255 or values in [0, 1], found 300 to 300.",
        ),
        (
            np.full((8, 8, 3), 7.5),
            ImageError,
            "The pixel values are out of range: expected integers from 0 to 255 or values in [0, 1], found",
        ),
        (
            np.full((8, 8, 3), -0.5),
            ImageError,
            "The pixel values are out of range: expected integers from 0 to 255 or values in [0, 1], found",
        ),
        (
            np.full((8, 8, 4), 7.0),
            ImageError,
            "A float image with an alpha channel is out of range: expected values in [0, 1], found 7.0 ",
        ),
        (
            [FINE, FINE * np.nan],
            ImageError,
            "Image 1 of 2 (counted from 0): The image is not valid: expected finite pixel values",
        ),
    ],
)
def test_invalid_images_raise(images, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        values(images)


def test_wrong_channel_order_raises():
    with pytest.raises(ImageError, match=re.escape("channels: expected 1, 3 or 4, found [H W C] shape (8, 3, 8).")):
        values(FINE, input_data_format="channels_first")
    with pytest.raises(
        ImageError, match=re.escape("cannot be resized: expected at most 4 channels, found [H W C] shape")
    ):
        values(FINE, input_data_format="channels_first", do_convert_rgb=False)


def test_stacking_different_sizes_raises():
    expected = (
        "The images cannot be stacked: expected equal shapes, found [(18, 22, 3), (20, 18, 3)]. Crop them with "
        "do_center_crop=True, or pass return_tensors=None for a list."
    )
    images = [random_levels(), random_levels(height=56)]
    with pytest.raises(ImageError, match="^" + re.escape(expected)):
        LevitImageProcessor(size=16, do_center_crop=False)(images, return_tensors="np")


def test_no_program_is_started_for_a_file(tmp_path, monkeypatch):
    text = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n0 0 50 50 rectfill\nshowpage\n%%EOF\n"
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program was started"))
    for name in ("drawing.jpg", "drawing.eps"):
        (tmp_path / name).write_text(text)
        with pytest.raises(ImageError, match="is not an image: expected one of the formats"):
            values(tmp_path / name)
    with Image.open(tmp_path / "drawing.eps") as image, pytest.raises(ImageError, match="found an EPS file"):
        values(image)
    assert not {".eps", ".pdf", ".mpg", ".h5"} & _image_suffixes() and {".mpo", ".jp2", ".avif"} <= _image_suffixes()


def test_errors_name_the_file(tmp_path):
    Image.fromarray(np.full((8, 8), 1.5, np.float32)).save(tmp_path / "a.tif")
    Image.new("RGB", (1, 10_000)).save(tmp_path / "strip.png")
    for name, message in (("a.tif", "The range of the image is not known"), ("strip.png", "The image of 1 x 10000")):
        with pytest.raises(ImageError, match=rf"^{re.escape(str(tmp_path / name))}: {message}"):
            LevitImageProcessor()(tmp_path / name)


def test_closed_images_raise(tmp_path):
    image = Image.new("RGB", (8, 8))
    image.save(tmp_path / "a.png")
    image.close()
    with (tmp_path / "a.png").open("rb") as file:
        lazy = Image.open(file)
    for closed in (image, lazy):
        with pytest.raises(ImageError, match="The PIL image is closed: expected an open image"):
            LevitImageProcessor()(closed)


def test_premultiplied_gray_images_are_read():
    assert values(Image.new("La", (8, 8), (0, 255))).max() == values(Image.new("L", (8, 8))).max()


def test_result_passes_through_transformations():
    jax = pytest.importorskip("jax")
    inputs = LevitImageProcessor(do_normalize=False)(np.full((8, 8, 3), 255, np.uint8), return_tensors="jax")
    assert jax.jit(lambda inputs: inputs["pixel_values"].min())(inputs) == 1
    doubled = jax.tree.map(lambda leaf: 2 * leaf, inputs)
    assert doubled.pixel_values.max() == 2 and type(doubled) is type(inputs)
