"""The figures show what the model computes."""

import numpy as np
import pytest
from PIL import Image

import levit_flax as lf
from configs import SMALL, TINY, compiled, random_variables
from levit_flax.cli import main

pytest.importorskip("matplotlib")

from levit_flax import visualize


@pytest.fixture(scope="module")
def loaded():
    model = lf.LevitForImageClassificationWithTeacher(
        lf.LevitConfig(**{**SMALL, "depths": (1, 1, 1), "image_size": (64, 96)}), precision="highest"
    )
    return model, random_variables(model)


@pytest.fixture(scope="module")
def pixel_values():
    return np.random.default_rng(0).standard_normal((1, 64, 96, 3), np.float32)


def test_attention_maps_are_attention_weights(loaded, pixel_values):
    model, variables = loaded
    maps = visualize.attention_maps(model, variables, pixel_values)
    stages = (["stage_0/block_0"], ["stage_1/block_0"], ["stage_2/block_0"])
    assert list(maps) == [*stages[0], "downsample_0", *stages[1], "downsample_1", *stages[2]]
    assert maps["stage_0/block_0"].shape == (1, 4, 6) and maps["downsample_1"].shape == (4, 2, 3)
    for heat in maps.values():
        np.testing.assert_allclose(heat.sum((1, 2)), 1, rtol=1e-5)
    out = compiled(model, output_attentions=True)(variables, pixel_values)
    corner = visualize.attention_maps(model, variables, pixel_values, query=(0.99, 0.0))
    np.testing.assert_allclose(
        corner["stage_0/block_0"].reshape(1, -1), out.attentions[0][0, :, 18], rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(corner["downsample_0"].reshape(2, -1), out.attentions[1][0, :, 3], rtol=1e-4, atol=1e-6)


def test_bias_tables_hold_the_bias_of_each_offset(loaded):
    model, variables = loaded
    images = visualize.bias_tables(model, variables)
    image = images["stage_0/block_0"]
    table = variables["params"]["stage_0"]["block_0"]["attention"]["attention_biases"].reshape(4, 6, 1)
    assert image.shape == (1, 7, 11)
    for dy, dx in ((0, 0), (-3, 2), (1, -5), (2, 5)):
        assert image[0, 3 + dy, 5 + dx] == table[abs(dy), abs(dx), 0]


def test_mean_of_a_class_activation_map_is_the_logit(loaded, pixel_values):
    model, variables = loaded
    logits = np.asarray(compiled(model)(variables, pixel_values).logits)
    for label in (0, 3):
        heat = visualize.class_activation_map(model, variables, pixel_values, label)
        assert heat.shape == (1, 1, 2)
        np.testing.assert_allclose(heat.mean((1, 2)), logits[:, label], rtol=1e-4, atol=1e-5)
    best = visualize.class_activation_map(model, variables, pixel_values)
    np.testing.assert_allclose(best.mean((1, 2)), logits.max(-1), rtol=1e-4, atol=1e-5)


def test_saliency_is_the_gradient(loaded, pixel_values):
    """Finite differences at the pixel with the largest saliency agree with it."""
    model, variables = loaded

    def logit(x):
        return float(compiled(model)(variables, x).logits[0, 3])

    found = visualize.saliency(model, variables, pixel_values, label=3)
    assert found.shape == (1, 64, 96) and (found >= 0).all()
    y, x = np.unravel_index(found[0].argmax(), found[0].shape)
    changes = []
    for channel in range(3):
        step = np.zeros_like(pixel_values)
        step[0, y, x, channel] = 0.01
        changes.append(abs(logit(pixel_values + step) - logit(pixel_values - step)) / 0.02)
    assert max(changes) == pytest.approx(found[0, y, x], rel=0.05)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    directory = tmp_path_factory.mktemp("small") / "model"
    fields = {**SMALL, "depths": (1, 1, 1), "num_labels": 2, "id2label": ("airplane", "cat")}
    model = lf.LevitForImageClassification(lf.LevitConfig(**fields))
    lf.save_pretrained(directory, model, random_variables(model))
    return str(directory)


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("small", ["--label", "cat"]),
        pytest.param("cifar10", ["--label", "cat"], marks=pytest.mark.slow),
        pytest.param("cifar10", ["--biases"], marks=pytest.mark.slow),
    ],
)
def test_command_writes_figures(name, extra, small, capsys, tmp_path):
    model = small if name == "small" else name
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 50, 3), np.uint8)).save(tmp_path / "noise.png")
    out = tmp_path / "out.png"
    image = [] if "--biases" in extra else [str(tmp_path / "noise.png")]
    assert main(["explain", *image, "-m", model, "-o", str(out), *extra]) == 0
    with Image.open(out) as image:
        assert min(image.size) > 400 and np.asarray(image.convert("L")).std() > 10
    assert main(["explain", str(tmp_path / "noise.png"), "-m", model, "-o", "x.png", "--label", "yak"]) == 1
    assert "error: The model has no class 'yak': its classes are airplane" in capsys.readouterr().err
    assert main(["explain", str(tmp_path / "none.png"), "-m", model, "-o", "x.png"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["noise.png", "-o", "x.txt"], "expected a file name that ends in png, jpg, pdf, svg, found x.txt"),
        (["noise.png", "-o", "x.png", "--biases"], "expected an image, or --biases without an image"),
        (["-o", "x.png"], "expected an image, or --biases without an image"),
    ],
)
def test_wrong_arguments_of_the_command_exit_with_2(arguments, message, capsys):
    assert main(["explain", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_figure_has_the_format_of_its_name(small, tmp_path):
    assert main(["explain", "-m", small, "--biases", "-o", str(tmp_path / "biases.jpg")]) == 0
    with Image.open(tmp_path / "biases.jpg") as image:
        assert image.format == "JPEG"


def test_curves_of_a_single_evaluation_show_its_values():
    figure = visualize.draw_curves([{"epoch": 3, "train_loss": 0.5, "validation_loss": 0.25, "learning_rate": 1e-3}])
    loss, rate = figure.axes
    assert [text.get_text() for text in loss.texts] == ["0.5", "0.25"]
    assert [text.get_text() for text in rate.texts] == ["0.001"] and list(rate.get_xticks()) == [3]


def test_confusion_leaves_empty_cells_blank():
    confusion = np.diag(np.full(10, 1000))
    confusion[0, 1] = 4  # rounds to 0 %
    figure = visualize.draw_confusion(confusion, list("abcdefghij"))
    assert [text.get_text() for text in figure.axes[0].texts] == ["100"] * 10


@pytest.mark.parametrize(("panels", "columns"), [(12, 4), (15, 5), (18, 6)])  # of the embedded and published models
def test_explain_leaves_no_cell_empty(panels, columns):
    assert visualize._columns(panels) == columns and panels % columns == 0


def test_dollar_signs_in_names_are_drawn_literally(tmp_path):
    names = ("$10 bill", "a_$b", r"$\frac$")
    figure = visualize.draw_confusion(np.eye(3, dtype=np.int64), names)
    figure.savefig(tmp_path / "confusion.png")
    model = lf.LevitForImageClassification(lf.LevitConfig(**TINY).replace(id2label=names))
    classifier = lf.ImageClassifier(model, random_variables(model), fast_start=True)
    visualize.explain(classifier, Image.new("RGB", (40, 40)), names[2]).savefig(tmp_path / "explain.png")


@pytest.mark.parametrize("label", [99, -1])
@pytest.mark.parametrize("function", [visualize.saliency, visualize.class_activation_map])
def test_labels_that_are_no_class_raise(loaded, pixel_values, function, label):
    count = loaded[0].config.num_labels
    with pytest.raises(ValueError, match=f"expected 0 to {count - 1}, found {label!r}"):
        function(*loaded, pixel_values, label=label)


@pytest.mark.parametrize(("shape", "labels"), [((2, 3), "ab"), ((2, 2), "a"), ((3,), "abc")])
def test_confusion_matrices_that_do_not_fit_raise(shape, labels):
    with pytest.raises(ValueError, match="The confusion matrix does not fit the labels"):
        visualize.draw_confusion(np.ones(shape, np.int64), list(labels))
