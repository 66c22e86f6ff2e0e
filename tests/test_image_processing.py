"""The image processor: bits against transformers, golden numbers without it, every kind of image, every bad input."""

import dataclasses
import io
import json
import os
import re
import struct
import subprocess
import sys
import types
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from levit_flax.hub import HubOptions
from levit_flax.image_processing import PROCESSOR_FILE, LevitImageProcessor
from levit_flax.images import ImageError, load_image

pytestmark = pytest.mark.filterwarnings("error")

SEED = 20210402
SHORT_SWEEP = 150
FULL_SWEEP = 10_000
# Some random cases are such that transformers raises (a float image with fractions above 1, a scalar mean for a shape
# that it cannot read, ...). They prove nothing, so most must not be of that kind.
LEAST_COMPARED = 0.8


def random_levels(seed: int = SEED, height: int = 40, width: int = 50, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def make_image(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(random_levels()).convert(mode)


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert np.ascontiguousarray(ours).tobytes() == np.ascontiguousarray(theirs).tobytes()


# --- against transformers -------------------------------------------------------------------------


@pytest.fixture
def theirs() -> type:
    pytest.importorskip("torchvision")
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    return transformers.LevitImageProcessorPil


def random_array(rng: np.random.Generator) -> np.ndarray:
    """An image of any layout and type that transformers may accept."""
    height, width = (int(side) for side in rng.integers(1, 70, 2))
    channels = int(rng.choice([1, 3, 3, 3, 4]))
    levels = rng.integers(0, 256, (height, width, channels))
    kinds = "uint8 uint8 uint8 int64 uint16 whole nearly_whole float16 float32 float64 wide".split()
    kind = str(rng.choice(kinds))
    if kind in ("uint8", "int64", "uint16"):
        array = levels.astype(kind)
    elif kind == "whole":
        array = levels.astype(np.float32)
    elif kind == "nearly_whole":
        array = np.minimum(levels * (1 + rng.uniform(0, 5e-6, levels.shape)), 255)  # np.allclose calls it whole
    elif kind == "wide":
        array = rng.normal(size=levels.shape)
    else:
        array = (levels / 255).astype(kind)
    return np.moveaxis(array, -1, 0) if rng.random() < 0.5 else array


def random_image(rng: np.random.Generator) -> Image.Image:
    height, width = (int(side) for side in rng.integers(1, 70, 2))
    levels = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
    mode = str(rng.choice(["RGB", "RGB", "RGB", "L", "P", "1", "LA", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "RGBX"]))
    image = Image.fromarray(levels).convert("RGB").convert(mode) if mode != "RGBA" else Image.fromarray(levels)
    if mode in ("P", "L", "RGB") and rng.random() < 0.3:
        image.info["transparency"] = {"P": 3, "L": 77, "RGB": (1, 2, 3)}[mode]
    return image


def random_size(rng: np.random.Generator, shortest_edge: bool) -> object:
    a, b = (int(side) for side in rng.integers(1, 60, 2))
    forms = [a, (a, b), [a, b], {"height": a, "width": b}]
    return forms[rng.integers(4)] if not shortest_edge or rng.random() < 0.5 else {"shortest_edge": a}


def random_options(rng: np.random.Generator, channels: int) -> dict[str, object]:
    options = {
        "do_resize": bool(rng.random() < 0.8),
        "size": random_size(rng, shortest_edge=True),
        "resample": int(rng.integers(0, 6)),
        "do_center_crop": bool(rng.random() < 0.7),
        "crop_size": random_size(rng, shortest_edge=False),
        "do_rescale": bool(rng.random() < 0.7),
        "rescale_factor": float(rng.choice([1 / 255, 1 / 127.5, 0.3])),
        "do_normalize": bool(rng.random() < 0.7),
        "image_mean": [rng.random(channels).tolist(), 0.5][rng.integers(2)],
        "image_std": [rng.uniform(0.1, 1, channels).tolist(), 0.25][rng.integers(2)],
    }
    return {name: value for name, value in options.items() if rng.random() < 0.6}


def compare_with_transformers(theirs: type, count: int, seed: int) -> None:
    compared = 0
    for case in range(count):
        rng = np.random.default_rng((seed, case))
        image = random_array(rng) if rng.random() < 0.5 else random_image(rng)
        convert = bool(rng.random() < 0.8)
        options = random_options(rng, channels=3)
        # Half of the settings are the processor's own, the other half are given with the call.
        own = {name: value for name, value in options.items() if rng.random() < 0.5} | {"do_convert_rgb": convert}
        call = {name: value for name, value in options.items() if name not in own}
        if isinstance(image, np.ndarray) and rng.random() < 0.3:
            call["input_data_format"] = "channels_first" if image.shape[0] in (1, 3, 4) else "channels_last"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                expected = theirs(**own)(image, **call)["pixel_values"][0]
            except ValueError:
                continue
            found = LevitImageProcessor(**own)(image, data_format="channels_first", **call)["pixel_values"][0]
        assert_same_bits(found, expected)
        compared += 1
    assert compared >= LEAST_COMPARED * count


def test_same_bits_as_transformers(theirs):
    compare_with_transformers(theirs, SHORT_SWEEP, SEED)


@pytest.mark.slow
def test_same_bits_as_transformers_in_the_full_sweep(theirs):
    compare_with_transformers(theirs, FULL_SWEEP, SEED + 1)


def test_same_bits_as_transformers_for_a_photograph_sized_batch(theirs):
    batch = [random_levels(1, 480, 640), random_levels(2, 333, 250), random_levels(3, 100, 90)]
    expected = theirs()(batch, return_tensors="np")["pixel_values"]
    found = LevitImageProcessor()(batch, return_tensors="np", data_format="channels_first")["pixel_values"]
    assert found.shape == (3, 3, 224, 224)
    assert_same_bits(found, expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "LA", "RGBA", "CMYK"])
def test_files_are_read_as_transformers_reads_them(theirs, tmp_path, mode):
    path = tmp_path / "image.tiff" if mode == "CMYK" else tmp_path / "image.png"
    image = make_image("RGB").convert(mode)
    if "A" in mode:
        image.putalpha(Image.fromarray(random_levels(7)[..., 0]))
    image.save(path)
    expected = theirs()(str(path), return_tensors="np")["pixel_values"]
    for given in (path, str(path)):
        found = LevitImageProcessor()(given, return_tensors="np", data_format="channels_first")["pixel_values"]
        assert_same_bits(found, expected)


@pytest.mark.parametrize("written_by", ["ours", "theirs", "theirs_torchvision"])
def test_the_settings_file_is_shared_with_transformers(theirs, tmp_path, written_by):
    transformers = pytest.importorskip("transformers")
    settings = {"size": 42, "crop_size": (30, 40), "resample": 2, "image_mean": [0.1, 0.2, 0.3], "do_convert_rgb": True}
    writers = {"ours": LevitImageProcessor, "theirs": theirs, "theirs_torchvision": transformers.LevitImageProcessor}
    writers[written_by](**settings).save_pretrained(tmp_path)
    ours = LevitImageProcessor.from_pretrained(tmp_path)
    expected = theirs(**settings)(make_image(), return_tensors="np")["pixel_values"]
    assert_same_bits(
        ours(make_image(), return_tensors="np", data_format="channels_first")["pixel_values"],
        expected,
    )
    assert_same_bits(theirs.from_pretrained(tmp_path)(make_image(), return_tensors="np")["pixel_values"], expected)
    opened = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(opened, transformers.LevitImageProcessor)
    assert dict(opened.size) == ours.size == {"shortest_edge": 42}
    assert dict(opened.crop_size) == ours.crop_size == {"height": 30, "width": 40}
    assert {name: getattr(opened, name) for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")} == {
        name: getattr(ours, name) for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
    }


# --- golden numbers, from first principles --------------------------------------------------------


# Rounded to float32 after every step in exact rational arithmetic, with Python's fractions.
GOLDEN_COLOR = "4f4da73f5aed91be16d86ebf"


def test_pixel_values_of_one_color():
    """(level / 255 - mean) / std for the color (200, 100, 50)."""
    pixels = LevitImageProcessor()(Image.new("RGB", (300, 260), (200, 100, 50)), return_tensors="np")["pixel_values"]
    assert pixels.shape == (1, 224, 224, 3)
    assert pixels.dtype == np.float32
    color = pixels[0, 0, 0]
    assert np.unique(pixels.reshape(-1, 3), axis=0).shape == (1, 3)
    assert color.tolist() == pytest.approx([1.3070468, -0.2850140, -0.9329847], abs=1e-6)
    assert color.tobytes().hex() == GOLDEN_COLOR


@pytest.mark.parametrize(
    ("height", "width", "size", "expected"),
    [
        (480, 640, 224, (256, 341)),
        (640, 480, 224, (341, 256)),
        (100, 101, 160, (182, 183)),
        (60, 60, {"shortest_edge": 288}, (329, 329)),
        (60, 90, {"shortest_edge": 18}, (20, 30)),
        (50, 20, {"height": 30, "width": 31}, (30, 31)),
        (50, 20, (30, 31), (30, 31)),
    ],
)
def test_resized_dimensions(height, width, size, expected):
    pixels = LevitImageProcessor(size=size, do_center_crop=False).resize_and_crop(Image.new("RGB", (width, height)))
    assert pixels.shape == (*expected, 3)
    assert pixels.dtype == np.uint8


def test_bicubic_levels():
    """A row of four levels doubled by Keys' cubic kernel (a = -0.5) at offsets 1/4 and 3/4, edges renormalized."""
    row = np.repeat(np.array([[0, 100, 200, 40]], dtype=np.uint8)[..., None], 3, axis=-1)
    processor = LevitImageProcessor(size=(1, 8), do_center_crop=False)
    near, far = 0.8671875, 0.2265625  # weights of the nearest sample and of the one on the other side
    outer = {1.25: -0.0703125, 1.75: -0.0234375}
    weights = np.array([outer[1.75], far, near, outer[1.25]])  # for a sample three quarters past the second neighbor
    padded = np.pad(row[0, :, 0].astype(float), 2, constant_values=np.nan)
    expected = []
    for target in range(8):
        first = (target + 1) // 2  # of the four neighbors, in the padded row
        neighbors, kernel = padded[first : first + 4], weights if target % 2 == 0 else weights[::-1]
        inside = ~np.isnan(neighbors)
        expected.append(np.sum(neighbors[inside] * kernel[inside]) / np.sum(kernel[inside]))
    expected = np.clip(np.floor(np.array(expected) + 0.5), 0, 255)
    assert processor.resize_and_crop(row, "channels_last")[0, :, 0].tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("length", "crop", "first"),
    [(8, 4, 2), (9, 4, 2), (8, 5, 1), (7, 7, 0), (4, 8, -2), (4, 9, -3), (5, 8, -2), (1, 4, -2)],
)
def test_center_crop(length, crop, first):
    """The first row kept is (length - crop) // 2, counted from the image's own first row; outside it is black."""
    rows = np.arange(1, length + 1, dtype=np.uint8)
    expected = [int(rows[row]) if 0 <= row < length else 0 for row in range(first, first + crop)]
    tall = np.broadcast_to(rows[:, None, None], (length, 6, 3))
    processor = LevitImageProcessor(do_resize=False, crop_size=(crop, 6))
    assert processor.resize_and_crop(tall, "channels_last")[:, 0, 0].tolist() == expected
    wide = np.swapaxes(tall, 0, 1)
    processor = LevitImageProcessor(do_resize=False, crop_size=(6, crop))
    assert processor.resize_and_crop(wide, "channels_last")[0, :, 0].tolist() == expected


def test_black_borders_are_black_before_normalization():
    pixels = LevitImageProcessor(do_resize=False, crop_size=3)(Image.new("RGB", (1, 1), "white"))["pixel_values"][0]
    assert pixels[0, 0].tolist() == pytest.approx([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    assert pixels[1, 1].tolist() == pytest.approx([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225])


def test_rescaling_and_normalizing_can_be_left_out():
    levels = random_levels(height=5, width=6)
    only = {"do_resize": False, "do_center_crop": False}
    neither = LevitImageProcessor(**only, do_rescale=False, do_normalize=False)(levels)["pixel_values"][0]
    assert_same_bits(neither, levels)
    rescaled = LevitImageProcessor(**only, do_normalize=False)(levels)["pixel_values"][0]
    assert_same_bits(rescaled, (levels / 255).astype(np.float32))
    normalized = LevitImageProcessor(**only, do_rescale=False, image_mean=127.5, image_std=51)(levels)["pixel_values"][
        0
    ]
    assert_same_bits(normalized, ((levels.astype(np.float32) - np.float32(127.5)) / np.float32(51)))


# --- kinds of images ----------------------------------------------------------------------------


def values(image: object, **options: object) -> np.ndarray:
    return LevitImageProcessor(size=16, crop_size=16)(image, return_tensors="np", **options)["pixel_values"]


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


def test_levels_beyond_sixteen_bits_are_refused():
    with pytest.raises(ImageError, match="not a 16-bit image: expected levels from 0 to 65535, found 0 to 70000"):
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
    assert caught[0].filename == __file__


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


# --- files ----------------------------------------------------------------------------------------


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
    assert_same_bits(np.asarray(load_image(path)), np.asarray(upright))
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
    image = load_image(path)
    path.unlink()
    assert image.mode == "RGB"
    assert_same_bits(np.asarray(image), random_levels())
    assert image.tobytes() != before


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1)])
def test_the_smallest_images(shape):
    assert values(Image.new("RGB", shape, "white")).shape == (1, 16, 16, 3)


def test_damaged_files_give_a_result_or_a_sentence(tmp_path):
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
                    assert str(path) in str(error) or "too large after resizing" in str(error)
                    refused += 1
    assert results > 20
    assert refused > 20


# --- bad input ------------------------------------------------------------------------------------


def test_a_missing_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"The image {tmp_path / 'no.jpg'} does not exist.")):
        values([make_image(), tmp_path / "no.jpg"])


def test_bad_files(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("This is not an image.\n" * 100)
    make_image().save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    for path, message in [
        (tmp_path, f"{tmp_path} is not a regular file: expected an image file, found a directory or a device."),
        (tmp_path / "empty.jpg", f"{tmp_path / 'empty.jpg'} is empty: expected an image file, found 0 bytes."),
        (tmp_path / "text.jpg", f"{tmp_path / 'text.jpg'} is not an image: expected a format that Pillow can read."),
        (
            tmp_path / "cut.jpg",
            f"{tmp_path / 'cut.jpg'} cannot be decoded and is probably damaged (image file is trunc",
        ),
    ]:
        with pytest.raises(ImageError, match="^" + re.escape(message)):
            load_image(path)
        with pytest.raises(ImageError, match=re.escape(message)):
            values(path)
    with Image.open(tmp_path / "cut.jpg") as lazy, pytest.raises(ImageError, match=r"^The PIL image cannot be decoded"):
        values(lazy)


@pytest.mark.parametrize("action", ["error", "ignore"])  # what the user does with Pillow's own warning
@pytest.mark.parametrize("limit", [1500, 900])  # Pillow warns above its limit, and raises above twice as many
def test_a_decompression_bomb(tmp_path, monkeypatch, limit, action):
    path = tmp_path / "bomb.png"
    make_image().save(path)  # 2,000 pixels
    assert load_image(path).size == (50, 40)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    expected = (
        f"^{re.escape(str(path))} is too large: expected at most {limit:,} pixels, found more. "
        "If you trust the file, raise PIL"
    )
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        with pytest.raises(ImageError, match=expected):
            load_image(path)


def test_a_tiny_file_that_claims_to_be_huge(tmp_path):
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + struct.pack(">I", 9) + b"IDAT"
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    with pytest.raises(ImageError, match=r"huge.png is too large: expected at most 89,478,485 pixels"):
        load_image(tmp_path / "huge.png")


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


FINE = random_levels(height=8, width=8)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ImageError, "There are no images: expected at least one, found an empty list or batch."),
        (
            np.zeros((0, 8, 8, 3), np.uint8),
            ImageError,
            "There are no images: expected at least one, found an empty list or batch.",
        ),
        (
            None,
            TypeError,
            "An image has the wrong type: expected a path, a PIL image, an array or a list of these, found NoneType.",
        ),
        (
            {"a": FINE},
            TypeError,
            "An image has the wrong type: expected a path, a PIL image, an array or a list of these, found dict.",
        ),
        (
            [FINE, 3],
            TypeError,
            "An image has the wrong type: expected a path, a PIL image, an array or a list of these, found int.",
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
            "An image array has the wrong number of channels: expected 1, 3 or 4 on the first or last axis, found "
            "shape (8, 8, 2).",
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
def test_bad_images(images, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        values(images)


def test_the_wrong_channel_order_is_refused():
    with pytest.raises(ImageError, match=re.escape("channels: expected 1, 3 or 4, found [H W C] shape (8, 3, 8).")):
        values(FINE, input_data_format="channels_first")
    with pytest.raises(
        ImageError, match=re.escape("cannot be resized: expected at most 4 channels, found [H W C] shape")
    ):
        values(FINE, input_data_format="channels_first", do_convert_rgb=False)


def test_a_ragged_batch_cannot_be_stacked():
    expected = (
        "The images cannot be stacked: expected equal shapes, found [(18, 22, 3), (20, 18, 3)]. Crop them with "
        "do_center_crop=True, or pass return_tensors=None for a list."
    )
    images = [random_levels(), random_levels(height=56)]
    with pytest.raises(ImageError, match="^" + re.escape(expected)):
        LevitImageProcessor(size=16, do_center_crop=False)(images, return_tensors="np")


SIZES = 'size must be a positive integer, (height, width), {"height": h, "width": w} or {"shortest_edge": n}, found '
CROPS = 'crop_size must be a positive integer, (height, width), {"height": h, "width": w}, found '


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"size": {"longest_edge": 100}}, SIZES + "{'longest_edge': 100}."),
        ({"size": {"height": 100}}, SIZES + "{'height': 100}."),
        ({"size": {"shortest_edge": 9, "longest_edge": 20}}, SIZES),
        ({"size": 0}, SIZES + "0."),
        ({"size": True}, SIZES + "True."),
        ({"size": 22.4}, SIZES + "22.4."),
        ({"size": (1, 2, 3)}, SIZES + "(1, 2, 3)."),
        ({"size": None}, SIZES + "None."),
        ({"crop_size": None}, CROPS + "None."),
        ({"crop_size": {"shortest_edge": 3}}, CROPS + "{'shortest_edge': 3}."),
        ({"crop_size": (3, -1)}, CROPS + "(3, -1)."),
        (
            {"resample": 9},
            "resample must be one of Pillow's filters {0: 'nearest', 1: 'lanczos', 2: 'bilinear', 3: 'bicub",
        ),
        ({"resample": [3]}, "resample must be one of Pillow's filters"),
        ({"resample": "bicubic"}, "resample must be one of Pillow's filters"),
        ({"do_resize": None}, "do_resize must be True or False, found None."),
        ({"do_convert_rgb": 1}, "do_convert_rgb must be True or False, found 1."),
        ({"rescale_factor": "1/255"}, "rescale_factor must be a finite number, found '1/255'."),
        ({"rescale_factor": True}, "rescale_factor must be a finite number, found True."),
        ({"rescale_factor": float("nan")}, "rescale_factor must be a finite number, found nan."),
        ({"image_mean": "half"}, "image_mean must be a finite number, found 'half'."),
        ({"image_mean": [0.5, None, 0.5]}, "image_mean must be a finite number, found None."),
        (
            {"image_std": [0.5, 0, 0.5]},
            "image_std must not be zero, because pixels are divided by it, found [0.5, 0, ",
        ),
    ],
)
def test_bad_settings(setting, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)) as raised:
        LevitImageProcessor(**setting)
    assert not isinstance(raised.value, ImageError)
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        LevitImageProcessor()(FINE, **setting)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"image_mean": [0.5]}, "image_mean must be one number, or one for each of the 3 channels, found 1."),
        ({"image_std": [0.5] * 4}, "image_std must be one number, or one for each of the 3 channels, found 4."),
        ({"return_tensors": "tf"}, "return_tensors must be one of None, 'np', 'jax', 'pt', found 'tf'."),
        ({"data_format": "NHWC"}, "data_format must be one of 'channels_last', 'channels_first', found 'NHWC'."),
        ({"input_data_format": "x"}, "input_data_format must be one of None, 'channels_last', 'channels_first', found"),
    ],
)
def test_bad_options(option, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        LevitImageProcessor(size=16, crop_size=16)(FINE, **option)


def test_unknown_keywords():
    with pytest.raises(TypeError, match="unexpected keyword argument 'sizes'"):
        LevitImageProcessor(sizes=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'sizes'"):
        LevitImageProcessor()(FINE, sizes=3)


def test_torch_asked_for_where_there_is_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        ImportError,
        match=r'^return_tensors="pt" requires PyTorch, which is not installed\. Install torch, or use "jax" or "np"\.$',
    ):
        LevitImageProcessor()(FINE, return_tensors="pt")


# --- settings -------------------------------------------------------------------------------------


def test_defaults():
    assert LevitImageProcessor().to_dict() == {
        "image_processor_type": "LevitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": 224},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "do_convert_rgb": True,
    }
    assert "size={'shortest_edge': 224}" in repr(LevitImageProcessor())


def test_settings_of_a_call_replace_the_processors_own_for_that_call():
    processor = LevitImageProcessor(size=16, crop_size=16)
    before = processor.to_dict()
    overrides = {
        "size": (20, 24),
        "resample": Image.Resampling.NEAREST,
        "crop_size": np.int64(12),
        "rescale_factor": 1,
        "image_mean": np.array([0.1, 0.2, 0.3]),
        "image_std": 2,
    }
    found = processor(make_image(), **overrides)["pixel_values"][0]
    assert_same_bits(found, LevitImageProcessor(**overrides)(make_image())["pixel_values"][0])
    assert found.shape == (12, 12, 3)
    assert processor.to_dict() == before


def test_attributes_can_be_assigned_and_are_checked():
    processor = LevitImageProcessor(size=16)
    processor.crop_size = 12
    assert processor(make_image())["pixel_values"][0].shape == (12, 12, 3)
    processor.size = {"longest_edge": 3}
    with pytest.raises(ValueError, match=r"^size must be"):
        processor(make_image())


def test_settings_survive_the_disk(tmp_path):
    processor = LevitImageProcessor(size=(30, 40), crop_size=20, image_mean=0.5, resample=1, do_convert_rgb=False)
    processor.save_pretrained(tmp_path / "new" / "model")
    assert [path.name for path in (tmp_path / "new" / "model").iterdir()] == [PROCESSOR_FILE]
    assert vars(LevitImageProcessor.from_pretrained(tmp_path / "new" / "model")) == vars(processor)
    assert LevitImageProcessor.from_pretrained(str(tmp_path / "new" / "model"), crop_size=7).crop_size["width"] == 7
    assert vars(LevitImageProcessor.from_dict(processor.to_dict())) == vars(processor)


OLD_FEATURE_EXTRACTOR = {  # as the first published checkpoints have it
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "LevitFeatureExtractor",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "size": 224,
}
FAST_PROCESSOR = {  # as transformers 4.5x writes it
    **OLD_FEATURE_EXTRACTOR,
    "feature_extractor_type": None,
    "image_processor_type": "LevitImageProcessorFast",
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "rescale_factor": 1 / 255,
    "data_format": "channels_first",
    "default_to_square": False,
    "device": None,
    "disable_grouping": None,
    "do_convert_rgb": None,
    "do_pad": None,
    "input_data_format": None,
    "return_tensors": None,
}


@pytest.mark.parametrize("settings", [{}, OLD_FEATURE_EXTRACTOR, FAST_PROCESSOR])
def test_files_of_older_versions_are_read(settings):
    assert vars(LevitImageProcessor.from_dict(settings)) == vars(LevitImageProcessor())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"image_processor_type": "ViTImageProcessor"},
            "The settings are of another processor: expected LevitImageProcessor, found V",
        ),
        ({"do_pad": True}, "LevitImageProcessor does not support do_pad: expected False, found True."),
        ({"size": {"longest_edge": 9}}, "size must be a positive integer"),
    ],
)
def test_settings_of_something_else_are_refused(settings, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        LevitImageProcessor.from_dict(settings)


def test_unknown_settings_are_warned_of():
    with pytest.warns(UserWarning, match=r"ignores unknown settings: \['bar', 'foo'\]"):
        assert vars(LevitImageProcessor.from_dict({"foo": 1, "bar": 2})) == vars(LevitImageProcessor())
    with pytest.raises(TypeError, match="unexpected keyword argument 'foo'"):
        LevitImageProcessor.from_dict({}, foo=1)


def test_bad_settings_files(tmp_path):
    path = tmp_path / PROCESSOR_FILE
    with pytest.raises(
        FileNotFoundError, match=re.escape(f"{tmp_path} is not a model directory: expected {PROCESSOR_FILE}")
    ):
        LevitImageProcessor.from_pretrained(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="^" + re.escape(f"{path} is not valid JSON (")):
        LevitImageProcessor.from_pretrained(tmp_path)
    path.write_text("[1]")
    with pytest.raises(
        ValueError, match="^" + re.escape(f"{path} is malformed: expected a JSON object, found a list.")
    ):
        LevitImageProcessor.from_pretrained(tmp_path)


def test_saving_replaces_nothing_unasked(tmp_path):
    path = tmp_path / PROCESSOR_FILE
    LevitImageProcessor(size=10).save_pretrained(tmp_path)
    before = path.read_text()
    with pytest.raises(FileExistsError, match=re.escape(f"{path} already exists. Pass overwrite=True to replace it.")):
        LevitImageProcessor().save_pretrained(tmp_path)
    assert path.read_text() == before
    LevitImageProcessor().save_pretrained(tmp_path, overwrite=True)
    assert json.loads(path.read_text()) == LevitImageProcessor().to_dict()
    with pytest.raises(
        NotADirectoryError, match=re.escape(f"{path} is a file: expected a directory for {PROCESSOR_FILE}.")
    ):
        LevitImageProcessor().save_pretrained(path)


def test_a_failed_save_leaves_nothing_behind(tmp_path, monkeypatch):
    def full_disk(source: Path, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        LevitImageProcessor().save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_name_that_is_no_directory_is_looked_up_on_the_hub(tmp_path, monkeypatch):
    LevitImageProcessor(size=10).save_pretrained(tmp_path)
    asked = {}

    def resolve(source: str, options: HubOptions, **others: object) -> types.SimpleNamespace:
        asked.update(dataclasses.asdict(options), **others, source=source)
        return types.SimpleNamespace(directory=tmp_path)

    monkeypatch.setattr("levit_flax.image_processing.resolve", resolve)
    found = LevitImageProcessor.from_pretrained("someone/levit", revision="v1", token="secret", crop_size=5)
    assert (found.size, found.crop_size["height"]) == ({"shortest_edge": 10}, 5)
    assert asked == {
        "source": "someone/levit",
        "revision": "v1",
        "token": "secret",
        "cache_dir": None,
        "local_files_only": False,
        "files": (PROCESSOR_FILE,),
    }


def test_neither_torch_nor_transformers_is_imported(tmp_path):
    make_image().save(tmp_path / "image.png")
    script = (
        "import sys; from levit_flax.image_processing import LevitImageProcessor as P;"
        f"P()({str(tmp_path / 'image.png')!r}, return_tensors='np');"
        "print(sorted({'torch', 'torchvision', 'transformers', 'timm'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
