"""The class names and WordNet ids of ImageNet-1k."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path


def _imagenet_labels() -> tuple[str, ...]:
    """Return the names of ImageNet-1k's 1000 classes (WordNet lemmas), ordered by synset number as usual."""
    return tuple((Path(__file__).parent / "imagenet_labels.txt").read_text(encoding="utf-8").splitlines())


def _imagenet_names(wordnet_ids: Sequence[str]) -> tuple[str, ...] | None:
    """Return the class names of WordNet ids, or None if one of them is not an id of ImageNet-1k.

    A name that two classes have stands only for all 1000 classes in order; otherwise the id takes its place.
    """
    labels, ids = _imagenet_labels(), _imagenet_wordnet_ids()
    if tuple(wordnet_ids) == ids:
        return labels
    shared = {name for name, count in Counter(labels).items() if count > 1}
    names = {key: key if name in shared else name for key, name in zip(ids, labels, strict=True)}
    if not wordnet_ids or any(key not in names for key in wordnet_ids):
        return None
    return tuple(names[key] for key in wordnet_ids)


def _imagenet_wordnet_ids() -> tuple[str, ...]:
    """Return the WordNet ids of ImageNet-1k's 1000 classes, such as "n01440764", in the order of `_imagenet_labels`."""
    return tuple((Path(__file__).parent / "imagenet_wordnet_ids.txt").read_text(encoding="utf-8").splitlines())
