"""Recipes: the hyperparameters of a training run, read from TOML files."""

import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from levit_flax.arguments import _check_types
from levit_flax.choices import _CallError, _suggest

_RECIPES = resources.files(__package__) / "recipes"

_CHOICES = {
    "heads": ("merge", "first", "both"),
    "batch_norm": ("train", "freeze", "freeze_with_parameters"),
    "compute_dtype": ("float32", "bfloat16"),
    "distillation": ("none", "hard", "soft"),
    "interpolation": ("bicubic", "bilinear", "random"),
}

_POSITIVE = (
    "epochs",
    "batch_size",
    "accumulation",
    "repeats",
    "learning_rate",
    "epsilon",
    "distillation_temperature",
    "checkpoint_every",
)
_SHARES = (
    "label_smoothing",
    "flip",
    "erase",
    "mix_probability",
    "mix_switch",
    "distillation_alpha",
    "validation_share",
)
_BELOW_ONE = ("label_smoothing", "drop_path_rate", "ema_decay", "beta1", "beta2", "validation_share")


class RecipeError(_CallError):
    """Raised when a recipe is invalid or does not fit the data, model or devices.

    Examples:
        >>> try:
        ...     Recipe(epochs=0)
        ... except RecipeError as error:
        ...     print(error)
        epochs is 0: expected more than 0.
    """


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Hyperparameters of a training run.

    The defaults are those of the recipe "finetune", for 500 or more images.

    Attributes:
        epochs: number of epochs.
        batch_size: number of images per step, over all devices and hosts.
        accumulation: number of equal parts into which each batch is split to save memory. The parts are processed one
            after the other, with their own batch norm statistics.
        seed: seed of the order of the images, augmentation and stochastic depth.
        validation_share: share of the images used for validation if the data has no validation part, in (0, 1).

        architecture: for training from scratch: the name of a published variant, or a table of `LevitConfig` fields.
        heads: use of a checkpoint's two heads without a teacher: "merge" them into one whose logits are their average,
            keep the "first", or train "both" on the labels. With a teacher, the model always has two heads.
        image_size: height and width of the images in pixels; None keeps the checkpoint's.
        drop_path_rate: probability in [0, 1) that a residual branch is dropped; None keeps the checkpoint's.
        batch_norm: "train" updates the running statistics, "freeze" uses and keeps them, "freeze_with_parameters"
            freezes those whose learning rate is 0.
        compute_dtype: dtype of the computation. Parameters, batch norm and softmax are always float32.
        remat: compute the activations of each block again in the backward pass instead of storing them, which takes
            less memory and more time. The gradients are the same.

        learning_rate: peak learning rate for batches of `learning_rate_batch` images.
        learning_rate_batch: the peak is multiplied by batch_size / learning_rate_batch; 0 for no scaling.
        warmup_epochs: epochs of linear warm-up from `warmup_learning_rate`, included in `epochs`.
        warmup_learning_rate: learning rate at the first step, not scaled.
        min_learning_rate: learning rate at the end of the cosine decay, not scaled.
        learning_rates: factors of the learning rate by regular expression. The first expression that matches the whole
            path of a parameter, such as "stem/conv_0/conv/kernel", applies. Every parameter must match one. A factor of
            0 freezes a parameter.
        weight_decay: decoupled weight decay; not applied to 1-D tensors, biases and attention biases.
        beta1: AdamW's decay of the first moment.
        beta2: AdamW's decay of the second moment.
        epsilon: AdamW's term that avoids division by zero.
        adaptive_clip: largest norm of a unit's gradient, relative to the norm of its weights; 0 for no clipping.
        ema_decay: decay of the moving average of the weights; 0 for none. With averaging, the averaged weights are
            evaluated and saved. The decay is at most (1 + step) / (10 + step), so that the initial weights do not
            dominate short runs.

        label_smoothing: share of the target spread over all classes, in [0, 1).
        distillation: "none", or learn from a teacher's most likely class ("hard") or its probabilities ("soft").
        distillation_alpha: weight of the teacher's loss in [0, 1]; the labels' loss has the weight 1 - alpha.
        distillation_temperature: temperature of the soft loss.

        crop_scale: smallest and largest area of a random crop, relative to the image; () uses the resizing and center
            crop of evaluation instead.
        crop_ratio: smallest and largest ratio of width to height of a random crop.
        crop_padding: width in pixels of a reflected border. A crop of the original size is taken from the padded image
            before all other augmentation; 0 for none.
        interpolation: filter of random crops and RandAugment: "bicubic", "bilinear", or "random" for either one.
        flip: probability of a horizontal flip.
        rand_augment: number of RandAugment operations per image; 0 for none.
        rand_augment_magnitude: magnitude of the operations, in [0, 10].
        rand_augment_deviation: standard deviation of the magnitude.
        color_jitter: largest relative change of brightness, contrast and saturation; 0 for none.
        erase: probability that a rectangle of an image is replaced with noise.
        mixup: alpha of mixup's beta distribution; 0 for no mixup.
        cutmix: alpha of cutmix's beta distribution; 0 for no cutmix.
        mix_probability: probability that a batch is mixed.
        mix_switch: probability of cutmix if both are enabled.
        repeats: number of times that each image of an epoch is used, each time augmented differently. An epoch keeps
            its number of steps and uses fewer distinct images.

        checkpoint_every: number of epochs between checkpoints; each one includes an evaluation.

    Raises:
        RecipeError: a value has the wrong type or is out of range.

    Examples:
        >>> Recipe(epochs=5, batch_size=32).learning_rate
        0.0005
    """

    # The schedule of the run
    epochs: int = 30
    batch_size: int = 32
    accumulation: int = 1
    seed: int = 0
    validation_share: float = 0.1
    checkpoint_every: int = 1

    # The model
    architecture: str | Mapping[str, Any] | None = None
    heads: str = "merge"
    image_size: int | None = None
    drop_path_rate: float | None = None
    batch_norm: str = "train"
    compute_dtype: str = "float32"
    remat: bool = False

    # The optimizer
    learning_rate: float = 5e-4
    learning_rate_batch: int = 0
    warmup_epochs: float = 2
    warmup_learning_rate: float = 1e-6
    min_learning_rate: float = 1e-6
    learning_rates: Mapping[str, float] = field(default_factory=lambda: {".*": 1.0})
    weight_decay: float = 0.025
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    adaptive_clip: float = 0.02
    ema_decay: float = 0.0

    # The loss
    label_smoothing: float = 0.1
    distillation: str = "none"
    distillation_alpha: float = 0.5
    distillation_temperature: float = 1.0

    # Augmentation
    crop_scale: tuple[float, ...] = (0.35, 1.0)
    crop_ratio: tuple[float, ...] = (3 / 4, 4 / 3)
    crop_padding: int = 0
    interpolation: str = "bicubic"
    flip: float = 0.5
    rand_augment: int = 0
    rand_augment_magnitude: float = 9.0
    rand_augment_deviation: float = 0.5
    color_jitter: float = 0.2
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0
    mix_switch: float = 0.5
    repeats: int = 1

    def __post_init__(self) -> None:
        """Convert and check every value."""
        hints = typing.get_type_hints(type(self))
        for entry in dataclasses.fields(self):
            value = _as_type(entry.name, getattr(self, entry.name), hints[entry.name])
            object.__setattr__(self, entry.name, value)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise RecipeError(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(choices)}.")
        for entry in dataclasses.fields(self):
            self._check_range(entry.name, getattr(self, entry.name))
        for pattern, factor in self.learning_rates.items():
            number = isinstance(factor, int | float) and not isinstance(factor, bool)
            if not (number and math.isfinite(factor) and factor >= 0):
                raise RecipeError(
                    f"learning_rates gives {pattern!r} the factor {factor!r}: expected a non-negative number."
                )
        if self.batch_size % self.accumulation:
            raise RecipeError(
                f"batch_size is {self.batch_size}: expected a multiple of accumulation, {self.accumulation}."
            )
        for name in ("crop_scale", "crop_ratio"):
            span = getattr(self, name)
            if span and not (len(span) == 2 and 0 < span[0] <= span[1]):
                raise RecipeError(f"{name} is {list(span)}: expected two positive numbers in ascending order.")
        if self.warmup_epochs >= self.epochs:
            raise RecipeError(f"warmup_epochs is {self.warmup_epochs}: expected less than epochs ({self.epochs}).")

    def _check_range(self, name: str, value: Any) -> None:
        if isinstance(value, int | float) and not (math.isfinite(value) and value >= 0):
            raise RecipeError(f"{name} is {value}: expected a non-negative number.")
        if name in _POSITIVE and value <= 0:
            raise RecipeError(f"{name} is {value}: expected more than 0.")
        if name in _BELOW_ONE and value is not None and value >= 1:
            raise RecipeError(f"{name} is {value}: expected a number less than 1.")
        if name in _SHARES and value > 1:
            raise RecipeError(f"{name} is {value}: expected a number from 0 to 1.")

    @property
    def peak_learning_rate(self) -> float:
        """Learning rate at the end of the warm-up, scaled for the batch size.

        Examples:
            >>> Recipe(learning_rate=5e-4, learning_rate_batch=512, batch_size=1024).peak_learning_rate
            0.001
        """
        if not self.learning_rate_batch:
            return self.learning_rate
        return self.learning_rate * self.batch_size / self.learning_rate_batch

    def to_dict(self) -> dict[str, Any]:
        """Return all values as a JSON-ready dictionary.

        Examples:
            >>> Recipe(crop_scale=(0.5, 1.0)).to_dict()["crop_scale"]
            [0.5, 1.0]
        """
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@_check_types
def read_recipe(name: str | Path = "finetune", **changes: Any) -> Recipe:
    """Return a recipe from a TOML file, or one of the package's recipes.

    Args:
        name: "finetune", "small_images", "small_images_finish", "paper", or the path of a TOML file with fields of
            `Recipe`.
        **changes: fields of `Recipe` that override the file.

    Raises:
        RecipeError: the recipe does not exist, is not valid TOML, has an unknown key, or has an invalid value.

    Examples:
        >>> read_recipe("small_images", epochs=10).epochs
        10
    """
    path = Path(name).expanduser()
    known = _recipe_names()
    if str(name) in known:
        text = (_RECIPES / f"{name}.toml").read_text(encoding="utf-8")
    elif path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        raise RecipeError(
            f"There is no recipe {name}: expected {', '.join(known)}, or the path of a TOML file."
            + _suggest(str(name), known)
        )
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"The recipe {name} is not valid TOML: {error}.") from None
    return _make_recipe({**values, **changes}, f"The recipe {name}")


def _recipe_names() -> list[str]:
    """Return the names of the package's recipes."""
    return sorted(entry.name.removesuffix(".toml") for entry in _RECIPES.iterdir() if entry.name.endswith(".toml"))


def _make_recipe(values: Mapping[str, Any], where: str) -> Recipe:
    """Return a recipe with the values of a table, or raise RecipeError for an unknown key."""
    known = [entry.name for entry in dataclasses.fields(Recipe)]
    unknown = [key for key in values if key not in known]
    if unknown:
        raise RecipeError(
            f"{where} has the unknown key {unknown[0]}: expected {', '.join(known)}.{_suggest(unknown[0], known)}"
        )
    return Recipe(**values)


def _parse_change(text: str) -> tuple[str, Any]:
    """Return the key and the value of "key=value", in TOML syntax; an unquoted word is a string."""
    key, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(
            f"The change of the recipe is malformed: expected KEY=VALUE, such as epochs=10, found {text!r}."
        )
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def _as_type(name: str, value: Any, hint: Any) -> Any:
    """Return the value as the type of its field; integers become floats and lists become tuples if needed."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is types.NoneType and value is None:
            return None
        if origin is bool and isinstance(value, bool):
            return value
        if origin is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if origin is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if origin is str and isinstance(value, str):
            return value
        if origin is tuple and isinstance(value, list | tuple) and all(isinstance(item, int | float) for item in value):
            return tuple(map(float, value))
        if origin is Mapping and isinstance(value, Mapping):
            return dict(value)
    expected = " or ".join(str(getattr(typing.get_origin(o) or o, "__name__", o)) for o in options)
    raise RecipeError(f"{name} is {value!r}: expected {expected}.")
