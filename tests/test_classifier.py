"""Pictures in, labels out, with the model that comes with the package."""

import json

import jax
import numpy as np
import pytest

import levit_flax as lf
from configs import SMALL, random_variables
from levit_flax.checkpoint import EMBEDDED_DIRECTORY, resolve
from levit_flax.convert import conversion, sources, verification


@pytest.fixture(scope="module")
def classifier():
    return lf.ImageClassifier.from_pretrained("cifar10", batch_size=4)


def make(**fields):
    model = lf.LevitForImageClassification(lf.LevitConfig(**{**SMALL, **fields}), precision="highest")
    return lf.ImageClassifier(model, jax.device_put(random_variables(model)))


def pictures(count, size=40):
    return list(np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8))


def test_the_embedded_model_computes_what_pytorch_computed():
    converted = conversion.convert(sources.open_source(EMBEDDED_DIRECTORY))
    with np.load(EMBEDDED_DIRECTORY / "probe.npz") as probe:
        result = verification.forward(converted.model, converted.variables, probe["pixel_values"])
        comparison = verification.compare(result, probe["logits"])
    assert comparison.passed, comparison


def test_the_embedded_model_is_small_and_described():
    weights = EMBEDDED_DIRECTORY / "model.safetensors"
    assert weights.stat().st_size <= 3_000_000
    metrics = json.loads((EMBEDDED_DIRECTORY / "metrics.json").read_text())
    assert metrics["bytes"] == weights.stat().st_size
    assert metrics["top1"] >= 0.75
    assert f"{metrics['top1']:.2%}" in (EMBEDDED_DIRECTORY / "README.md").read_text()
    assert resolve("cifar10").directory == EMBEDDED_DIRECTORY


def test_answers_are_sorted_labels_and_scores(classifier):
    answers = classifier(pictures(5), top_k=3)
    assert [len(answer) for answer in answers] == [3] * 5
    for answer in classifier(pictures(2), top_k=100):
        scores = [entry["score"] for entry in answer]
        assert len(scores) == 10 and scores == sorted(scores, reverse=True)
        assert sum(scores) == pytest.approx(1, abs=1e-5)
        assert {entry["label"] for entry in answer} == set(classifier.model.config.id2label)
    [single] = classifier(pictures(1)[0], top_k=1)
    assert type(single[0]["score"]) is float and type(single[0]["label"]) is str


def test_batches_do_not_change_answers_and_compile_few_shapes(classifier):
    many = classifier(pictures(7), top_k=10)
    for i, picture in enumerate(pictures(7)):
        [alone] = classifier(picture, top_k=10)
        for entry, other in zip(alone, many[i], strict=True):
            assert entry["label"] == other["label"] and entry["score"] == pytest.approx(other["score"], abs=1e-5)
    assert classifier._scores._cache_size() <= 3  # 1, 2 and 4


def test_scores_follow_the_problem_type():
    picture = pictures(1)[0]
    softmax, sigmoid, raw = (
        make(problem_type=kind)(picture)[0]
        for kind in ("single_label_classification", "multi_label_classification", "regression")
    )
    assert [entry["label"] for entry in softmax] == [entry["label"] for entry in sigmoid] == [e["label"] for e in raw]
    logits = np.array([entry["score"] for entry in raw])
    np.testing.assert_allclose([e["score"] for e in softmax], np.exp(logits) / np.exp(logits).sum(), rtol=1e-4)
    np.testing.assert_allclose([e["score"] for e in sigmoid], 1 / (1 + np.exp(-logits)), rtol=1e-4)


def test_wrong_calls(classifier):
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        classifier(pictures(1), top_k=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        lf.ImageClassifier(classifier.model, classifier.variables, batch_size=0)
    with pytest.raises(ValueError, match="This model has no classifier"):
        lf.ImageClassifier(lf.LevitModel(classifier.model.config), {})
