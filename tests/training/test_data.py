"""Data of a training run: which images it uses, and which rows each step sees."""

import os

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("grain")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tensorboardX")
pytest.importorskip("matplotlib")

from training_runs import (
    CLASSES,
    NOTHING,
    tiny_recipe,
)

import levit_flax as lf
from levit_flax.data_sources import _read_parts
from levit_flax.training import DataError, LabeledImages
from levit_flax.training.data import (
    _evaluation_batches,
    _find_images,
    _read_skip_list,
    _Shard,
    _skip_keys,
    _training_batches,
    _TrainingRows,
)
from levit_flax.training.run_directory import _fingerprint

# Images


def touch(directory, *names):
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return directory


def listed(images, root):
    """Return (path, class) of every image, in order."""
    names = [path.relative_to(root).as_posix() for path in images.images]
    return [(name, images.labels[target]) for name, target in zip(names, images.targets, strict=True)]


def test_images_are_found_by_suffix_at_any_depth(tmp_path):
    touch(
        tmp_path, "train/fly/b.png", "train/fly/a.JPG", "train/fly/c.txt", "train/fly/png", "train/fly/deep/er/d.webp"
    )
    touch(tmp_path, "train/ant/2.png", "train/ant/10.jpeg", "train/Bee/1.gif", "train/.cache/1.png", "train/1.png")
    touch(tmp_path, "train/ant/._2.png", "train/ant/.checkpoints/2.png")
    touch(tmp_path, "val/fly/1.png", "val/ant/1.png", "val/Bee/1.png", "elsewhere/yak/1.png")
    (tmp_path / "train" / "ant" / "folder.png").mkdir()
    train, validation = _find_images(tmp_path, tiny_recipe(), ())
    assert train.labels == validation.labels == ("Bee", "ant", "fly")
    assert listed(train, tmp_path / "train") == [
        ("Bee/1.gif", "Bee"),
        ("ant/10.jpeg", "ant"),
        ("ant/2.png", "ant"),
        ("fly/a.JPG", "fly"),
        ("fly/b.png", "fly"),
        ("fly/deep/er/d.webp", "fly"),
    ]
    assert [name for name, _ in listed(validation, tmp_path / "val")] == ["Bee/1.png", "ant/1.png", "fly/1.png"]


def test_validation_folder_has_four_names(tmp_path):
    names = [f"{name}/{i}.png" for name in CLASSES for i in range(3)]
    touch(tmp_path, *(f"train/{name}" for name in names))
    for part in ("test", "valid", "val", "validation"):  # each before the ones that are there already
        touch(tmp_path, f"{part}/ant/{part}.png", f"{part}/bee/1.png", f"{part}/cat/1.png")
        train, validation = _find_images(tmp_path, tiny_recipe(), ())
        assert [name for name, _ in listed(train, tmp_path / "train")] == names
        assert listed(validation, tmp_path)[0] == (f"{part}/ant/{part}.png", "ant") and len(validation) == 3
    (tmp_path / "validation" / "dog").mkdir()
    touch(tmp_path, "validation/dog/1.png")
    with pytest.raises(DataError, match=r"train has 3 classes and .*validation has 4: .* but only one has dog"):
        _find_images(tmp_path, tiny_recipe(), ())


def test_train_folder_alone_is_split(tmp_path):
    touch(tmp_path, *(f"train/{name}/{i}.png" for name in CLASSES for i in range(4)), "other/1.png")
    train, validation = _find_images(tmp_path, tiny_recipe(), ())
    assert (len(train), len(validation), train.labels) == (9, 3, CLASSES)


def test_share_of_each_class_is_held_back(tmp_path):
    counts = {"ant": 20, "bee": 11, "cat": 2}
    touch(tmp_path, *(f"{name}/{i}.png" for name, count in counts.items() for i in range(count)))
    chosen = []
    for seed in (3, 3, 4):
        train, validation = _find_images(tmp_path, tiny_recipe(validation_share=0.25, seed=seed), ())
        rest, back = listed(train, tmp_path), listed(validation, tmp_path)
        assert sorted(rest + back) == sorted((f"{c}/{i}.png", c) for c, count in counts.items() for i in range(count))
        assert [[label for _, label in back].count(name) for name in CLASSES] == [5, 3, 1]
        chosen.append((rest, back))
    assert chosen[0] == chosen[1] != chosen[2]
    assert [int(name.split("/")[1][:-4]) for name, _ in chosen[0][1][:5]] != list(range(5))  # at random
    train, validation = _find_images(tmp_path, tiny_recipe(validation_share=0.9), ())
    assert train.targets.tolist() == [0, 0, 1, 2]  # one of each at least, on either side


def test_listed_images_are_skipped(tmp_path):
    names = [f"{part}/{name}/{i} x.png" for part in ("train", "val") for name in CLASSES for i in range(3)]
    touch(tmp_path, *names)
    path = tmp_path / "skip.txt"
    path.write_bytes(b"\xef\xbb\xbftrain/ant/1 x.png\n\n  \t\r\nval/cat/0 x.png \r\n")
    skip = _read_skip_list(path)
    assert skip == {"train/ant/1 x.png", "val/cat/0 x.png"}
    found = [name for part in _find_images(tmp_path, tiny_recipe(), skip) for name, _ in listed(part, tmp_path)]
    assert found == [name for name in names if name not in skip]
    everything = {name for name in names if name.startswith("train/bee")}
    with pytest.raises(DataError, match=r"train would have no image of the class bee left\. Skip fewer images"):
        _find_images(tmp_path, tiny_recipe(), everything)
    with pytest.raises(DataError, match=r"^2 entries of skip=.* match no image .* nowhere/1\.png, train/bee\."):
        _find_images(tmp_path, tiny_recipe(), {*skip, "nowhere/1.png", "train/bee"})


def test_skipped_images_may_be_named_as_errors_print_them(tmp_path, monkeypatch):
    touch(tmp_path, *(f"data/{name}/{i}.png" for name in CLASSES for i in range(3)))
    monkeypatch.chdir(tmp_path)
    expected = {f"{name}/1.png" for name in CLASSES[:2]}
    for source in ("data", "./data", tmp_path / "data"):
        printed = {_read_parts(source)["train"].name(i) for i in (1, 4)}
        assert _skip_keys(printed, source) == expected
        assert _skip_keys({tmp_path / "data" / name for name in expected}, source) == expected
    assert _skip_keys({"image train/17 of zoo/animals, train", "test/3"}, "zoo/animals") == {"train/17", "test/3"}


# Rows of a step


UNTOUCHED = lf.LevitImageProcessor(do_resize=False, do_center_crop=False)


def numbered(count):
    """Return images whose red level and class are their number."""
    images = [Image.new("RGB", (6, 5), (i, 0, 0)) for i in range(count)]
    return LabeledImages(images, np.arange(count, dtype=np.int32), tuple(map(str, range(count))), "the data")


def numbers(rows):
    """Return the number of the image in every row, [steps B]."""
    batches = list(_training_batches(rows, 2))
    found = np.array([batch["pixels"][..., 0, 0, 0].ravel() for batch in batches])
    np.testing.assert_array_equal(found, [batch["targets"].ravel() for batch in batches])
    return found


@pytest.mark.parametrize("count", [24, 29])
def test_every_image_once_an_epoch_in_another_order(count):
    def orders(seed):
        found = numbers(_TrainingRows(numbered(count), tiny_recipe(**NOTHING, epochs=5, seed=seed), UNTOUCHED))
        assert found.shape == (5 * 3, 8)
        return found.reshape(5, 24).tolist()

    epochs = orders(0)
    for order in epochs:
        assert len(set(order)) == 24  # what does not fill a batch is left out
    assert {number for order in epochs for number in order} == set(range(count))
    assert len(set(map(tuple, epochs))) == 5
    assert orders(0) == epochs
    assert not set(map(tuple, epochs)) & set(map(tuple, orders(1)))


def test_repeated_augmentation_equals_timm(monkeypatch):
    """Compared with the sampler of timm, which gets our order of the images."""
    sampler = pytest.importorskip("timm.data.distributed_sampler")
    torch = pytest.importorskip("torch")
    changes = {**NOTHING, "epochs": 2}
    orders = numbers(_TrainingRows(numbered(24), tiny_recipe(**changes), UNTOUCHED)).reshape(2, 24)
    found = numbers(_TrainingRows(numbered(24), tiny_recipe(**changes, repeats=3), UNTOUCHED)).reshape(2, 3, 8)
    for order, steps in zip(orders, found, strict=True):
        monkeypatch.setattr(torch, "randperm", lambda count, generator, order=order: torch.from_numpy(order))
        for replicas in (1, 2, 4):
            each = 8 // replicas
            ranks = [
                list(sampler.RepeatAugSampler(range(24), replicas, rank, num_repeats=3, selected_round=0))
                for rank in range(replicas)
            ]
            for i, step in enumerate(steps):
                wanted = [number for rank in ranks for number in rank[i * each : (i + 1) * each]]
                assert sorted(step) == sorted(wanted)


def noise(count):
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (12, 14, 3), np.uint8)) for _ in range(count)]
    return LabeledImages(images, np.arange(count, dtype=np.int32), tuple(map(str, range(count))), "the data")


SMALL_CROPS = lf.LevitImageProcessor(size=7, crop_size=8)


def test_every_row_is_augmented_differently():
    """All images are the same, so that only the augmentation makes the rows differ."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    images = LabeledImages([image] * 16, np.zeros(16, np.int32), ("one", "two"), "the data")
    for repeats in (1, 4):
        rows = _TrainingRows(images, tiny_recipe(epochs=4, repeats=repeats), SMALL_CROPS)
        seen = [pixels.tobytes() for batch in _training_batches(rows, 2) for pixels in batch["pixels"][0]]
        assert len(set(seen)) == len(seen) == 64


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_read_the_rows_of_one(hosts, accumulation):
    recipe = tiny_recipe(epochs=3, repeats=3, accumulation=accumulation)
    logits = np.random.default_rng(1).standard_normal((27, 3)).astype(np.float32)

    def batches(shard, first=0):
        return list(_training_batches(_TrainingRows(noise(27), recipe, SMALL_CROPS, logits, shard), 2, first=first))

    whole = batches(_Shard())
    parts = [batches(_Shard(index, hosts)) for index in range(hosts)]
    assert len(whole) == len(parts[0]) == 9 and whole[0]["pixels"].shape == (accumulation, 8 // accumulation, 8, 8, 3)
    for step, batch in enumerate(whole):
        for name, array in batch.items():
            joined = np.concatenate([part[step][name] for part in parts], axis=1)
            np.testing.assert_array_equal(joined, array, err_msg=f"{name}, step {step}")
        np.testing.assert_array_equal(batch["teacher_logits"], logits[batch["targets"]])
    for begun, again in zip(parts[1][4:], batches(_Shard(1, hosts), first=4), strict=True):
        np.testing.assert_array_equal(begun["pixels"], again["pixels"])


@pytest.mark.parametrize("count", [11, 8, 3])
def test_evaluation_weighs_each_image_once(count):
    images = numbered(count)
    whole = list(_evaluation_batches(images, UNTOUCHED, 4))
    weights = np.concatenate([batch["weights"].ravel() for batch in whole])
    found = np.concatenate([batch["pixels"][..., 0, 0, 0].ravel() for batch in whole])
    assert {batch["pixels"].shape for batch in whole} == {(1, 4, 5, 6, 3)}
    assert set(weights) <= {0, 1} and found[weights > 0].tolist() == list(range(count))
    np.testing.assert_array_equal(np.concatenate([batch["targets"].ravel() for batch in whole]), found)
    parts = [list(_evaluation_batches(images, UNTOUCHED, 4, _Shard(index, 2))) for index in range(2)]
    for step, batch in enumerate(whole):
        for name, array in batch.items():
            np.testing.assert_array_equal(np.concatenate([part[step][name] for part in parts], axis=1), array)


def test_file_names_that_are_not_text_have_a_fingerprint(tmp_path):
    touch(tmp_path, *(f"{name}/{i}.png" for name in CLASSES for i in range(3)))
    usual = _fingerprint(*_find_images(tmp_path, tiny_recipe(), ()))
    (tmp_path / CLASSES[0] / "0.png").rename(tmp_path / CLASSES[0] / os.fsdecode(b"caf\xe9.png"))
    assert _fingerprint(*_find_images(tmp_path, tiny_recipe(), ())) != usual
