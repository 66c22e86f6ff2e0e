"""The configuration of a LeViT model."""

import dataclasses
import itertools
import json
import math
import operator
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from . import files
from .config_keys import _WRITTEN_IF_CHANGED, _sort_keys
from .config_values import (
    _MOST_LABELS,
    _MOST_TOKENS,
    _Derived,
    _DerivedIndices,
    _DerivedLabels,
    _image_size,
    _integer,
    _integers,
    _Labels,
    _ordered_labels,
)
from .down_ops import DownOp, _checked_down_ops
from .hub import _HubOptions, _resolve

_REGRESSION = "regression"
_SINGLE_LABEL = "single_label_classification"
_MULTI_LABEL = "multi_label_classification"
_PROBLEM_TYPES = (_REGRESSION, _SINGLE_LABEL, _MULTI_LABEL)

_CONFIG_FILE = "config.json"
_ACCESS_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")

# The key in config.json for values that transformers does not have.
_OWN_BLOCK = "levit_flax"


class FeatureInfo(NamedTuple):
    """The shape of a feature map [B H W C] that `output_features` returns.

    Attributes:
        channels: number of channels, C.
        stride: distance between neighboring features along each axis, in pixels.
        grid: height and width in features, (H, W).

    Examples:
        >>> LevitConfig(image_size=(64, 96)).feature_info[-1]
        FeatureInfo(channels=384, stride=64, grid=(1, 2))
    """

    channels: int
    stride: int
    grid: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class LevitConfig:
    """The architecture of a LeViT model; by default LeViT-128, as in transformers.

    Every field is validated at construction. Sequences are converted to tuples, so that a config is hashable and can be
    a static argument of `jax.jit`.

    Attributes:
        image_size: side of the square input in pixels, or (height, width). A square pair is converted to an int.
        num_channels: channels of the input image, at least 1.
        kernel_size: side of the stem's convolution kernels, in pixels.
        stride: stride of the stem's four convolutions, in pixels.
        padding: zero padding of the stem's convolutions on every side, in pixels.
        patch_size: pixels per token along one side, `stride ** 4`. Redundant, but transformers requires it.
        hidden_sizes: channels of each stage, for at least two stages. The first must be at least 8, because the stem
            starts with an eighth of it.
        num_attention_heads: attention heads of each stage.
        depths: blocks (attention and MLP) of each stage.
        key_dim: channels of a query or key per head, for each stage.
        drop_path_rate: probability in [0, 1) that a residual branch is dropped in training, the same at every depth.
        mlp_ratio: hidden channels of the MLPs as a multiple of the stage's width, for each stage; 0 for no MLP.
        attention_ratio: value channels as a multiple of `key_dim`, for each stage.
        initializer_range: has no effect, because weights are initialized as in the original code; kept so that
            transformers' configs convert back unchanged.
        down_ops: the downsamplings between the stages; None derives them from `key_dim[0]` and `hidden_sizes`.
        num_labels: number of classes, 0 for no classifier; None uses the length of `id2label`, or 2 without it. If it
            differs from that length, a warning is issued and the classes are named LABEL_0, LABEL_1, ...
        id2label: class names by index, as a sequence or a mapping {index: name}; None for those of `label2id`, or
            `LABEL_0`, `LABEL_1`, ... A tuple with the methods `keys`, `values` and `items` of the mapping.
        label2id: class indices by name; None for those that follow from `id2label`. If two classes have the same name,
            it has the index of the last one.
        problem_type: "regression", "single_label_classification", "multi_label_classification", or None to infer it
            from the labels.
        output_hidden_states: the default of this argument of the models.
        output_attentions: the default of this argument of the models.
        return_dict: the default of this argument of the models.
        architectures: names of transformers' classes that a config.json lists; None if it lists none. No effect on
            the model, and ignored by comparisons.
        dtype: name of the dtype that a config.json records, such as "float32". No effect, and ignored by comparisons.
        extra: unknown keys of a config.json as (key, JSON text) pairs, which `to_dict` writes back.

    Raises:
        ValueError: a field is out of range, or two fields contradict each other.

    Examples:
        >>> config = LevitConfig(image_size=(64, 96), id2label=("cat", "dog"))
        >>> config.grids
        ((4, 6), (2, 3), (1, 2))
        >>> LevitConfig.from_dict(config.to_dict()) == config
        True

    Source: facebookresearch/LeViT levit.py (`specification`, `model_factory`); transformers configuration_levit.py.
    """

    image_size: int | tuple[int, int] = 224
    num_channels: int = 3
    kernel_size: int = 3
    stride: int = 2
    padding: int = 1
    patch_size: int = 16
    hidden_sizes: tuple[int, ...] = (128, 256, 384)
    num_attention_heads: tuple[int, ...] = (4, 8, 12)
    depths: tuple[int, ...] = (4, 4, 4)
    key_dim: tuple[int, ...] = (16, 16, 16)
    drop_path_rate: float = 0.0
    mlp_ratio: tuple[int, ...] = (2, 2, 2)
    attention_ratio: tuple[int, ...] = (2, 2, 2)
    initializer_range: float = 0.02
    down_ops: tuple[DownOp, ...] = None  # type: ignore[assignment]  # filled in __post_init__
    num_labels: int = None  # type: ignore[assignment]  # filled in __post_init__
    id2label: tuple[str, ...] = None  # type: ignore[assignment]  # filled in __post_init__
    label2id: dict[str, int] = dataclasses.field(default=None, compare=False, repr=False)  # type: ignore[arg-type]
    problem_type: str | None = None
    output_hidden_states: bool = False
    output_attentions: bool = False
    return_dict: bool = True
    architectures: tuple[str, ...] | None = dataclasses.field(default=None, compare=False)
    dtype: str | None = dataclasses.field(default=None, compare=False)
    extra: tuple[tuple[str, str], ...] = ()

    model_type: ClassVar[str] = "levit"
    # The smallest and the largest value.
    _SCALARS: ClassVar[dict[str, tuple[int, int]]] = {
        "num_channels": (1, 1024),
        "kernel_size": (1, 64),
        "stride": (1, 64),
        "padding": (0, 64),
        "patch_size": (1, 64**4),
    }
    _PER_STAGE: ClassVar[dict[str, tuple[int, int]]] = {
        "hidden_sizes": (1, 16384),
        "num_attention_heads": (1, 1024),
        "depths": (0, 100),
        "key_dim": (1, 1024),
        "mlp_ratio": (0, 64),
        "attention_ratio": (1, 64),
    }

    def __post_init__(self) -> None:
        for name, limits in self._SCALARS.items():
            self._set(name, _integer(name, getattr(self, name), *limits))
        for name, limits in self._PER_STAGE.items():
            self._set(name, _integers(name, getattr(self, name), *limits))
        self._check_stages()
        self._set("image_size", _image_size(self.image_size))
        self._set("down_ops", _checked_down_ops(self.down_ops, self.hidden_sizes, self.key_dim))
        self._check_grid()
        self._set_labels()
        for name, end in (("drop_path_rate", 1.0), ("initializer_range", float("inf"))):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < end:
                raise ValueError(f"LevitConfig.{name} must be a number in [0, {end:g}), found {value!r}.")
            self._set(name, float(value))
        self._check_outputs()
        if self.problem_type is not None and self.problem_type not in _PROBLEM_TYPES:
            raise ValueError(
                f"LevitConfig.problem_type must be one of {', '.join(_PROBLEM_TYPES)} or None, found"
                f" {self.problem_type!r}."
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen; only called from __post_init__

    def _check_outputs(self) -> None:
        for name in ("output_hidden_states", "output_attentions", "return_dict"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"LevitConfig.{name} must be True or False, found {getattr(self, name)!r}.")
        if self.architectures is not None:
            self._set("architectures", tuple(map(str, self.architectures)))

    def _check_stages(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in self._PER_STAGE}
        if len(set(lengths.values())) != 1 or len(self.hidden_sizes) < 2:
            found = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise ValueError(
                "LevitConfig's tuples must have one entry per stage: expected equal lengths of at least 2, found"
                f" {found}."
            )
        if self.hidden_sizes[0] < 8:
            raise ValueError(
                "LevitConfig.hidden_sizes[0] must be at least 8, because the stem starts with an eighth of it, found"
                f" {self.hidden_sizes[0]}."
            )

    def _check_grid(self) -> None:
        tokens = math.prod(self.grids[0])
        if tokens > _MOST_TOKENS:
            raise ValueError(
                f"LevitConfig.image_size is too large: expected at most {_MOST_TOKENS} tokens after the stem, found"
                f" {tokens} for {self.image_size} pixels. Use smaller images."
            )
        for size, tokens in zip(self.image_height_width, self.grids[0], strict=True):
            if tokens != -(-size // self.patch_size):
                raise ValueError(
                    f"LevitConfig.patch_size {self.patch_size} does not fit the stem: four convolutions (kernel_size"
                    f" {self.kernel_size}, stride {self.stride}, padding {self.padding}) reduce {size} pixels to"
                    f" {tokens} tokens, expected {-(-size // self.patch_size)}. Change patch_size or these settings."
                )

    def _set_labels(self) -> None:
        labels = self.id2label
        if labels is None and self.label2id is not None and not isinstance(self.label2id, _Derived):
            labels = _ordered_labels({index: label for label, index in self.label2id.items()})
        if isinstance(labels, Mapping):
            labels = _ordered_labels(labels)
        count = self.num_labels
        if count is None:
            count = 2 if labels is None else len(labels)
        count = _integer("num_labels", count, 0, _MOST_LABELS)
        if labels is None or (isinstance(labels, _Derived) and len(labels) != count):
            labels = _DerivedLabels(f"LABEL_{i}" for i in range(count))
        elif not isinstance(labels, _Derived):
            labels = _Labels(str(label) for label in labels)
        if len(labels) != count:
            warnings.warn(
                f"LevitConfig.num_labels is {count}, but id2label names {len(labels)} classes. The classes are named"
                " LABEL_0, LABEL_1, ... instead. Use config.replace(num_labels=...) to change both.",
                stacklevel=4,
            )
            labels = _DerivedLabels(f"LABEL_{i}" for i in range(count))
        indices = _DerivedIndices((label, i) for i, label in enumerate(labels))
        given = self.label2id
        if given is not None and not isinstance(given, _Derived) and given != indices and len(indices) == count:
            raise ValueError(
                "LevitConfig.label2id contradicts id2label: expected the inverse mapping. Pass one of them."
            )
        self._set("num_labels", count)
        self._set("id2label", labels)
        self._set("label2id", indices)

    def replace(self, **changes: Any) -> "LevitConfig":
        """Return the config with some fields changed and dependent fields derived again.

        Args:
            **changes: new values of fields. Unless it is given too, `down_ops` follows `hidden_sizes` and `key_dim`,
                `num_labels` follows `id2label` or `label2id`, and `id2label` becomes LABEL_0, LABEL_1, ... if the
                number of classes changes.

        Raises:
            ValueError: a value is invalid.
            TypeError: there is no such field.

        Examples:
            >>> from levit_flax import VARIANTS
            >>> VARIANTS["levit-128S"].replace(num_labels=3).id2label
            ('LABEL_0', 'LABEL_1', 'LABEL_2')
            >>> VARIANTS["levit-128S"].replace(hidden_sizes=(64, 128, 192)).down_ops[0].num_attention_heads
            4
        """
        if changes.keys() & {"hidden_sizes", "key_dim"}:
            changes = {"down_ops": None, **changes}
        if changes.keys() & {"id2label", "label2id"}:
            changes = {"num_labels": None, "id2label": None, **changes}
        elif changes.get("num_labels", self.num_labels) != self.num_labels:
            changes = {**changes, "id2label": None}
        return dataclasses.replace(self, **changes)

    @property
    def num_stages(self) -> int:
        """Number of stages.

        Examples:
            >>> LevitConfig().num_stages
            3
        """
        return len(self.hidden_sizes)

    @property
    def image_height_width(self) -> tuple[int, int]:
        """Input size in pixels as (height, width).

        Examples:
            >>> LevitConfig(image_size=80).image_height_width
            (80, 80)
        """
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Token grid (height, width) of every stage.

        Examples:
            >>> LevitConfig(image_size=224).grids
            ((14, 14), (7, 7), (4, 4))
        """
        height, width = self.image_height_width
        for _ in range(4):
            height, width = ((n + 2 * self.padding - self.kernel_size) // self.stride + 1 for n in (height, width))
        if min(height, width) < 1:
            raise ValueError(
                f"LevitConfig.image_size is too small: expected at least one token after the stem, found none for"
                f" {self.image_size} pixels."
            )
        grids = [(height, width)]
        for op in self.down_ops:
            height, width = ((n - 1) // op.stride + 1 for n in (height, width))
            grids.append((height, width))
        return tuple(grids)

    @property
    def feature_info(self) -> tuple[FeatureInfo, ...]:
        """The shape of each stage's feature map, from the finest to the coarsest.

        Examples:
            >>> [(info.channels, info.stride) for info in LevitConfig().feature_info]
            [(128, 16), (256, 32), (384, 64)]
        """
        strides = itertools.accumulate((op.stride for op in self.down_ops), operator.mul, initial=self.stride**4)
        return tuple(map(FeatureInfo, self.hidden_sizes, strides, self.grids))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LevitConfig":
        """Build a config from the content of a transformers `config.json`.

        Args:
            values: the parsed JSON. `down_ops` may contain the empty entries that transformers appends. Unknown keys
                are kept in `extra`, and a warning is issued. Values in the `levit_flax` block take precedence.

        Returns:
            The config.

        Raises:
            ValueError: `model_type` is not "levit", a value is out of range, or a key would change the architecture.

        Examples:
            >>> config = LevitConfig.from_dict({"model_type": "levit", "id2label": {"0": "cat", "1": "dog"}})
            >>> config.num_labels, config.hidden_sizes
            (2, (128, 256, 384))
        """
        values = dict(values)
        if values.get("model_type", "levit") != "levit":
            raise ValueError(f"The config has another model_type: expected 'levit', found {values['model_type']!r}.")
        block = values.pop(_OWN_BLOCK, {})
        known = {field.name for field in dataclasses.fields(cls)} - {"extra"}
        fields, extra = _sort_keys(values, known, block.get("drop_path_rate"))
        return cls(**fields, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """Return the config as the content of a `config.json` that transformers can read.

        Returns:
            JSON values. `drop_path_rate` is the integer 0, the only value that transformers' strict config accepts. A
            rate above 0 is stored in the `levit_flax` block.

        Examples:
            >>> values = LevitConfig(drop_path_rate=0.1).to_dict()
            >>> values["model_type"], values["drop_path_rate"], values["levit_flax"]
            ('levit', 0, {'drop_path_rate': 0.1})
        """
        values: dict[str, Any] = {"model_type": "levit"}
        for name in ("image_size", *self._SCALARS, *self._PER_STAGE):
            value = getattr(self, name)
            values[name] = list(value) if isinstance(value, tuple) else value
        values["drop_path_rate"] = 0
        values["initializer_range"] = self.initializer_range
        values["down_ops"] = [list(op) for op in self.down_ops]
        values["id2label"] = {str(i): label for i, label in enumerate(self.id2label)}
        values["label2id"] = self.label2id
        for field in dataclasses.fields(self):
            if field.name in _WRITTEN_IF_CHANGED and getattr(self, field.name) != field.default:
                value = getattr(self, field.name)
                values[field.name] = list(value) if isinstance(value, tuple) else value
        for key, text in self.extra:
            values[key] = json.loads(text)
        if self.drop_path_rate:
            values[_OWN_BLOCK] = {"drop_path_rate": self.drop_path_rate}
        return values

    def to_json_string(self) -> str:
        """Return the config as the text of a `config.json`.

        Examples:
            >>> json.loads(LevitConfig(depths=(1, 2, 3)).to_json_string())["depths"]
            [1, 2, 3]
        """
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, path: str | Path) -> None:
        """Write the config as JSON.

        Args:
            path: the file to write.

        Raises:
            OSError: the file cannot be written.

        Examples:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     LevitConfig().to_json_file(f"{folder}/levit.json")
            ...     LevitConfig.from_json_file(f"{folder}/levit.json") == LevitConfig()
            True
        """
        files._write_text(Path(path), self.to_json_string())

    @classmethod
    def from_json_file(cls, path: str | Path) -> "LevitConfig":
        """Read a config from a JSON file, as `from_dict` does from its content.

        Args:
            path: the file.

        Raises:
            ValueError: the file is not JSON, or `from_dict` raises.
            OSError: the file cannot be read.

        Examples:
            >>> from levit_flax.hub import _EMBEDDED_DIRECTORY
            >>> LevitConfig.from_json_file(_EMBEDDED_DIRECTORY / "config.json").num_labels
            10
        """
        return cls.from_dict(files._read_json(Path(path)))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` into a directory, which is created if it does not exist.

        Args:
            directory: the directory.

        Raises:
            OSError: the file cannot be written.

        Examples:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     LevitConfig(num_labels=3).save_pretrained(folder)
            ...     LevitConfig.from_pretrained(folder).num_labels
            3
        """
        self.to_json_file(Path(directory) / _CONFIG_FILE)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, subfolder: str = "", **changes: Any) -> "LevitConfig":
        """Load the config of a model, and optionally change fields.

        Args:
            source: a directory, a Hub id such as "facebook/levit-128S", or "cifar10", the small model in the package.
            subfolder: folder of the directory or repository that contains `config.json`.
            **changes: new values of fields, as for `replace`; also `revision`, `token`, `cache_dir` and
                `local_files_only`, as for `levit_flax.from_pretrained`.

        Raises:
            ValueError: the file is malformed, or a value is invalid.
            TypeError: there is no such field.
            OSError: the source does not exist, or cannot be read or downloaded.

        Examples:
            >>> LevitConfig.from_pretrained("cifar10", id2label=("cat", "dog")).num_labels
            2
        """
        access = {name: changes.pop(name) for name in _ACCESS_OPTIONS if name in changes}
        options = _HubOptions(**access, subfolder=subfolder)
        directory = _resolve(source, files=(_CONFIG_FILE,), options=options).directory
        return cls.from_json_file(directory / _CONFIG_FILE).replace(**changes)
