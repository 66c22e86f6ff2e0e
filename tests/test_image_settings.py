"""Settings of the image processor: checks, overrides, files and the Hub."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from image_samples import FINE, assert_same_bits, make_image
from levit_flax.hub import _HubOptions
from levit_flax.image_processing import _PROCESSOR_FILE, LevitImageProcessor
from levit_flax.images import ImageError

pytestmark = pytest.mark.filterwarnings("error")


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
        ({"size": 20_000}, "size must be at most 4096 pixels, found 20000."),
        ({"crop_size": (3, 10**9)}, "crop_size must be at most 4096 pixels, found (3, 1000000000)."),
        ({"do_pad": True}, "LevitImageProcessor does not support do_pad: expected False, found True."),
        ({"crop_size": {"shortest_edge": 3}}, CROPS + "{'shortest_edge': 3}."),
        ({"crop_size": (3, -1)}, CROPS + "(3, -1)."),
        (
            {"resample": 9},
            "resample must be one of Pillow's filters {0: 'nearest', 1: 'lanczos', 2: 'bilinear', 3: 'bicub",
        ),
        ({"resample": [3]}, "resample must be one of Pillow's filters"),
        ({"resample": "cubic"}, "resample must be one of Pillow's filters"),
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
def test_invalid_settings_raise(setting, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)) as raised:
        LevitImageProcessor(**setting)
    assert not isinstance(raised.value, ImageError)
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        LevitImageProcessor()(FINE, **setting)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"image_mean": [0.5] * 5}, "image_mean must be one number, or one for each of the 3 channels, found 5."),
        ({"image_mean": [0.5]}, "image_std must be one number, or one for each of the 1 channels, found 3."),
        ({"image_std": [0.5] * 4}, "image_std must be one number, or one for each of the 3 channels, found 4."),
        ({"return_tensors": "tf"}, "return_tensors must be one of None, 'np', 'jax', 'pt', found 'tf'."),
        ({"data_format": "NHWC"}, "data_format must be one of None, 'channels_last', 'channels_first', found 'NHWC'."),
        (
            {"input_data_format": "x"},
            "input_data_format must be one of None, 'none', 'channels_last', 'channels_first', ",
        ),
    ],
)
def test_invalid_options_raise(option, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        LevitImageProcessor(size=16, crop_size=16)(FINE, **option)


def test_unknown_keywords_raise():
    with pytest.raises(TypeError, match="has no setting sizes"):
        LevitImageProcessor(sizes=3)
    with pytest.raises(TypeError, match="has no setting sizes"):
        LevitImageProcessor()(FINE, sizes=3)


def test_torch_tensors_without_torch_raise(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        ImportError,
        match=r'^return_tensors="pt" requires PyTorch, which is not installed\. Install torch, or use "jax" or "np"\.$',
    ):
        LevitImageProcessor()(FINE, return_tensors="pt")


def test_defaults_are_those_of_the_published_models():
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
    assert [path.name for path in (tmp_path / "new" / "model").iterdir()] == [_PROCESSOR_FILE]
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
            "The settings belong to another processor: expected LevitImageProcessor, found V",
        ),
        ({"do_pad": True}, "LevitImageProcessor does not support do_pad: expected False, found True."),
        ({"size": {"longest_edge": 9}}, "size must be a positive integer"),
    ],
)
def test_settings_of_another_processor_raise(settings, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        LevitImageProcessor.from_dict(settings)


def test_unknown_settings_warn():
    with pytest.warns(UserWarning, match=r"ignores unknown settings: \['bar', 'foo'\]"):
        assert vars(LevitImageProcessor.from_dict({"foo": 1, "bar": 2})) == vars(LevitImageProcessor())
    with pytest.raises(TypeError, match="has no setting foo"):
        LevitImageProcessor.from_dict({}, foo=1)


def test_wrong_values_in_a_file_raise_with_its_name(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    for text, message in (
        ('{"size": 1000000}', "size must be at most 4096 pixels"),
        ('{"image_processor_type": "ViTImageProcessor"}', "The settings belong to another processor"),
        (f'{{"size": {"9" * 5000}}}', "is not valid JSON"),
    ):
        path.write_text(text)
        for read in (LevitImageProcessor.from_json_file, lambda path: LevitImageProcessor.from_pretrained(path.parent)):
            with pytest.raises(
                ValueError, match=f"^{re.escape(str(path))} .*{message}|^{re.escape(str(path))} {message}"
            ):
                read(path)


@pytest.mark.parametrize("settings", [None, [1], "size"])
def test_settings_that_are_no_mapping_raise(settings):
    with pytest.raises(ValueError, match="The settings have the wrong type: expected a mapping, found a"):
        LevitImageProcessor.from_dict(settings)


@pytest.mark.parametrize("setting", [{"rescale_factor": 10**400}, {"image_std": 1e-320}, {"image_mean": float("inf")}])
def test_numbers_without_a_use_raise(setting):
    with pytest.raises(ValueError, match=r"must (be a finite number|not be zero)"):
        LevitImageProcessor(**setting)


def test_damaged_settings_files_raise(tmp_path):
    path = tmp_path / _PROCESSOR_FILE
    with pytest.raises(
        FileNotFoundError, match=re.escape(f"{tmp_path} is not a model directory: expected {_PROCESSOR_FILE}")
    ):
        LevitImageProcessor.from_pretrained(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="^" + re.escape(f"{path} is not valid JSON: ")):
        LevitImageProcessor.from_pretrained(tmp_path)
    path.write_text("[1]")
    with pytest.raises(
        ValueError, match="^" + re.escape(f"{path} is malformed: expected a JSON object, found an array.")
    ):
        LevitImageProcessor.from_pretrained(tmp_path)


def test_saving_over_a_file_raises_without_overwrite(tmp_path):
    path = tmp_path / _PROCESSOR_FILE
    LevitImageProcessor(size=10).save_pretrained(tmp_path)
    before = path.read_text()
    with pytest.raises(FileExistsError, match=re.escape(f"{path} already exists. Pass overwrite=True to replace it.")):
        LevitImageProcessor().save_pretrained(tmp_path)
    assert path.read_text() == before
    LevitImageProcessor().save_pretrained(tmp_path, overwrite=True)
    assert json.loads(path.read_text()) == LevitImageProcessor().to_dict()
    with pytest.raises(
        NotADirectoryError, match=re.escape(f"{path} is a file: expected a directory for {_PROCESSOR_FILE}.")
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

    def resolve(source: str, options: _HubOptions, **others: object) -> types.SimpleNamespace:
        asked.update(dataclasses.asdict(options), **others, source=source)
        return types.SimpleNamespace(directory=tmp_path)

    monkeypatch.setattr("levit_flax.image_processing._resolve", resolve)
    found = LevitImageProcessor.from_pretrained("someone/levit", revision="v1", token="secret", crop_size=5)
    assert (found.size, found.crop_size["height"]) == ({"shortest_edge": 10}, 5)
    assert asked == {
        "source": "someone/levit",
        "revision": "v1",
        "token": "secret",
        "cache_dir": None,
        "local_files_only": False,
        "subfolder": "",
        "files": (_PROCESSOR_FILE,),
    }


def test_neither_torch_nor_transformers_is_imported(tmp_path):
    make_image().save(tmp_path / "image.png")
    program = Path(__file__).parent / "programs" / "process_image.py"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, program, tmp_path / "image.png"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_none_means_the_default():
    nothing = dict.fromkeys(vars(LevitImageProcessor()))
    assert vars(LevitImageProcessor(**nothing)) == vars(LevitImageProcessor())
    processor = LevitImageProcessor(size=20, crop_size=10)
    image = make_image()
    found = processor(image, **nothing, return_tensors="np").pixel_values
    assert_same_bits(found, processor(image, return_tensors="np").pixel_values)


def test_result_has_attributes_and_unpacks():
    inputs = LevitImageProcessor(size=20, crop_size=10)(make_image(), return_tensors="np", data_format=None)
    assert inputs.pixel_values is inputs["pixel_values"] and {**inputs} == dict(inputs)
    assert inputs.pixel_values.shape == (1, 10, 10, 3)
    with pytest.raises(AttributeError, match="The result has no labels: it has pixel_values"):
        _ = inputs.labels


def test_filters_are_accepted_by_name():
    assert LevitImageProcessor(resample="bicubic").resample == LevitImageProcessor().resample
    assert LevitImageProcessor(resample="LANCZOS").resample == 1


def test_arrays_without_channel_axis_have_a_format_of_their_own():
    gray = np.asarray(make_image("L"))
    processor = LevitImageProcessor(size=20, crop_size=10)
    found = processor(gray, return_tensors="np", input_data_format="none")
    assert_same_bits(found["pixel_values"], processor(gray, return_tensors="np")["pixel_values"])


def test_json_files_round_trip(tmp_path):
    processor = LevitImageProcessor(size=30, crop_size=(20, 10), image_mean=0.5)
    processor.to_json_file(tmp_path / "processor.json")
    assert vars(LevitImageProcessor.from_json_file(tmp_path / "processor.json")) == vars(processor)
    assert (tmp_path / "processor.json").read_text() == processor.to_json_string()
    assert processor.save_pretrained(tmp_path / "new") == [str(tmp_path / "new" / _PROCESSOR_FILE)]
    assert vars(LevitImageProcessor.from_pretrained(tmp_path, subfolder="new")) == vars(processor)


HARMLESS = {
    "do_pad": None,
    "pad_size": None,
    "device": "cpu",
    "disable_grouping": True,
    "image_seq_length": None,
    "default_to_square": False,
}


def test_harmless_settings_of_transformers_are_ignored():
    image = make_image()
    expected = LevitImageProcessor(size=20, crop_size=10)(image, return_tensors="np").pixel_values
    for name, value in HARMLESS.items():
        processor = LevitImageProcessor(size=20, crop_size=10, **{name: value})
        assert_same_bits(processor(image, return_tensors="np").pixel_values, expected)
        plain = LevitImageProcessor(size=20, crop_size=10)
        assert_same_bits(plain(image, return_tensors="np", **{name: value}).pixel_values, expected)
