"""Labeled images from TensorFlow Datasets, read by random access and without TensorFlow."""

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .configuration import _MULTI_LABEL, _REGRESSION, _SINGLE_LABEL
from .datasets import (
    DataError,
    LabeledImages,
    _choose_image,
    _choose_target,
    _DataOptions,
    _label_rows,
    _read_named_parts,
    _reason,
    _Target,
)
from .streams import _reading

_READ_AT_ONCE = 256  # records
_FORMAT = "array_record"


@dataclass(frozen=True)
class _RecordImages:
    """The images of a split, still encoded.

    Attributes:
        records: a sequence of serialized examples.
        column: the column to read, as features of TensorFlow Datasets.
        split: name of the split.
    """

    records: Any
    column: Any
    split: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        return _parse(self.column, self.records[int(index)])

    def __iter__(self) -> Iterator[Any]:
        return _column_values(self.records, self.column)

    def key(self, index: int) -> str:
        """Return the name of an image in a skip list."""
        return f"{self.split}/{index}"


def _parse(column: Any, record: bytes) -> Any:
    """Return the value of a column in a serialized example; images stay encoded."""
    from tensorflow_datasets.core import features
    from tensorflow_datasets.core.decode import SkipDecoding

    [name] = column
    decoders = {name: SkipDecoding()} if isinstance(column[name], features.Image) else None
    return column.deserialize_example_np(record, decoders=decoders)[name]


def _column_values(records: Any, column: Any) -> Iterator[Any]:
    """Yield the values of a column, from records that are read many at once."""
    for start in range(0, len(records), _READ_AT_ONCE):
        for record in records.__getitems__(range(start, min(start + _READ_AT_ONCE, len(records)))):
            yield _parse(column, record)


def _open_builder(source: str) -> Any:
    """Return the builder of a prepared dataset."""
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise ImportError(
            f"{source} cannot be read: it requires tensorflow-datasets, which is not installed. Run: pip install"
            " 'levit-flax[tfds]'"
        ) from None
    name = source.removeprefix("tfds/")
    try:
        builder = tfds.builder(name, data_dir=os.environ.get("TFDS_DATA_DIR"))  # tfds reads it on import only
        prepared = _FORMAT in {each.value for each in builder.info.available_file_formats()}
    except Exception as error:  # the builder of a dataset may raise any exception
        raise DataError(f"{source} cannot be loaded: {_reason(error)}. {_advice(name)}") from error
    if not prepared or not builder.info.splits:
        raise DataError(
            f"{source} is not prepared: expected ArrayRecord files in {builder.data_dir}, found none. {_advice(name)}"
        )
    return builder


def _advice(name: str) -> str:
    return (
        f"Prepare it with tfds.builder({name!r}, file_format={_FORMAT!r}).download_and_prepare(), and set TFDS_DATA_DIR"
        " to the directory of the datasets."
    )


def _read_records(
    builder: Any, source: str, split: str, problem_types: Collection[str] | None, options: _DataOptions
) -> LabeledImages:
    """Return the images and targets of one split.

    All records are read once, because each holds its target.
    """
    import tensorflow_datasets as tfds

    where = f"{source}, {split}"
    features = dict(sorted(builder.info.features.items()))  # its own order changes from process to process
    targets = (_as_target(name, feature, options) for name, feature in features.items())
    target = _choose_target(filter(None, targets), features, where, problem_types, options)
    images = _read_images(builder, source, split, options)
    classes = tfds.features.FeaturesDict({target.name: features[target.name]})
    return _label_rows(images, list(_column_values(images.records, classes)), target, where)


def _read_images(builder: Any, source: str, split: str, options: _DataOptions) -> _RecordImages:
    """Return the images of one split."""
    import tensorflow_datasets as tfds

    features = dict(sorted(builder.info.features.items()))
    images = [name for name, feature in features.items() if _is_image(feature)]
    image = _choose_image(images, features, f"{source}, {split}", options)
    column = tfds.features.FeaturesDict({image: features[image]})
    return _RecordImages(_read_raw(builder, source, split), column, split)


def _read_raw(builder: Any, source: str, split: str) -> Any:
    """Return the serialized examples of a split."""
    from tensorflow_datasets.core.decode import DeserializeMethod

    try:
        return builder.as_data_source(split, deserialize_method=DeserializeMethod.RAW_BYTES, file_format=_FORMAT)
    except Exception as error:  # the split may be malformed, or its files damaged
        raise DataError(f"{source}, {split} cannot be read: {_reason(error)}. Change split=...") from error


def _is_image(feature: Any) -> bool:
    """Return whether a feature has images that can be decoded without TensorFlow; those of floats are not."""
    import tensorflow_datasets as tfds

    return type(feature) is tfds.features.Image and np.dtype(feature.np_dtype).kind == "u"


def _as_target(name: str, feature: Any, options: _DataOptions) -> _Target | None:
    """Return a column as a column of targets, or None if its feature cannot be one."""
    from tensorflow_datasets.core import features

    if isinstance(feature, features.ClassLabel):
        return _Target(name, _SINGLE_LABEL, _class_names(feature))
    if isinstance(feature, features.Sequence) and isinstance(feature.feature, features.ClassLabel):
        return _Target(name, _MULTI_LABEL, _class_names(feature.feature))
    if type(feature) not in (features.Scalar, features.Tensor) or len(feature.shape) > 1 or None in feature.shape:
        return None
    kind = np.dtype(feature.np_dtype).kind
    if not feature.shape and name == options.label_column and kind in "iu":
        return _Target(name, _SINGLE_LABEL)  # integers are classes only if they are asked for
    return _Target(name, _REGRESSION) if kind == "f" else None


def _class_names(feature: Any) -> tuple[str, ...]:
    return tuple(feature.names or map(str, range(feature.num_classes)))


def _read_tfds_part(source: str, split: str, options: _DataOptions) -> LabeledImages:
    """Return the images of one split for evaluation."""
    return _read_records(_open_builder(source), source, split, (_SINGLE_LABEL,), options)


def _read_tfds_images(source: str, split: str, options: _DataOptions) -> Iterator[tuple[str, Any]]:
    """Return the names and the images of one split."""
    images = _read_images(_open_builder(source), source, split, options)
    return ((images.key(i), image) for i, image in enumerate(_reading(images, f"{source}, {split}")))


def _read_tfds_parts(source: str, options: _DataOptions) -> dict[str, LabeledImages]:
    """Return the images for training, as `_read_parts` does."""
    builder = _open_builder(source)

    def read(split: str) -> LabeledImages:
        return _read_records(builder, source, split, None, options)

    return _read_named_parts(source, builder.info.splits, read, options)
