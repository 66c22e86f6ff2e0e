"""The three LeViT models and their outputs.

All of them are pure-functional Linen modules over the same parameter tree: `stem`, `stage_0/block_0/{attention,mlp}`,
`downsample_0/{attention,mlp}`, `head`, `head_dist`. Images come in channels last.

Source: Graham et al. 2021, "LeViT: a Vision Transformer in ConvNet's Clothing for Faster Inference" (section 4);
facebookresearch/LeViT levit.py; transformers modeling_levit.py.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict
from flax.typing import Dtype, PrecisionLike

from .blocks import Downsample, Stage, Stem
from .configuration import MULTI_LABEL, REGRESSION, SINGLE_LABEL, LevitConfig
from .layers import NormLinear, at_least_float32
from .modeling_outputs import (
    LevitForImageClassificationOutput,
    LevitForImageClassificationWithTeacherOutput,
    LevitModelOutput,
)

Variables = dict[str, Any]  # {"params": ..., "batch_stats": ...}


def check_pixel_values(pixel_values: jax.Array, config: LevitConfig) -> None:
    """Raise ValueError unless `pixel_values` is a float batch [B H W C] of the config's size and channels."""
    shape, channels = pixel_values.shape, config.num_channels
    expected = (*config.image_height_width, channels)
    wanted = f"LeViT expects pixel_values [B H W C] = [B {' '.join(map(str, expected))}]"
    if len(shape) != 4:
        raise ValueError(f"{wanted}, but got {len(shape)} axes: {shape}. A single image needs a batch axis in front.")
    if shape[1:] == (channels, *expected[:2]) and shape[1:] != expected:
        raise ValueError(
            f"{wanted}, channels last, but got a channels-first batch {shape}: use"
            " jnp.transpose(pixel_values, (0, 2, 3, 1))."
        )
    if shape[3] != channels:
        raise ValueError(f"{wanted}, but got {shape[3]} channels in {shape}: the config's num_channels is {channels}.")
    if shape[1:] != expected:
        raise ValueError(
            f"{wanted}, but got {shape[1]}x{shape[2]} pixels: resize the images with LevitImageProcessor, or give the"
            f" model another image_size."
        )
    if not jnp.issubdtype(pixel_values.dtype, jnp.floating):
        raise ValueError(
            f"{wanted} in floating point, but got {pixel_values.dtype}: LevitImageProcessor rescales and normalizes"
            " images."
        )


def classification_loss(logits: jax.Array, labels: jax.Array, problem_type: str | None = None) -> jax.Array:
    """Return the mean loss over a batch, as transformers computes it.

    Args:
        logits: [B num_labels].
        labels: class indices [B] for single-label, 0 or 1 per class [B num_labels] for multi-label, and targets [B] or
            [B num_labels] for regression.
        problem_type: None infers regression from a single logit, single-label from integer labels, else multi-label.

    Returns:
        A scalar: squared error, cross entropy of the softmax, or binary cross entropy of the sigmoids.

    Example:
        >>> logits = jnp.array([[2.0, 0.0], [0.0, 2.0]])
        >>> round(float(classification_loss(logits, jnp.array([0, 1]))), 4)  # in nats
        0.1269
        >>> round(float(classification_loss(logits, jnp.array([[1.0, 0.0], [0.0, 1.0]]))), 4)  # a sigmoid per class
        0.41

    Source: `ForSequenceClassificationLoss` in transformers loss/loss_utils.py, but nothing is written into the config.
    """
    if problem_type is None:
        if logits.shape[-1] == 1:
            problem_type = REGRESSION
        elif jnp.issubdtype(labels.dtype, jnp.integer):
            problem_type = SINGLE_LABEL
        else:
            problem_type = MULTI_LABEL
    if problem_type == SINGLE_LABEL:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels.reshape(-1)).mean()
    labels = labels.reshape(logits.shape).astype(logits.dtype)
    if problem_type == REGRESSION:
        return jnp.square(logits - labels).mean()
    return optax.sigmoid_binary_cross_entropy(logits, labels).mean()


class LevitBase(nn.Module):
    """Hold the fields and the backbone that the three models share.

    Attributes:
        config: the architecture.
        folded: the batch norms are folded into their neighbors; no batch statistics, and no training of them.
        dtype: type of the computation; None for float32, or float64 where the parameters are. Batch norm and softmax
            are computed in float32 at least.
        param_dtype: type of the parameters that `init` makes.
        precision: precision of matrix products and convolutions, as in `jax.lax.Precision`; None for JAX's default,
            which on GPU and TPU is below float32.
    """

    config: LevitConfig
    folded: bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None

    head_names: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> "tuple[LevitBase, Variables]":
        """Load a checkpoint as a model of this class.

        Args:
            source: as in `levit_flax.from_pretrained`.
            **options: as in `levit_flax.from_pretrained`.

        Returns:
            The module and its variables. Heads that the class has no place for are left out, and heads that the
            checkpoint lacks are fresh; a warning says so.

        Raises:
            ValueError: the files do not hold what they should.
            OSError: there is no such source, or it cannot be read or fetched.

        Example:
            >>> backbone, variables = LevitModel.from_pretrained("cifar10")
            >>> "head" in variables["params"]
            False
        """
        from .loading import change_heads, from_pretrained

        return change_heads(*from_pretrained(source, **options), cls, options.get("key"))

    @nn.nowrap
    def save_pretrained(self, directory: str | Path, variables: Mapping[str, Any], **options: Any) -> None:
        """Write this model and its variables to a directory; the options are those of `levit_flax.save_pretrained`.

        Example:
            >>> import tempfile
            >>> backbone, variables = LevitModel.from_pretrained("cifar10")
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     backbone.save_pretrained(f"{folder}/backbone", variables)
            ...     type(LevitModel.from_pretrained(f"{folder}/backbone")[0]).__name__
            'LevitModel'
        """
        from .checkpoint import save_pretrained

        save_pretrained(directory, self, variables, **options)

    @nn.nowrap
    def push_to_hub(self, repo_id: str, variables: Mapping[str, Any], **options: Any) -> str:
        """Upload this model and its variables to the Hub; the options are those of `levit_flax.push_to_hub`.

        Example:
            >>> backbone, variables = LevitModel.from_pretrained("cifar10")
            >>> address = backbone.push_to_hub("someone/backbone", variables)  # with the token of `hf auth login`
        """
        from .loading import push_to_hub

        return push_to_hub(repo_id, self, variables, **options)

    @property
    def shared(self) -> dict[str, Any]:
        """The fields that every layer takes, with the computation's type settled."""
        dtype = self.dtype or at_least_float32(self.param_dtype)
        return {
            "folded": self.folded,
            "dtype": dtype,
            "param_dtype": self.param_dtype,
            "precision": self.precision,
        }

    def backbone(
        self,
        pixel_values: jax.Array,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_features: bool = False,
    ) -> LevitModelOutput:
        """Compute everything but the heads; the arguments are those of the models."""
        config, shared = self.config, self.shared
        check_pixel_values(pixel_values, config)
        if train and self.folded:
            raise ValueError("A folded model has no batch norm left to train: train before fold_batch_norm.")
        stem = Stem(config.hidden_sizes[0], config.kernel_size, config.stride, config.padding, **shared, name="stem")
        x = stem(pixel_values.astype(shared["dtype"]), train)  # [B N C]
        hidden_states, attentions, features = [x], [], []
        for i, (grid, width) in enumerate(zip(config.grids, config.hidden_sizes, strict=True)):
            x, maps = Stage(config=config, index=i, **shared, name=f"stage_{i}")(x, train)
            attentions += maps
            features.append(x.reshape(x.shape[0], *grid, width))
            if i < config.num_stages - 1:
                x, attention = Downsample(config=config, index=i, **shared, name=f"downsample_{i}")(x, train)
                attentions.append(attention)
            hidden_states.append(x)
        return LevitModelOutput(
            last_hidden_state=x,
            pooler_output=x.mean(1),
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            features=tuple(features) if output_features else None,
        )

    def apply_head(self, name: str, pooled: jax.Array, train: bool) -> jax.Array:
        """Map pooled features [B C] to logits [B num_labels]; without classes, return them as they are."""
        if self.config.num_labels == 0:
            return pooled
        return NormLinear(self.config.num_labels, **self.shared, name=name)(pooled, train)


class LevitModel(LevitBase):
    """Compute LeViT's features, without a classifier.

    Example:
        >>> model = LevitModel(LevitConfig(image_size=64))
        >>> pixel_values = jnp.zeros((2, 64, 64, 3))
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), pixel_values)
        >>> out = jax.eval_shape(lambda v, x: model.apply(v, x, output_features=True), variables, pixel_values)
        >>> out.pooler_output.shape, [feature.shape for feature in out.features]
        ((2, 384), [(2, 4, 4, 128), (2, 2, 2, 256), (2, 1, 1, 384)])
    """

    @nn.compact
    def __call__(
        self, pixel_values: jax.Array, *, train: bool = False, return_dict: bool = True, **output_flags: bool
    ) -> LevitModelOutput | tuple[Any, ...]:
        """Compute the features of a batch of images.

        Args:
            pixel_values: float [B H W C], normalized as `LevitImageProcessor` does.
            train: use and update batch statistics (`mutable=["batch_stats"]`), and drop residual branches (random
                stream "drop_path", needed where the config's rate is above 0).
            return_dict: False returns `.to_tuple()`.
            **output_flags: `output_hidden_states`, `output_attentions` and `output_features` fill those fields.

        Returns:
            The features.

        Raises:
            ValueError: the batch does not fit the config; the message says how to mend it.
        """
        output = self.backbone(pixel_values, train, **output_flags)
        return output if return_dict else output.to_tuple()


class LevitForImageClassification(LevitBase):
    """Classify images with one head.

    The published checkpoints have two heads: their accuracies belong to `LevitForImageClassificationWithTeacher`.

    Example:
        >>> model = LevitForImageClassification(LevitConfig(image_size=32, num_labels=4))
        >>> pixel_values, labels = jnp.zeros((2, 32, 32, 3)), jnp.array([0, 3])
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), pixel_values)
        >>> jax.eval_shape(model.apply, variables, pixel_values, labels).loss.shape
        ()
    """

    head_names = ("head",)

    @nn.compact
    def __call__(
        self,
        pixel_values: jax.Array,
        labels: jax.Array | None = None,
        *,
        train: bool = False,
        return_dict: bool = True,
        **output_flags: bool,
    ) -> LevitForImageClassificationOutput | tuple[Any, ...]:
        """Classify a batch of images, and compute the loss where labels are given.

        Args:
            pixel_values: as in `LevitModel`.
            labels: as in `classification_loss`; the config's `problem_type` chooses the loss.
            train: as in `LevitModel`.
            return_dict: False returns `.to_tuple()`.
            **output_flags: as in `LevitModel`.

        Returns:
            The logits, and the loss where labels are given.

        Raises:
            ValueError: the batch does not fit the config; the message says how to mend it.
        """
        features = self.backbone(pixel_values, train, **output_flags)
        logits = self.apply_head("head", features.pooler_output, train)
        output = LevitForImageClassificationOutput(
            loss=None if labels is None else classification_loss(logits, labels, self.config.problem_type),
            logits=logits,
            hidden_states=features.hidden_states,
            attentions=features.attentions,
            features=features.features,
        )
        return output if return_dict else output.to_tuple()


class LevitForImageClassificationWithTeacher(LevitBase):
    """Classify images with two heads, one taught by the labels and one by a teacher, and average them.

    Example:
        >>> model, variables = LevitForImageClassificationWithTeacher.from_pretrained("cifar10")
        >>> out = jax.jit(model.apply)(variables, jnp.zeros((1, 144, 144, 3)))
        >>> bool(jnp.allclose(out.logits, (out.cls_logits + out.distillation_logits) / 2))
        True
    """

    head_names = ("head", "head_dist")

    @nn.compact
    def __call__(
        self, pixel_values: jax.Array, *, train: bool = False, return_dict: bool = True, **output_flags: bool
    ) -> LevitForImageClassificationWithTeacherOutput | tuple[Any, ...]:
        """Classify a batch of images.

        Args:
            pixel_values: as in `LevitModel`.
            train: as in `LevitModel`.
            return_dict: False returns `.to_tuple()`.
            **output_flags: as in `LevitModel`.

        Returns:
            The averaged logits and those of each head.

        Raises:
            ValueError: the batch does not fit the config; the message says how to mend it.
        """
        features = self.backbone(pixel_values, train, **output_flags)
        cls_logits = self.apply_head("head", features.pooler_output, train)
        distillation_logits = self.apply_head("head_dist", features.pooler_output, train)
        output = LevitForImageClassificationWithTeacherOutput(
            logits=(cls_logits + distillation_logits) / 2,
            cls_logits=cls_logits,
            distillation_logits=distillation_logits,
            hidden_states=features.hidden_states,
            attentions=features.attentions,
            features=features.features,
        )
        return output if return_dict else output.to_tuple()


MODEL_CLASSES: tuple[type[LevitBase], ...] = (
    LevitModel,
    LevitForImageClassification,
    LevitForImageClassificationWithTeacher,
)


def abstract_variables(model: LevitBase) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and type of every variable of a model by its path, such as "params/stem/conv_0/conv/kernel".

    Nothing is computed, and no memory is taken.
    """
    # Tracing takes half a second for a large model, and these fields have no part in its outcome.
    traced = _trace_variables(model.clone(dtype=None, param_dtype=jnp.float32, precision=None))
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, model.param_dtype) if leaf.dtype == jnp.float32 else leaf
        for path, leaf in traced.items()
    }


@functools.lru_cache(maxsize=8)
def _trace_variables(model: LevitBase) -> dict[str, jax.ShapeDtypeStruct]:
    config = model.config
    pixel_values = jax.ShapeDtypeStruct((1, *config.image_height_width, config.num_channels), jnp.float32)
    return flatten_dict(jax.eval_shape(model.init, jax.random.key(0), pixel_values), sep="/")
