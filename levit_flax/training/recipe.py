"""The recipe: every number that decides how a model is trained, in one frozen object and one plain file."""

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

RECIPES = resources.files(__package__) / "recipes"

CHOICES = {
    "heads": ("merge", "first", "both"),
    "batch_norm": ("train", "freeze", "freeze_with_parameters"),
    "compute_dtype": ("float32", "bfloat16"),
    "distillation": ("none", "hard", "soft"),
    "interpolation": ("bicubic", "bilinear", "random"),
}

POSITIVE = (
    "epochs",
    "batch_size",
    "accumulation",
    "repeats",
    "learning_rate",
    "epsilon",
    "distillation_temperature",
    "checkpoint_every",
)
SHARES = ("label_smoothing", "flip", "erase", "mix_probability", "mix_switch", "distillation_alpha", "validation_share")
BELOW_ONE = ("label_smoothing", "drop_path_rate", "ema_decay", "beta1", "beta2", "validation_share")


class RecipeError(ValueError):
    """A recipe cannot be used; the message says which key, what was found and what is expected.

    Example:
        >>> try:
        ...     Recipe(epochs=0)
        ... except RecipeError as error:
        ...     print(error)
        epochs is 0: expected more than 0.
    """


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained. The defaults are the recipe "finetune", made for a few hundred images or more.

    Attributes:
        epochs: passes over the training images.
        batch_size: images in one step of the optimizer, over all devices and hosts.
        accumulation: parts that a batch is computed in, one after the other, to save memory; batch norm sees the parts.
        seed: decides the order of the images, their augmentation and stochastic depth.
        validation_share: share of the images held back where the data has no validation part of its own, in (0, 1).

        architecture: for training from scratch, a published variant's name or a table of `LevitConfig` fields.
        heads: what becomes of two heads where there is no teacher: "merge" into one with their average as its logits,
            keep the "first", or teach "both" by the labels. With a teacher there are always two.
        image_size: side of the images in pixels; None for the checkpoint's.
        drop_path_rate: probability in [0, 1) that a residual branch is dropped; None for the checkpoint's.
        batch_norm: "train" its statistics, "freeze" them, or "freeze_with_parameters" where the learning rate is 0.
        compute_dtype: type of the computation; parameters, batch norm and softmax stay in float32.

        learning_rate: at the peak of the schedule, for a batch of `learning_rate_batch`.
        learning_rate_batch: the peak is scaled by batch_size over this; 0 for no scaling.
        warmup_epochs: epochs of linear growth from `warmup_learning_rate`, counted within `epochs`.
        warmup_learning_rate: where the growth starts, not scaled.
        min_learning_rate: where the cosine ends, not scaled.
        learning_rates: factors of the learning rate by regular expression over the paths of the parameters, such as
            "stem/conv_0/conv/kernel"; the first that matches the whole path counts, and every parameter must be
            covered. 0 freezes.
        weight_decay: decoupled, not for 1-D tensors, biases and attention biases.
        beta1: of AdamW.
        beta2: of AdamW.
        epsilon: of AdamW.
        adaptive_clip: the largest norm of a unit's gradient over that of its weights; 0 for no clipping.
        ema_decay: decay of the averaged weights, which are then the ones evaluated and saved; 0 for none. Early on it
            is held at (1 + step) / (10 + step), so that short runs are not averaged with their start.

        label_smoothing: share of the target spread over all classes, in [0, 1).
        distillation: "none", or learn from a teacher's likeliest class ("hard") or its probabilities ("soft").
        distillation_alpha: weight of the teacher's loss against the labels', in [0, 1].
        distillation_temperature: of the soft loss.

        crop_scale: smallest and largest share of the image's area in a random crop; () for no random crop, which
            then is the evaluation's own.
        crop_ratio: smallest and largest ratio of width to height of a random crop.
        crop_padding: pixels reflected around an image before its random crop, at its own size.
        interpolation: "bicubic", "bilinear", or one of the two at "random", for random crops and RandAugment.
        flip: probability of a mirrored image.
        rand_augment: operations of RandAugment per image; 0 for none.
        rand_augment_magnitude: their strength, in [0, 10].
        rand_augment_deviation: standard deviation of the strength.
        color_jitter: largest relative change of brightness, contrast and saturation; 0 for none.
        erase: probability that a rectangle of an image is replaced by noise.
        mixup: parameter of the beta distribution of mixup; 0 for none.
        cutmix: parameter of the beta distribution of cutmix; 0 for none.
        mix_probability: probability that a batch is mixed.
        mix_switch: where both are given, the probability that it is cutmix.
        repeats: how often each image of an epoch is taken, each time augmented anew; an epoch then holds a share of
            the images.

        checkpoint_every: epochs between checkpoints, with an evaluation each.

    Raises:
        RecipeError: a value is out of its range.

    Example:
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
        """Check every value."""
        kinds = typing.get_type_hints(type(self))
        for entry in dataclasses.fields(self):
            value = _as_kind(entry.name, getattr(self, entry.name), kinds[entry.name])
            object.__setattr__(self, entry.name, value)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise RecipeError(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(choices)}.")
        for entry in dataclasses.fields(self):
            self._check_range(entry.name, getattr(self, entry.name))
        for pattern, factor in self.learning_rates.items():
            number = isinstance(factor, int | float) and not isinstance(factor, bool)
            if not (number and math.isfinite(factor) and factor >= 0):
                raise RecipeError(
                    f"learning_rates gives {pattern!r} the factor {factor!r}: expected a number that is not negative."
                )
        if self.batch_size % self.accumulation:
            raise RecipeError(
                f"batch_size {self.batch_size} cannot be computed in {self.accumulation} equal parts (accumulation)."
            )
        for name in ("crop_scale", "crop_ratio"):
            span = getattr(self, name)
            if span and not (len(span) == 2 and 0 < span[0] <= span[1]):
                raise RecipeError(f"{name} is {list(span)}: expected two positive numbers, the smaller one first.")
        if self.warmup_epochs >= self.epochs:
            raise RecipeError(f"warmup_epochs is {self.warmup_epochs}: expected fewer than the {self.epochs} epochs.")

    def _check_range(self, name: str, value: Any) -> None:
        if isinstance(value, int | float) and not (math.isfinite(value) and value >= 0):
            raise RecipeError(f"{name} is {value}: expected a number that is not negative.")
        if name in POSITIVE and value <= 0:
            raise RecipeError(f"{name} is {value}: expected more than 0.")
        if (name in SHARES and value > 1) or (name in BELOW_ONE and value is not None and value >= 1):
            raise RecipeError(f"{name} is {value}: expected a share, 0 to 1.")

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate at the end of the warm-up, scaled for the batch.

        Example:
            >>> Recipe(learning_rate=5e-4, learning_rate_batch=512, batch_size=1024).peak_learning_rate
            0.001
        """
        if not self.learning_rate_batch:
            return self.learning_rate
        return self.learning_rate * self.batch_size / self.learning_rate_batch

    def to_dict(self) -> dict[str, Any]:
        """Return the values, JSON-ready.

        Example:
            >>> Recipe(crop_scale=(0.5, 1.0)).to_dict()["crop_scale"]
            [0.5, 1.0]
        """
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def read_recipe(name: str | Path = "finetune", **changes: Any) -> Recipe:
    """Read a recipe.

    Args:
        name: one of the package's recipes ("finetune", "small_images", "small_images_finish", "paper"), or a TOML file
            with keys of `Recipe`.
        **changes: values that replace the file's.

    Raises:
        RecipeError: there is no such recipe, it is not TOML, a key is none of `Recipe`'s, or a value is out of range.

    Example:
        >>> read_recipe("small_images", epochs=10).epochs
        10
    """
    path = Path(name).expanduser()
    known = recipe_names()
    if str(name) in known:
        text = (RECIPES / f"{name}.toml").read_text(encoding="utf-8")
    elif path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        raise RecipeError(f"There is no recipe {name}: expected {', '.join(known)}, or a TOML file.")
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"The recipe {name} is not TOML: {error}.") from None
    return make_recipe({**values, **changes}, f"The recipe {name}")


def recipe_names() -> list[str]:
    """Return the names of the package's recipes."""
    return sorted(entry.name.removesuffix(".toml") for entry in RECIPES.iterdir() if entry.name.endswith(".toml"))


def make_recipe(values: Mapping[str, Any], where: str) -> Recipe:
    """Make a recipe of a table, refusing keys that are none of `Recipe`'s."""
    known = [entry.name for entry in dataclasses.fields(Recipe)]
    foreign = [key for key in values if key not in known]
    if foreign:
        raise RecipeError(f"{where} has the unknown key {foreign[0]}: the keys are {', '.join(known)}.")
    return Recipe(**values)


def parse_change(text: str) -> tuple[str, Any]:
    """Read "key=value" as TOML does; a bare word is a string."""
    key, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"Expected KEY=VALUE, such as epochs=10; found {text!r}.")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def _as_kind(name: str, value: Any, kind: Any) -> Any:
    """Return the value as the type of its field, widening integers to floats and lists to tuples."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for option in kinds:
        origin = typing.get_origin(option) or option
        if origin is types.NoneType and value is None:
            return None
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
    expected = " or ".join(str(getattr(typing.get_origin(k) or k, "__name__", k)) for k in kinds)
    raise RecipeError(f"{name} is {value!r}: expected {expected}.")
