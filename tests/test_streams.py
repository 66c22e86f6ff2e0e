"""Datasets that are read in order: Hugging Face streaming and WebDataset."""

import io
import json

import numpy as np
import pytest
from dataset_copies import copy_to_parquet, copy_to_records, copy_to_tar, write_tar
from PIL import Image
from training_runs import run, tiny_recipe

import levit_flax as lf
from levit_flax.data_sources import _read_images, _read_part
from levit_flax.datasets import DataError, _DataOptions
from levit_flax.evaluation import evaluate, read_data
from levit_flax.streams import LabeledStream
from levit_flax.webdataset import _expand

CLASSES = ("airplane", "bird", "truck")  # 0, 2 and 9 of the embedded model
INDICES = (0, 2, 9)
ROUNDING = 1e-5  # streams are compiled for more images than this folder has


@pytest.fixture(scope="module")
def classifier():
    return lf.ImageClassifier.from_pretrained("cifar10", batch_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (directory / name).mkdir()
        for i in range(3):
            pixels = generator.integers(0, 256, (40, 50, 3), np.uint8)
            Image.fromarray(pixels).save(directory / name / f"{i}.png")
    return directory


@pytest.fixture
def source(request, folder, tmp_path, monkeypatch):
    """The images of the folder in another form."""
    if request.param == "records":
        pytest.importorskip("tensorflow_datasets")
        monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
        return copy_to_records({"test": folder}, tmp_path)
    pytest.importorskip("datasets")
    parquet = copy_to_parquet({"test": folder}, tmp_path / "zoo")
    return parquet if request.param == "parquet" else parquet.replace("hfds/", "hfids/")


SOURCES = pytest.mark.parametrize("source", ["parquet", "streamed", "records"], indirect=True)


@SOURCES
def test_every_source_has_the_metrics_of_the_folder(classifier, folder, source):
    labels = classifier.model.config.id2label
    wanted, data = evaluate(classifier, read_data(folder, labels)), read_data(source, labels)
    assert isinstance(data, LabeledStream) == source.startswith("hfids/") and data.labels == labels
    found = evaluate(classifier, data)
    assert (found.images, found.loss) == (wanted.images, wanted.loss)
    np.testing.assert_array_equal(found.confusion, wanted.confusion)


@SOURCES
def test_every_source_is_evaluated_and_classified_by_the_commands(capsys, folder, source):
    reports = []
    for data in (folder, source):
        status, out, _ = run(capsys, "evaluate", data, "-m", "cifar10", "--json", "--batch-size", 4)
        assert status == 0
        reports.append(json.loads(out)["loss"])
    assert reports[0] == pytest.approx(reports[1], abs=ROUNDING)
    answers = []
    for paths in ([folder], [source]):
        status, out, _ = run(capsys, "classify", *paths, "-m", "cifar10", "--json")
        assert status == 0
        answers.append(json.loads(out))
    assert [answer["file"] for answer in answers[1]] == [f"{source}/test/{i}" for i in range(9)]
    by_label = [
        [{each["label"]: each["score"] for each in answer["predictions"]} for answer in part] for part in answers
    ]
    for first, second in zip(*by_label, strict=True):
        assert first == pytest.approx(second, abs=1e-5)  # batches of other sizes


def test_webdataset_has_the_metrics_of_the_folder(classifier, folder, tmp_path, capsys):
    source = copy_to_tar(folder, tmp_path / "shards")
    wanted = evaluate(classifier, read_data(folder, CLASSES[:1] + classifier.model.config.id2label[1:]))
    data = _read_part(source, _DataOptions())
    rows = [(f"frame {key}", image, INDICES[target]) for key, image, target in data.rows]
    assert [target for *_, target in rows] == [index for index in INDICES for _ in range(3)]
    found = evaluate(classifier, LabeledStream(rows))
    assert (found.images, found.loss) == (wanted.images, wanted.loss)
    np.testing.assert_array_equal(found.confusion, wanted.confusion)
    status, out, _ = run(capsys, "evaluate", source, "-m", "cifar10", "--json")
    assert status == 0 and json.loads(out)["images"] == 9
    status, out, _ = run(capsys, "classify", source, "-m", "cifar10", "--json")
    names = [f"{tmp_path}/shards/zoo-{shard:02}.tar/{i:04}" for shard, count in ((0, 4), (1, 5)) for i in range(count)]
    assert status == 0 and [answer["file"] for answer in json.loads(out)] == names


def test_options_of_datasets_need_a_dataset(folder, capsys):
    for option in ("--split", "--data-revision", "--image-column"):
        status, out, err = run(capsys, "classify", folder, option, "name", "-m", "cifar10")
        assert status == 2 and out == "" and "expected a dataset, such as hfds/NAME" in " ".join(err.split())


def test_streams_cannot_be_shuffled(folder, tmp_path):
    pytest.importorskip("grain")
    from levit_flax.training import read_images

    for source in (copy_to_tar(folder, tmp_path / "shards"), "hfids/zoo"):
        with pytest.raises(DataError, match=r"^(wds|hfids)/.* is read in order and cannot be shuffled: "):
            read_images(source, tiny_recipe())


def png(level=0):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 0, 0)).save(file, "PNG")
    return file.getvalue()


def rows_of(source, **options):
    return list(_read_part(source, _DataOptions(**options)).rows)


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("{a}.tar", ["{a}.tar"]),
    ],
)
def test_braces_are_expanded(pattern, paths):
    assert _expand(pattern) == paths


def test_samples_are_consecutive_files_of_one_name(tmp_path):
    files = {
        "x/1.cls": b"4\n",
        "x/1.seg.PNG.json": b"{}",
        "x/1.JPG": png(1),
        "x/2.json": b"{}",
        "x/2.txt": b"a dog",
        "y/2.jpeg": png(2),
        "y/2.cls": b" 3 ",
        "y/._2.cls": b"",
    }
    for name in ("a.tar", "b.tar.gz"):
        write_tar(tmp_path / name, files)
        source = f"wds/{tmp_path}/{name}"
        expected = [("x/1", png(1), 4), ("x/2", None, -1), ("y/2", png(2), 3)]
        assert rows_of(source) == [(f"{tmp_path}/{name}/{key}", *rest) for key, *rest in expected]
        assert [image for _, image in _read_images(source, _DataOptions())] == [png(1), None, png(2)]
    assert len(rows_of(f"wds/{tmp_path}")) == 3  # a directory stands for its files of the name *.tar
    assert len(rows_of(f"wds/{tmp_path}/*.tar*")) == 6


def test_columns_are_suffixes(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.left.png": png(1), "1.right.png": png(2), "1.fine": b"7", "1.coarse": b"2"})
    source = f"wds/{tmp_path}/a.tar"
    with pytest.raises(DataError, match=r"has no labels: .* \.cls of each sample, found \.left\.png, \.right\.png"):
        rows_of(source)
    with pytest.raises(DataError, match=r"^It is not clear which image to use: .*/a\.tar/1\. Choose one with"):
        rows_of(source, label_column="fine")
    assert [row[1:] for row in rows_of(source, label_column="fine", image_column="right.png")] == [(png(2), 7)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.tar", r"^wds/.*/nowhere\.tar names no tar files: expected some at .*/nowhere\.tar, found none\.$"),
        ("{0..1}.tar", r"names no tar files: expected some at .*/0\.tar, found none\.$"),
        ("no*.tar", r"names no tar files: expected some at .*/no\*\.tar, found none\.$"),
        ("empty.tar", r"empty\.tar contains no images: expected at least one\.$"),
        ("text.tar", r"text\.tar cannot be read after 0 images: "),
        ("words.tar", r"^The label of .*/words\.tar/1 is not a class index: .* in \.cls, found b'dog'\.$"),
    ],
)
def test_wrong_shards_are_one_sentence(tmp_path, name, message):
    write_tar(tmp_path / "empty.tar", {})
    write_tar(tmp_path / "words.tar", {"1.png": png(), "1.cls": b"dog"})
    (tmp_path / "text.tar").write_text("no tar file" * 100)
    with pytest.raises(DataError, match=message) as raised:
        rows_of(f"wds/{tmp_path}/{name}")
    assert "\n" not in str(raised.value)


def test_truncated_shard_is_an_error_after_the_images_before(tmp_path, capsys):
    files = {f"{i}.{suffix}": content for i in range(4) for suffix, content in (("png", png()), ("cls", b"0"))}
    whole = write_tar(tmp_path / "a.tar", files)
    whole.write_bytes(whole.read_bytes()[: 5 * 1024 + 600])  # ends in the content of the third label
    source = f"wds/{whole}"
    with pytest.raises(DataError, match=r"a\.tar cannot be read after 2 images: "):
        rows_of(source)
    status, out, err = run(capsys, "classify", source, "-m", "cifar10", "--json")
    assert (
        status == 1 and 1 <= len(json.loads(out)) <= 3 and err.startswith("error: wds/") and len(err.splitlines()) == 1
    )
    status, out, err = run(capsys, "evaluate", source, "-m", "cifar10", "--json")
    assert status == 1 and out == "" and err.startswith("error: wds/") and len(err.splitlines()) == 1


def test_samples_without_a_class_end_an_evaluation(classifier, tmp_path):
    write_tar(tmp_path / "a.tar", {"1.png": png(), "1.cls": b"3", "2.png": png(), "3.png": png(), "3.cls": b"10"})
    with pytest.raises(DataError, match=r"^The target of image .*/2 of wds/.* \[0, 10\), found -1\. Leave"):
        evaluate(classifier, read_data(f"wds/{tmp_path}/a.tar", classifier.model.config.id2label))


def test_damaged_images_of_a_stream_are_named(classifier, tmp_path):
    write_tar(tmp_path / "a.tar", {"1.png": png(), "1.cls": b"3", "2.png": b"no image", "2.cls": b"1", "3.cls": b"2"})
    result = evaluate(classifier, read_data(f"wds/{tmp_path}/a.tar", classifier.model.config.id2label))
    assert result.images == 1
    assert [text.partition(" of ")[0] for text in result.broken] == [f"image {tmp_path}/a.tar/{i}" for i in (2, 3)]


def test_integers_are_classes_if_they_are_asked_for(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "cls": datasets.Value("int64")})
    rows = [{"image": {"bytes": png(i), "path": None}, "cls": 7 - i} for i in range(3)]
    (tmp_path / "zoo").mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "zoo" / "test.parquet")
    for scheme in ("hfds", "hfids"):
        with pytest.raises(DataError, match=r"A column is missing: expected one of classes, "):
            _read_part(f"{scheme}/{tmp_path}/zoo", _DataOptions())
        data = _read_part(f"{scheme}/{tmp_path}/zoo", _DataOptions(label_column="cls"))
        assert data.labels == ()
        targets = data.targets.tolist() if scheme == "hfds" else [target for *_, target in data.rows]
        assert targets == [7, 6, 5]


def test_streamed_files_tell_their_columns_when_they_are_read(folder, tmp_path):
    pytest.importorskip("datasets")
    copy_to_tar(folder, tmp_path / "shards")
    source = f"hfids/{tmp_path}/shards"
    data = _read_part(source, _DataOptions("train", label_column="cls"))
    assert [target for *_, target in data.rows] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    with pytest.raises(DataError, match=r"^The Hugging Face dataset .* cannot be loaded: .*test"):
        _read_part(source, _DataOptions("test", label_column="cls"))
