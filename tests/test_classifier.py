"""Classify images with the embedded model and with tiny ones."""

import io
import itertools
import json
import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import levit_flax as lf
from configs import TINY, random_variables
from levit_flax.convert import conversion, sources, verification
from levit_flax.hub import _EMBEDDED_DIRECTORY
from levit_flax.images import ImageError
from levit_flax.inference import _normalize
from levit_flax.loading import _resolve

# MiB that a stream of any length may add to the memory in use; readings differ by less than 3. An image takes 61 KiB at
# the model's size, so keeping the 256 images of the shorter test would add 15 MiB.
KEPT = 6
# MiB that the peak may grow by after the first images, extrapolated from the part of the stream in which it grew least.
# A leak grows in every part; a single part may grow by 30 MiB if other processes delay the threads.
GROWTH = 18

PROGRAMS = Path(__file__).parent / "programs"


@pytest.fixture(scope="module")
def classifier():
    return lf.ImageClassifier.from_pretrained("cifar10", batch_size=4)


def make(**fields):
    model = lf.LevitForImageClassification(lf.LevitConfig(**{**TINY, **fields}), precision="highest")
    return lf.ImageClassifier(model, jax.device_put(random_variables(model)))


def images(count, size=40):
    return list(np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8))


def test_the_embedded_model_computes_what_pytorch_computed():
    converted = conversion._convert(sources._open_source(_EMBEDDED_DIRECTORY))
    with np.load(_EMBEDDED_DIRECTORY / "probe.npz") as probe:
        result = verification._forward(converted.model, converted.variables, probe["pixel_values"])
        comparison = verification._compare(result, probe["logits"])
    assert comparison.passed, comparison


def test_the_embedded_model_is_small_and_described():
    weights = _EMBEDDED_DIRECTORY / "model.safetensors"
    assert weights.stat().st_size <= 3_000_000
    metrics = json.loads((_EMBEDDED_DIRECTORY / "metrics.json").read_text())
    assert metrics["bytes"] == weights.stat().st_size
    assert metrics["top1"] >= 0.75
    assert f"{metrics['top1']:.2%}" in (_EMBEDDED_DIRECTORY / "README.md").read_text()
    assert _resolve("cifar10").directory == _EMBEDDED_DIRECTORY


def test_answers_are_sorted_labels_and_scores(classifier):
    answers = classifier(images(5), top_k=3)
    assert [len(answer) for answer in answers] == [3] * 5
    for answer in classifier(images(2), top_k=100):
        scores = [entry["score"] for entry in answer]
        assert len(scores) == 10 and scores == sorted(scores, reverse=True)
        assert sum(scores) == pytest.approx(1, abs=1e-5)
        assert {entry["label"] for entry in answer} == set(classifier.model.config.id2label)
    single = classifier(images(1)[0], top_k=1)
    assert type(single[0]["score"]) is float and type(single[0]["label"]) is str


def test_batches_do_not_change_answers(classifier):
    many = classifier(images(7), top_k=10)
    for i, image in enumerate(images(7)):
        alone = classifier(image, top_k=10)
        for entry, other in zip(alone, many[i], strict=True):
            assert entry["label"] == other["label"] and entry["score"] == pytest.approx(other["score"], abs=1e-5)


def test_scores_follow_the_problem_type():
    image = images(1)[0]
    softmax, sigmoid, raw = (
        make(problem_type=kind)(image)
        for kind in ("single_label_classification", "multi_label_classification", "regression")
    )
    assert [entry["label"] for entry in softmax] == [entry["label"] for entry in sigmoid] == [e["label"] for e in raw]
    logits = np.array([entry["score"] for entry in raw])
    np.testing.assert_allclose([e["score"] for e in softmax], np.exp(logits) / np.exp(logits).sum(), rtol=1e-4)
    np.testing.assert_allclose([e["score"] for e in sigmoid], 1 / (1 + np.exp(-logits)), rtol=1e-4)


def test_images_are_normalized_on_the_device_as_by_the_processor(classifier):
    levels = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    for options in ({}, {"do_rescale": False}, {"do_normalize": False}, {"image_mean": 0.5, "image_std": 0.25}):
        processor = lf.LevitImageProcessor(**options)
        on_device = jax.jit(lambda pixels, p=processor: _normalize(pixels, p))(levels)
        np.testing.assert_allclose(on_device, processor.rescale_and_normalize(levels), rtol=1e-6, atol=1e-6)


def test_arrays_of_floats_and_bytes_agree(classifier):
    levels = images(1)[0]
    as_bytes, as_floats = classifier(levels), classifier(levels.astype(np.float32))
    assert [e["label"] for e in as_bytes] == [e["label"] for e in as_floats]
    np.testing.assert_allclose([e["score"] for e in as_bytes], [e["score"] for e in as_floats], atol=1e-4)


def test_streaming_reads_no_further_than_it_must(classifier):
    taken = []

    def endless():
        while True:
            taken.append(0)
            yield images(1)[0]

    stream = classifier.stream(endless(), top_k=1)
    first = [next(stream) for _ in range(10)]
    assert len({answer[0]["label"] for answer in first}) == 1 and len(taken) <= 10 + 4 * classifier.batch_size
    stream.close()


def measure_stream(tmp_path, method, warm, part, total):
    """Return the memory in use and the peaks, in MiB, of every part of a stream after the first `warm` images."""
    Image.fromarray(images(1, 100)[0]).save(tmp_path / "one.jpg")
    command = [
        sys.executable,
        PROGRAMS / "stream_memory.py",
        method,
        tmp_path / "one.jpg",
        *map(str, (warm, part, total)),
    ]
    # PYTHONMALLOC lets the C library account for Python's objects. The stream computes for longer than it compiles.
    environment = {**os.environ, "PYTHONMALLOC": "malloc", "JAX_DISABLE_MOST_OPTIMIZATIONS": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(f"MiB in use, and their peaks, after {warm} images and every {part} more:", done.stdout, sep="\n")
    return [list(map(float, line.split())) for line in done.stdout.splitlines()]


needs_glibc = pytest.mark.skipif(
    platform.libc_ver() < ("glibc", "2.33"), reason="the GNU C library reports the memory in use"
)


@needs_glibc
@pytest.mark.slow
def test_stream_releases_its_images(tmp_path):
    in_use, _ = measure_stream(tmp_path, "stream_logits", 224, 256, 736)
    assert in_use[-1] - in_use[0] < KEPT


@needs_glibc
@pytest.mark.measurement
@pytest.mark.parametrize(
    ("method", "warm", "part", "total"),
    [("stream_logits", 992, 1000, 4992), ("stream", 992, 1000, 4992), ("calls", 1_000, 2_000, 11_000)],
)
def test_memory_stays_flat_over_a_long_stream(method, warm, part, total, tmp_path):
    in_use, peaks = measure_stream(tmp_path, method, warm, part, total)
    assert in_use[-1] - in_use[0] < KEPT
    growths = [after - before for before, after in itertools.pairwise(peaks)]
    assert len(growths) * min(growths) < GROWTH


def test_any_number_of_images_compiles_two_shapes():
    model = lf.LevitForImageClassification(lf.LevitConfig(**TINY))
    classifier = lf.ImageClassifier(model, random_variables(model), batch_size=3, devices=jax.local_devices()[:1])
    for count in range(1, 7):
        assert classifier.logits(np.zeros((count, 32, 48, 3), np.uint8)).shape == (count, 5)
        assert sum(1 for _ in classifier.stream_logits(images(count))) == count
    assert sorted(size for size, _ in classifier._function._programs) == [1, 3]


def test_broken_images_in_a_stream(classifier, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    good = images(1)[0]
    results = list(classifier.stream_logits([good, tmp_path / "broken.jpg", good, tmp_path / "none.jpg", good]))
    assert [type(result).__name__ for result in results] == [
        "ndarray",
        "ImageError",
        "ndarray",
        "FileNotFoundError",
        "ndarray",
    ]
    np.testing.assert_allclose(results[0], results[4], rtol=1e-5, atol=1e-5)
    with pytest.raises(ImageError, match=r"Image 1 \(counted from 0\): .*broken\.jpg"):
        classifier([good, tmp_path / "broken.jpg"])


def test_a_processor_of_another_size_is_named(classifier):
    other = lf.ImageClassifier(classifier.model, classifier.variables, lf.LevitImageProcessor(size=64, crop_size=64))
    with pytest.raises(ValueError, match=r"expected \[H W C\] = \[144, 144, 3\], found \[64, 64, 3\]"):
        other(images(1))


def test_eight_devices_classify_like_one():
    path = os.pathsep.join(filter(None, [str(PROGRAMS.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, PROGRAMS / "eight_devices.py"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_wrong_arguments_raise(classifier):
    with pytest.raises(ValueError, match="top_k must be an integer of at least 1, found 0"):
        classifier(images(1), top_k=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        lf.ImageClassifier(classifier.model, classifier.variables, batch_size=0)
    with pytest.raises(ValueError, match="The model has no classifier"):
        lf.ImageClassifier(lf.LevitModel(classifier.model.config), {})


def test_one_image_gives_one_answer(classifier, tmp_path):
    image = images(1)[0]
    Image.fromarray(image).save(tmp_path / "image.png")
    path = tmp_path / "image.png"
    for one in (image, path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), Image.fromarray(image)):
        answer = classifier(one, top_k=2)
        assert [set(entry) for entry in answer] == [{"label", "score"}] * 2
    for several in ([image], image[None], [[image]], (image,)):
        [answer] = classifier(several, top_k=2)
        assert len(answer) == 2
    assert classifier([]) == []


def test_function_is_applied_to_the_logits(classifier):
    image = images(1)[0]
    raw, softmax, sigmoid = (
        {entry["label"]: entry["score"] for entry in classifier(image, top_k=10, function_to_apply=function)}
        for function in ("none", "softmax", "sigmoid")
    )
    total = sum(np.exp(list(raw.values())))
    for label, logit in raw.items():
        assert softmax[label] == pytest.approx(np.exp(logit) / total, abs=1e-5)
        assert sigmoid[label] == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-5)
    with pytest.raises(ValueError, match=r"function_to_apply must be one of .*, found 'tanh'"):
        classifier(image, function_to_apply="tanh")


def test_gray_model_classifies_files(tmp_path):
    model = lf.LevitForImageClassification(lf.LevitConfig(**{**TINY, "num_channels": 1, "image_size": 32}))
    classifier = lf.ImageClassifier(model, random_variables(model))
    color = Image.fromarray(images(1)[0])
    color.save(tmp_path / "color.png")
    color.convert("L").save(tmp_path / "gray.png")
    paths = [tmp_path / "color.png", tmp_path / "gray.png"]
    first, second = classifier(paths, function_to_apply="none")
    third, fourth = classifier([color, np.asarray(color.convert("L"))], function_to_apply="none")
    assert first == second == third == fourth


def test_missing_images_do_not_end_a_stream(classifier):
    results = list(classifier.stream_logits([images(1)[0], None, images(1)[0]]))
    assert [type(result).__name__ for result in results] == ["ndarray", "ImageError", "ndarray"]


def test_float_arrays_have_the_same_answer_as_levels():
    classifier = lf.ImageClassifier.from_pretrained("cifar10", batch_size=1, fast_start=True)
    levels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected, found = (next(classifier.stream_logits([image])) for image in (levels, levels / np.float32(255)))
    np.testing.assert_array_equal(found, expected)
