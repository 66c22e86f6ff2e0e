"""The configuration of a LeViT model."""

import dataclasses
import itertools
import json
import operator
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

_REGRESSION = "regression"
_SINGLE_LABEL = "single_label_classification"
_MULTI_LABEL = "multi_label_classification"
_PROBLEM_TYPES = (_REGRESSION, _SINGLE_LABEL, _MULTI_LABEL)

# The key in config.json for values that transformers does not have.
_OWN_BLOCK = "levit_flax"

# Keys that transformers writes for its own use. They do not affect the model and are ignored without a warning.
_HOUSEKEEPING_KEYS = frozenset(
    "_name_or_path _commit_hash architectures attn_implementation chunk_size_feed_forward dtype is_encoder_decoder"
    " model_type output_attentions output_hidden_states return_dict torch_dtype torchscript transformers_version"
    " use_return_dict use_bfloat16".split()
)

# Keys that would change the architecture: only the listed values, which are LeViT's, are accepted.
_FIXED_KEYS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("hardswish", "hard_swish"),
    "hidden_dropout_prob": (0, 0.0),
    "attention_probs_dropout_prob": (0, 0.0),
    "batch_norm_eps": (1e-5,),
    "layer_norm_eps": (1e-5,),
    "batch_norm_momentum": (0.1,),
    "qkv_bias": (False,),
    "use_conv": (False,),
    "stem_type": ("s16",),
    "global_pool": ("avg",),
    "attention_type": ("absolute_bias",),
    "pruned_heads": ({},),
    "tie_word_embeddings": (True, False),
}


class DownOp(NamedTuple):
    """The settings of one downsampling, in the order of transformers' `down_ops`.

    Attributes:
        kind: always "Subsample".
        key_dim: channels of a query or key, per head.
        num_attention_heads: heads of the downsampling attention.
        attention_ratio: value channels as a multiple of `key_dim`.
        mlp_ratio: hidden channels of the MLP that follows, as a multiple of the next stage's width; 0 for no MLP.
        stride: distance between neighboring queries, in tokens.

    Examples:
        >>> LevitConfig().down_ops[0]
        DownOp(kind='Subsample', key_dim=16, num_attention_heads=8, attention_ratio=4, mlp_ratio=2, stride=2)
    """

    kind: str
    key_dim: int
    num_attention_heads: int
    attention_ratio: int
    mlp_ratio: int
    stride: int


class _Derived(tuple[Any, ...]):
    """The value of a field that follows from other fields, and is derived again by `dataclasses.replace`."""

    __slots__ = ()


class FeatureInfo(NamedTuple):
    """The shape of a feature map [B H W C] returned with `output_features=True`.

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
        num_labels: number of classes, 0 for no classifier; None uses the length of `id2label`, or 2 without it.
        id2label: class names by index, as a sequence or a mapping {index: name}; None for `LABEL_0`, `LABEL_1`, ...
        problem_type: "regression", "single_label_classification", "multi_label_classification", or None to infer it
            from the labels.
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
    problem_type: str | None = None
    extra: tuple[tuple[str, str], ...] = ()

    _SCALARS: ClassVar[dict[str, int]] = {
        "num_channels": 1,
        "kernel_size": 1,
        "stride": 1,
        "padding": 0,
        "patch_size": 1,
    }
    _PER_STAGE: ClassVar[dict[str, int]] = {
        "hidden_sizes": 1,
        "num_attention_heads": 1,
        "depths": 0,
        "key_dim": 1,
        "mlp_ratio": 0,
        "attention_ratio": 1,
    }

    def __post_init__(self) -> None:
        for name, least in self._SCALARS.items():
            self._set(name, _integer(name, getattr(self, name), least))
        for name, least in self._PER_STAGE.items():
            self._set(name, _integers(name, getattr(self, name), least))
        self._check_stages()
        self._set("image_size", _image_size(self.image_size))
        self._set("down_ops", self._checked_down_ops())
        self._check_grid()
        self._set_labels()
        for name, end in (("drop_path_rate", 1.0), ("initializer_range", float("inf"))):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < end:
                raise ValueError(f"LevitConfig.{name} must be a number in [0, {end:g}), found {value!r}.")
            self._set(name, float(value))
        if self.problem_type is not None and self.problem_type not in _PROBLEM_TYPES:
            raise ValueError(
                f"LevitConfig.problem_type must be one of {', '.join(_PROBLEM_TYPES)} or None, found"
                f" {self.problem_type!r}."
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen; only called from __post_init__

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
        for size, tokens in zip(self.image_height_width, self.grids[0], strict=True):
            if tokens != -(-size // self.patch_size):
                raise ValueError(
                    f"LevitConfig.patch_size {self.patch_size} does not fit the stem: four convolutions (kernel_size"
                    f" {self.kernel_size}, stride {self.stride}, padding {self.padding}) reduce {size} pixels to"
                    f" {tokens} tokens, expected {-(-size // self.patch_size)}. Change patch_size or these settings."
                )

    def _checked_down_ops(self) -> tuple[DownOp, ...]:
        downsamplings = self.num_stages - 1
        key_dim = self.key_dim[0]  # the original code uses the first stage's key_dim for all
        default = _Derived(DownOp("Subsample", key_dim, c // key_dim, 4, 2, 2) for c in self.hidden_sizes[:-1])
        if self.down_ops is None or isinstance(self.down_ops, _Derived):
            for op in default:
                _integer("down_ops heads (hidden_sizes // key_dim[0])", op.num_attention_heads, 1)
            return default
        # Every model that transformers builds appends an empty entry to its config's list.
        entries = [tuple(op) for op in self.down_ops if tuple(op) != ("",)]
        if len(entries) != downsamplings:
            raise ValueError(
                f"LevitConfig.down_ops must have {downsamplings} entries for {self.num_stages} stages, found"
                f" {len(entries)}."
            )
        checked = []
        for entry in entries:
            if len(entry) != len(DownOp._fields) or entry[0] != "Subsample":
                raise ValueError(f"LevitConfig.down_ops entries must be 'Subsample' and 5 integers, found {entry!r}.")
            least = (1, 1, 1, 0, 1)
            checked.append(
                DownOp("Subsample", *(_integer("down_ops", v, n) for v, n in zip(entry[1:], least, strict=True)))
            )
        return default if tuple(checked) == default else tuple(checked)

    def _set_labels(self) -> None:
        labels = self.id2label
        if isinstance(labels, Mapping):
            labels = _ordered_labels(labels)
        count = self.num_labels
        if count is None:
            count = 2 if labels is None else len(labels)
        count = _integer("num_labels", count, 0)
        if labels is None or (isinstance(labels, _Derived) and len(labels) != count):
            labels = _Derived(f"LABEL_{i}" for i in range(count))
        elif not isinstance(labels, _Derived):
            labels = tuple(str(label) for label in labels)
        if len(labels) != count:
            raise ValueError(
                f"LevitConfig.num_labels and id2label differ: expected {count} class names, found {len(labels)}. Use"
                " config.replace(num_labels=...) or config.replace(id2label=...) to change both."
            )
        self._set("num_labels", count)
        self._set("id2label", labels)

    def replace(self, **changes: Any) -> "LevitConfig":
        """Return the config with some fields changed and dependent fields derived again.

        Args:
            **changes: new values of fields. Unless it is given too, `down_ops` follows `hidden_sizes` and `key_dim`,
                `num_labels` follows `id2label`, and `id2label` becomes LABEL_0, LABEL_1, ... if the number of classes
                changes.

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
        if "id2label" in changes:
            changes = {"num_labels": None, **changes}
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
    def label2id(self) -> dict[str, int]:
        """Class indices by name; the last index if two classes have the same name.

        Examples:
            >>> LevitConfig(id2label=("cat", "dog")).label2id
            {'cat': 0, 'dog': 1}
        """
        return {label: i for i, label in enumerate(self.id2label)}

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
        values.pop("label2id", None)  # follows from id2label
        if "id2label" in values:
            values.pop("num_labels", None)
        if "drop_path_rate" in block:
            values["drop_path_rate"] = block["drop_path_rate"]
        known = {field.name for field in dataclasses.fields(cls)} - {"extra"}
        fields, extra = {}, {}
        for key, value in values.items():
            if key in known:
                fields[key] = value
            elif key in _FIXED_KEYS:
                if value not in _FIXED_KEYS[key]:
                    raise ValueError(
                        f"The config describes another architecture: expected {key}={_FIXED_KEYS[key][0]!r}, found"
                        f" {value!r}."
                    )
            elif key not in _HOUSEKEEPING_KEYS:
                extra[key] = json.dumps(value, sort_keys=True)
        if extra:
            warnings.warn(
                f"The config has keys that LeViT does not use: {', '.join(sorted(extra))}. They have no effect and are"
                " kept in LevitConfig.extra.",
                stacklevel=2,
            )
        return cls(**fields, extra=tuple(sorted(extra.items())))

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
        if self.problem_type is not None:
            values["problem_type"] = self.problem_type
        for key, text in self.extra:
            values[key] = json.loads(text)
        if self.drop_path_rate:
            values[_OWN_BLOCK] = {"drop_path_rate": self.drop_path_rate}
        return values


def _integer(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < least:
        raise ValueError(f"LevitConfig.{name} must be an integer of at least {least}, found {value!r}.")
    return int(value)


def _integers(name: str, values: Any, least: int) -> tuple[int, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"LevitConfig.{name} must be a sequence with one integer per stage, found {values!r}.")
    return tuple(_integer(f"{name}[{i}]", value, least) for i, value in enumerate(values))


def _image_size(value: Any) -> int | tuple[int, int]:
    if isinstance(value, int | float):
        return _integer("image_size", value, 1)
    size = _integers("image_size", value, 1)
    if len(size) != 2:
        raise ValueError(f"LevitConfig.image_size must be an integer or (height, width), found {value!r}.")
    return size[0] if size[0] == size[1] else (size[0], size[1])


def _ordered_labels(labels: Mapping[Any, str]) -> tuple[str, ...]:
    by_index = {int(index): label for index, label in labels.items()}
    if sorted(by_index) != list(range(len(by_index))):
        raise ValueError(
            f"LevitConfig.id2label must name the classes 0 to {len(by_index) - 1} once each, found the indices"
            f" {sorted(by_index)}."
        )
    return tuple(by_index[i] for i in range(len(by_index)))


def _imagenet_labels() -> tuple[str, ...]:
    """Return the names of ImageNet-1k's 1000 classes (WordNet lemmas), ordered by synset number as usual."""
    return tuple((Path(__file__).parent / "imagenet_labels.txt").read_text(encoding="utf-8").splitlines())


def _imagenet_wordnet_ids() -> tuple[str, ...]:
    """Return the WordNet ids of ImageNet-1k's 1000 classes, such as "n01440764", in the order of `_imagenet_labels`."""
    return tuple((Path(__file__).parent / "imagenet_wordnet_ids.txt").read_text(encoding="utf-8").splitlines())
