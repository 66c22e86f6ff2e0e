"""The class names and WordNet ids of ImageNet-1k."""

from pathlib import Path


def _imagenet_labels() -> tuple[str, ...]:
    """Return the names of ImageNet-1k's 1000 classes (WordNet lemmas), ordered by synset number as usual."""
    return tuple((Path(__file__).parent / "imagenet_labels.txt").read_text(encoding="utf-8").splitlines())


def _imagenet_wordnet_ids() -> tuple[str, ...]:
    """Return the WordNet ids of ImageNet-1k's 1000 classes, such as "n01440764", in the order of `_imagenet_labels`."""
    return tuple((Path(__file__).parent / "imagenet_wordnet_ids.txt").read_text(encoding="utf-8").splitlines())
