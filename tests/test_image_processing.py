"""The image processor against transformers, bit by bit, and against numbers computed by hand."""

import warnings

import numpy as np
import pytest
from PIL import Image

from image_samples import SEED, assert_same_bits, make_image, random_levels
from levit_flax.image_processing import LevitImageProcessor

pytestmark = pytest.mark.filterwarnings("error")

SHORT_SWEEP = 150
FULL_SWEEP = 10_000
# transformers raises in some random cases, for example for a float image with fractions above 1. They prove nothing, so
# most cases must be of another kind.
LEAST_COMPARED = 0.8


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
        if not convert and getattr(image, "mode", None) == "1":
            continue  # transformers takes its pixels for levels 0 and 1, which is black
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
