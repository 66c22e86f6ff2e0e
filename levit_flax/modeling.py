"""The three LeViT models.

All three are Linen modules with the same parameter tree: `stem`, `stage_0/block_0/{attention,mlp}`,
`downsample_0/{attention,mlp}`, `head`, `head_dist`. Images are channels last.

Source: Graham et al. 2021, "LeViT: a Vision Transformer in ConvNet's Clothing for Faster Inference" (section 4);
facebookresearch/LeViT levit.py; transformers modeling_levit.py.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, PrecisionLike

from .blocks import _Downsample, _rematerialized, _Stage, _Stem
from .configuration import LevitConfig
from .image_processing import LevitImageProcessor
from .layers import _at_least_float32, _NormLinear
from .modeling_errors import _explained
from .modeling_inputs import _check_features, _check_pixel_values
from .modeling_outputs import (
    LevitForImageClassificationOutput,
    LevitForImageClassificationWithTeacherOutput,
    LevitModelOutput,
    classification_loss,
)

Variables = dict[str, Any]  # {"params": ..., "batch_stats": ...}


class LevitBase(nn.Module):
    """The fields, methods and backbone that the three models share.

    Attributes:
        config: the architecture.
        folded: whether the batch norms are folded into the layers next to them. A folded model has no batch statistics
            and cannot be trained.
        dtype: dtype of the computation; None for float32, or float64 if `param_dtype` is float64. Batch norm and
            softmax are always computed in float32 or float64.
        param_dtype: dtype of the parameters that `init` creates.
        precision: precision of matrix products and convolutions, as in `jax.lax.Precision`; None for JAX's default,
            which is lower than float32 on GPU and TPU.
        remat: keep only the input of each block and downsampling for the backward pass, which computes the rest again.
            Training then needs less memory and more time. Outputs and gradients are the same.

    Examples:
        >>> model = LevitModel(LevitConfig(image_size=64), precision="highest")
        >>> isinstance(model, LevitBase), model.config.image_size, model.folded
        (True, 64, False)
    """

    config: LevitConfig
    folded: bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    remat: bool = False

    head_names: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        dtype: Any = None,
        torch_dtype: Any = None,
        image_size: int | tuple[int, int] | None = None,
        num_labels: int | None = None,
        num_channels: int | None = None,
        key: jax.Array | None = None,
        ignore_mismatched_sizes: bool = False,
        subfolder: str = "",
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> "tuple[LevitBase, Variables]":
        """Load a checkpoint as a model of this class.

        Heads of the checkpoint that this class does not have are dropped. Heads that the checkpoint does not have are
        newly initialized. Dropping `head_dist` or initializing a head issues a warning.

        Args:
            source: a directory, a Hub id such as "facebook/levit-128S", or "cifar10", the small model in the package.
            dtype: dtype of the floating-point arrays; None keeps the checkpoint's, but at least float32.
            torch_dtype: another name of `dtype`, as in transformers.
            image_size: input size in pixels, one side or (height, width); None keeps the checkpoint's.
            num_labels: number of classes; None keeps the checkpoint's, 0 removes the heads.
            num_channels: channels of the input images; None keeps the checkpoint's.
            key: random key for newly initialized heads; None for `jax.random.key(0)`.
            ignore_mismatched_sizes: no effect; accepted because transformers requires it to change the number of
                classes.
            subfolder: folder of the directory or repository that contains the model.
            revision: branch, tag or commit of a Hub repository; None for its main branch.
            token: access token for the Hub; None for the one stored by `hf auth login` or in HF_TOKEN.
            cache_dir: directory for downloads; None for huggingface_hub's own cache.
            local_files_only: do not access the network.

        Returns:
            The module and its variables, {"params": ..., "batch_stats": ...}, as JAX arrays.

        Raises:
            ValueError: a file is malformed, or weights do not fit the config; `ConversionError` for PyTorch weights.
            OSError: the source does not exist, or cannot be read or downloaded.

        Examples:
            >>> backbone, variables = LevitModel.from_pretrained("cifar10")
            >>> "head" in variables["params"]
            False
        """
        from .loading import _change_heads, from_pretrained

        model, variables = from_pretrained(
            source,
            dtype=dtype,
            torch_dtype=torch_dtype,
            image_size=image_size,
            num_labels=num_labels,
            num_channels=num_channels,
            key=key,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            subfolder=subfolder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        return _change_heads(model, variables, cls, key)

    @nn.nowrap
    def save_pretrained(
        self,
        directory: str | Path,
        variables: Mapping[str, Any],
        *,
        processor: LevitImageProcessor | None = None,
        overwrite: bool = False,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        """Save this model and its variables; see `levit_flax.save_pretrained`.

        Args:
            directory: the directory to write; created if it does not exist.
            variables: the model's variables.
            processor: image processor to save with the model; None for none.
            overwrite: replace the model in a directory that is not empty; other files in it are kept.
            provenance: JSON values that describe the origin of the weights, stored in `config.json`.

        Raises:
            FileExistsError: the directory is not empty and `overwrite` is False.
            ValueError: the variables do not fit the model.
            OSError: the directory cannot be written.

        Examples:
            >>> import tempfile
            >>> backbone, variables = LevitModel.from_pretrained("cifar10")
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     backbone.save_pretrained(f"{folder}/backbone", variables)
            ...     type(LevitModel.from_pretrained(f"{folder}/backbone")[0]).__name__
            'LevitModel'
        """
        from .checkpoint import save_pretrained

        save_pretrained(directory, self, variables, processor, overwrite, provenance)

    @nn.nowrap
    def push_to_hub(
        self,
        repo_id: str,
        variables: Mapping[str, Any],
        *,
        processor: LevitImageProcessor | None = None,
        token: str | None = None,
        private: bool = False,
        revision: str | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Upload this model and its variables to the Hub; see `levit_flax.push_to_hub`.

        Args:
            repo_id: the repository as "owner/name"; without an owner, that of the token's user.
            variables: the model's variables.
            processor: image processor to upload with the model; None for none.
            token: access token with write permission; None for the one stored by `hf auth login` or in HF_TOKEN.
            private: create the repository as private; no effect if it exists.
            revision: the branch to upload to, which must exist; None for the main branch.
            commit_message: first line of the commit message; None for "Upload LeViT model".

        Returns:
            The URL of the repository.

        Raises:
            ValueError: the variables do not fit the model.
            HubError: the upload failed.

        Examples:
            >>> backbone, variables = LevitModel.from_pretrained("cifar10")
            >>> url = backbone.push_to_hub("someone/backbone", variables)  # with the token of `hf auth login`
        """
        from .loading import push_to_hub

        return push_to_hub(
            repo_id,
            self,
            variables,
            processor,
            token=token,
            private=private,
            revision=revision,
            commit_message=commit_message,
        )

    @property
    def _shared(self) -> dict[str, Any]:
        """The fields that are passed on to every layer, with `dtype` resolved."""
        dtype = self.dtype or _at_least_float32(self.param_dtype)
        return {
            "folded": self.folded,
            "dtype": dtype,
            "param_dtype": self.param_dtype,
            "precision": self.precision,
        }

    def _backbone(
        self,
        pixel_values: jax.Array,
        train: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_features: bool | Sequence[int] = False,
    ) -> LevitModelOutput:
        """Compute the output of the model without heads; the arguments are those of `LevitModel`."""
        config, shared = self.config, self._shared
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if output_attentions is None:
            output_attentions = config.output_attentions
        _check_pixel_values(pixel_values, config)
        selected = _check_features(output_features, config.num_stages)
        if train and self.folded:
            raise ValueError(
                "A folded model cannot be trained: expected a model with folded=False, found folded=True. Train the"
                " model before calling fold_batch_norm."
            )
        stem = _Stem(config.hidden_sizes[0], config.kernel_size, config.stride, config.padding, **shared, name="stem")
        x = stem(pixel_values.astype(shared["dtype"]), train)  # [B N C]
        # Without a head, the stages after the last selected one are not needed.
        truncated = selected and not self.head_names and not self.is_initializing()
        last = max(selected) if truncated else config.num_stages - 1
        complete = last == config.num_stages - 1
        downsample = _rematerialized(_Downsample) if self.remat else _Downsample
        hidden_states, attentions, features = [x], [], []
        for i, (grid, width) in enumerate(zip(config.grids[: last + 1], config.hidden_sizes, strict=False)):
            x, maps = _Stage(config=config, index=i, remat=self.remat, **shared, name=f"stage_{i}")(x, train)
            attentions += maps
            features.append(x.reshape(x.shape[0], *grid, width))
            if i < last:
                x, attention = downsample(config=config, index=i, **shared, name=f"downsample_{i}")(x, train)
                attentions.append(attention)
            if i < last or complete:
                hidden_states.append(x)
        return LevitModelOutput(
            last_hidden_state=x if complete else None,
            pooler_output=x.mean(1) if complete else None,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            features=tuple(features[i] for i in selected) if selected else None,
        )

    def _returns_dict(self, return_dict: bool | None) -> bool:
        return self.config.return_dict if return_dict is None else return_dict

    def _apply_head(self, name: str, pooled: jax.Array | None, train: bool) -> jax.Array:
        """Map pooled features [B C] to logits [B num_labels], or return them unchanged if there are no classes."""
        assert pooled is not None  # the model with heads computes every stage
        if self.config.num_labels == 0:
            return pooled
        return _NormLinear(self.config.num_labels, **self._shared, name=name)(pooled, train)


class LevitModel(LevitBase):
    """LeViT without a classifier.

    Examples:
        >>> model = LevitModel(LevitConfig(image_size=64))
        >>> pixel_values = jnp.zeros((2, 64, 64, 3))
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), pixel_values)
        >>> out = jax.eval_shape(lambda v, x: model.apply(v, x, output_features=True), variables, pixel_values)
        >>> out.pooler_output.shape, [feature.shape for feature in out.features]
        ((2, 384), [(2, 4, 4, 128), (2, 2, 2, 256), (2, 1, 1, 384)])
    """

    @nn.compact
    @_explained
    def __call__(
        self,
        pixel_values: jax.Array,
        *,
        train: bool = False,
        return_dict: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_features: bool | Sequence[int] = False,
    ) -> LevitModelOutput | tuple[Any, ...]:
        """Compute the features of a batch of images.

        Args:
            pixel_values: float [B H W C], normalized as by `LevitImageProcessor`.
            train: run in training mode: normalize with the statistics of the batch, update the running statistics, and
                apply stochastic depth. Pass `mutable=["batch_stats"]` to `apply`, and, if the config's
                `drop_path_rate` is above 0, `rngs={"drop_path": key}`. `apply` then returns the output together with
                the new batch statistics.
            return_dict: return an output object; False returns a tuple of its fields that are not None. None uses the
                config's `return_dict`, which is True by default.
            output_hidden_states: also return the tokens after the stem and after each stage; None uses the config's.
            output_attentions: also return the attention weights of every block and downsampling; None uses the
                config's.
            output_features: also return the feature map [B H W C] of each stage, or of the stages with these indices,
                in their order. Negative indices count from the end. The stages after the last of these indices are not
                computed, so that `last_hidden_state` and `pooler_output` are None.

        Returns:
            A `LevitModelOutput`, or a tuple.

        Raises:
            ValueError: the batch or the variables do not fit the model, there is no stage with an index, or `train` is
                True and the model is folded, or `mutable` or the key is missing.

        Examples:
            >>> model = LevitModel(LevitConfig(image_size=32, drop_path_rate=0.1))
            >>> pixel_values, key = jnp.zeros((2, 32, 32, 3)), jax.random.key(0)
            >>> variables = jax.eval_shape(model.init, key, pixel_values)
            >>> def step(variables, pixel_values, key):
            ...     rngs = {"drop_path": key}
            ...     return model.apply(variables, pixel_values, train=True, rngs=rngs, mutable=["batch_stats"])
            >>> output, updates = jax.eval_shape(step, variables, pixel_values, key)
            >>> output.pooler_output.shape, list(updates)
            ((2, 384), ['batch_stats'])
        """
        output = self._backbone(pixel_values, train, output_hidden_states, output_attentions, output_features)
        return output if self._returns_dict(return_dict) else output.to_tuple()


class LevitForImageClassification(LevitBase):
    """LeViT with one classifier head.

    The published checkpoints have two heads. Their accuracies refer to `LevitForImageClassificationWithTeacher`.

    Examples:
        >>> model = LevitForImageClassification(LevitConfig(image_size=32, num_labels=4))
        >>> pixel_values, labels = jnp.zeros((2, 32, 32, 3)), jnp.array([0, 3])
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), pixel_values)
        >>> jax.eval_shape(model.apply, variables, pixel_values, labels).loss.shape
        ()
    """

    head_names = ("head",)

    @nn.compact
    @_explained
    def __call__(
        self,
        pixel_values: jax.Array,
        labels: jax.Array | None = None,
        *,
        train: bool = False,
        return_dict: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_features: bool | Sequence[int] = False,
    ) -> LevitForImageClassificationOutput | tuple[Any, ...]:
        """Classify a batch of images, and compute the loss if labels are given.

        Args:
            pixel_values: float [B H W C], normalized as by `LevitImageProcessor`.
            labels: class indices [B], or targets [B num_labels], as in `classification_loss`; None computes no loss.
                The config's `problem_type` selects the loss.
            train: run in training mode; pass `mutable=["batch_stats"]` and `rngs={"drop_path": key}` to `apply`, as
                for `LevitModel`.
            return_dict: return an output object; False returns a tuple of its fields that are not None. None uses the
                config's `return_dict`, which is True by default.
            output_hidden_states: also return the tokens after the stem and after each stage; None uses the config's.
            output_attentions: also return the attention weights of every block and downsampling; None uses the
                config's.
            output_features: also return the feature map [B H W C] of each stage, or of the stages with these indices.

        Returns:
            A `LevitForImageClassificationOutput`, or a tuple.

        Raises:
            ValueError: the batch or the variables do not fit the model, or `train` is True and the model is folded, or
                `mutable` or the key is missing.
        """
        features = self._backbone(pixel_values, train, output_hidden_states, output_attentions, output_features)
        logits = self._apply_head("head", features.pooler_output, train)
        output = LevitForImageClassificationOutput(
            loss=None if labels is None else classification_loss(logits, labels, self.config.problem_type),
            logits=logits,
            hidden_states=features.hidden_states,
            attentions=features.attentions,
            features=features.features,
        )
        return output if self._returns_dict(return_dict) else output.to_tuple()


class LevitForImageClassificationWithTeacher(LevitBase):
    """LeViT with two classifier heads, whose logits are averaged.

    `head` is trained on the labels, `head_dist` on the predictions of a teacher.

    Examples:
        >>> model, variables = LevitForImageClassificationWithTeacher.from_pretrained("cifar10")
        >>> out = jax.jit(model.apply)(variables, jnp.zeros((1, 144, 144, 3)))
        >>> bool(jnp.allclose(out.logits, (out.cls_logits + out.distillation_logits) / 2))
        True
    """

    head_names = ("head", "head_dist")

    @nn.compact
    @_explained
    def __call__(
        self,
        pixel_values: jax.Array,
        labels: None = None,
        *,
        train: bool = False,
        return_dict: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_features: bool | Sequence[int] = False,
    ) -> LevitForImageClassificationWithTeacherOutput | tuple[Any, ...]:
        """Classify a batch of images.

        The losses of the two heads depend on the teacher, so this model takes no labels. `levit_flax.training` computes
        them.

        Args:
            pixel_values: float [B H W C], normalized as by `LevitImageProcessor`.
            labels: must be None.
            train: run in training mode; pass `mutable=["batch_stats"]` and `rngs={"drop_path": key}` to `apply`, as
                for `LevitModel`.
            return_dict: return an output object; False returns a tuple of its fields that are not None. None uses the
                config's `return_dict`, which is True by default.
            output_hidden_states: also return the tokens after the stem and after each stage; None uses the config's.
            output_attentions: also return the attention weights of every block and downsampling; None uses the
                config's.
            output_features: also return the feature map [B H W C] of each stage, or of the stages with these indices.

        Returns:
            A `LevitForImageClassificationWithTeacherOutput`, or a tuple.

        Raises:
            ValueError: the batch or the variables do not fit the model, or `train` is True and the model is folded, or
                `mutable` or the key is missing.
            TypeError: `labels` is not None.
        """
        if labels is not None:
            raise TypeError(
                "A model with two heads takes no labels, because its loss depends on a teacher. Train it with"
                " levit_flax.training, or use LevitForImageClassification."
            )
        features = self._backbone(pixel_values, train, output_hidden_states, output_attentions, output_features)
        cls_logits = self._apply_head("head", features.pooler_output, train)
        distillation_logits = self._apply_head("head_dist", features.pooler_output, train)
        output = LevitForImageClassificationWithTeacherOutput(
            logits=(cls_logits + distillation_logits) / 2,
            cls_logits=cls_logits,
            distillation_logits=distillation_logits,
            hidden_states=features.hidden_states,
            attentions=features.attentions,
            features=features.features,
        )
        return output if self._returns_dict(return_dict) else output.to_tuple()


_MODEL_CLASSES: tuple[type[LevitBase], ...] = (
    LevitModel,
    LevitForImageClassification,
    LevitForImageClassificationWithTeacher,
)
