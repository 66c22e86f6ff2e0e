"""LeViT's layers: convolution and linear with batch norm, MLP, stochastic depth."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, PrecisionLike

from .training_convolution import _training_convolution

# The constants of PyTorch's batch norm, with which every published LeViT was trained.
_BATCH_NORM_EPSILON = 1e-5
_BATCH_NORM_MOMENTUM = 0.1  # weight of the new batch; Flax calls the weight of the old statistics momentum, here 0.9

# PyTorch's default initialization of linear and convolution layers: uniform in ±1/sqrt(fan_in).
_torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _at_least_float32(dtype: Dtype) -> Dtype:
    """Return the dtype for sums over many values: float64 if `dtype` is float64, else float32."""
    return jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32


class _Layer(nn.Module, kw_only=True):
    """The base class of all layers, with the fields that a layer passes to its children.

    Attributes:
        folded: whether batch norms are folded into the layers next to them, which then have biases.
        dtype: dtype of the computation.
        param_dtype: dtype of the parameters that `init` creates.
        precision: precision of matrix products and convolutions, as in `jax.lax.Precision`.
    """

    folded: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None

    @property
    def shared(self) -> dict[str, Any]:
        """The fields above, as keyword arguments for a child."""
        return {"folded": self.folded, **self.numerics}

    @property
    def numerics(self) -> dict[str, Any]:
        """The fields above that Flax's layers also have."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype, "precision": self.precision}


class _BatchNorm(_Layer):
    """PyTorch's batch norm: uses the statistics of the batch in training, and running statistics in evaluation.

    Flax's `nn.BatchNorm` is not equivalent. It updates the running variance with the biased variance, which differs by
    a factor of 1 - 1/n for n values per channel, and it does not count batches.

    The collection `batch_stats` contains `mean` [C], `var` [C] and the int32 `count` of training batches. Statistics
    are computed in float32 or float64.

    Attributes:
        zero_scale: initialize the scale to 0 instead of 1, so that a residual branch starts as zero.

    Raises:
        ValueError: a training batch has a single value per channel, whose variance is undefined.

    Source: torch.nn.BatchNorm1d; `bn_weight_init` in facebookresearch/LeViT levit.py.
    """

    zero_scale: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Normalize `x` [... C] over all axes except the last."""
        channels = x.shape[-1]
        init = nn.initializers.zeros if self.zero_scale else nn.initializers.ones
        scale = self.param("scale", init, (channels,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,), self.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), self.param_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), self.param_dtype)
        count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)

        def per_channel(values: jax.Array) -> jax.Array:
            return jnp.expand_dims(values, range(x.ndim - 1))

        dtype = _at_least_float32(self.dtype)
        x = x.astype(dtype)
        if train:
            axes = tuple(range(x.ndim - 1))
            mean = x.mean(axes)
            # The gradient of the variance with respect to the mean is zero; stopping it saves a pass over `x`.
            var = jnp.square(x - per_channel(jax.lax.stop_gradient(mean))).mean(axes)
            if not self.is_initializing():
                values = x.size // channels
                if values == 1:
                    raise ValueError(
                        "Training batch is too small for batch norm: expected more than one value per channel, found"
                        " 1. Train with two images or more."
                    )
                unbiased = var * (values / (values - 1))
                for running, new in ((running_mean, mean), (running_var, unbiased)):
                    old = running.value.astype(dtype)
                    running.value = (old + _BATCH_NORM_MOMENTUM * (new - old)).astype(running.value.dtype)
                count.value += 1
        else:
            mean, var = running_mean.value.astype(dtype), running_var.value.astype(dtype)
        factor = scale.astype(dtype) * jax.lax.rsqrt(var + _BATCH_NORM_EPSILON)
        # One multiplication and one addition, as in PyTorch, need fewer sums over the batch in the backward pass.
        shift = bias.astype(dtype) - mean * factor
        return (x * per_channel(factor) + per_channel(shift)).astype(self.dtype)


class _ConvNorm(_Layer):
    """Convolution without bias, then batch norm: `Conv2d_BN` of the original code."""

    features: int
    kernel_size: int
    stride: int
    padding: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map [B H W C] to [B H' W' features]."""
        x = nn.Conv(
            self.features,
            (self.kernel_size, self.kernel_size),
            strides=self.stride,
            # Not "SAME", which pads images of even size only on the right and at the bottom.
            padding=self.padding,
            use_bias=self.folded,
            kernel_init=_torch_uniform,
            conv_general_dilated=_training_convolution(train),
            name="conv",
            **self.numerics,
        )(x)
        return x if self.folded else _BatchNorm(**self.shared, name="norm")(x, train)


class _LinearNorm(_Layer):
    """Linear layer without bias, then batch norm over batch and tokens: `Linear_BN` of the original code."""

    features: int
    zero_scale: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map [B N C] to [B N features]."""
        # As one matrix, because XLA on CPU computes the kernel's gradient twice as fast (benchmarks/README.md).
        rows = x.reshape(-1, x.shape[-1])
        linear = nn.Dense(
            self.features, use_bias=self.folded, kernel_init=_torch_uniform, name="linear", **self.numerics
        )
        rows = linear(rows)
        if not self.folded:
            rows = _BatchNorm(zero_scale=self.zero_scale, **self.shared, name="norm")(rows, train)
        return rows.reshape(*x.shape[:-1], self.features)


class _NormLinear(_Layer):
    """Batch norm, then a linear layer with bias, as classifier head: `BN_Linear` of the original code."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map [B C] to [B features]."""
        if not self.folded:
            x = _BatchNorm(**self.shared, name="norm")(x, train)
        # The original truncates at ±2, which is 100 standard deviations and has no effect.
        return nn.Dense(self.features, kernel_init=nn.initializers.normal(0.02), name="linear", **self.numerics)(x)


class _MLP(_Layer):
    """Two linear layers with batch norm, and hard swish between them."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map [B N C] to [B N C]."""
        channels = x.shape[-1]
        x = nn.hard_swish(_LinearNorm(self.hidden, **self.shared, name="up")(x, train))
        return _LinearNorm(channels, zero_scale=True, **self.shared, name="down")(x, train)


def _drop_path(module: nn.Module, branch: jax.Array, rate: float, train: bool) -> jax.Array:
    """Drop a residual branch of randomly chosen images in training, and scale the others by 1 / (1 - rate).

    Args:
        module: the calling module, which provides the random stream "drop_path".
        branch: [B ...].
        rate: probability in [0, 1) that the branch of an image is dropped, the same at every depth.
        train: False returns `branch` unchanged.

    Source: Huang et al. 2016, "Deep Networks with Stochastic Depth"; `Residual` in facebookresearch/LeViT levit.py.
    """
    if not train or rate == 0:
        return branch
    shape = (branch.shape[0],) + (1,) * (branch.ndim - 1)
    keep = jax.random.bernoulli(module.make_rng("drop_path"), 1 - rate, shape)
    return jnp.where(keep, branch / (1 - rate), jnp.zeros_like(branch))
