"""The layers that LeViT is made of: convolution and norm, linear and norm, norm and linear, stochastic depth."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, PrecisionLike

from .training_convolution import training_convolution

# PyTorch's batch norm, which every published LeViT was trained with.
BATCH_NORM_EPSILON = 1e-5
BATCH_NORM_MOMENTUM = 0.1  # weight of the new batch; Flax and optax count the other way round, 0.9

# PyTorch's default for linear and convolution layers: uniform in ±1/sqrt(fan in).
torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def at_least_float32(dtype: Dtype) -> Dtype:
    """Return the type for sums over many values: float32, or float64 where that is asked for."""
    return jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32


class Layer(nn.Module, kw_only=True):
    """Hold the fields that every layer has and hands on to its children.

    Attributes:
        folded: batch norms are folded into their neighbors, so that there are none, and biases in their place.
        dtype: type of the computation.
        param_dtype: type of the parameters that `init` makes.
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
        """The fields above that Flax's own layers know."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype, "precision": self.precision}


class BatchNorm(Layer):
    """Normalize each channel over the batch while training, and by running statistics otherwise, as PyTorch does.

    Flax's own layer differs where it matters to a converted model: it puts the biased variance into the running
    statistics (a factor of 1 - 1/n, felt most in the head, where n is the batch size) and counts no batches.

    The collection `batch_stats` holds `mean` [C], `var` [C] and the int32 `count` of training batches seen. Statistics
    are computed in float32 at least.

    Attributes:
        zero_scale: start with scale 0 instead of 1, which makes a residual branch begin as nothing.

    Raises:
        ValueError: training on a single value per channel, whose variance is not defined.

    Source: torch.nn.BatchNorm1d; `bn_weight_init` in facebookresearch/LeViT levit.py.
    """

    zero_scale: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Normalize `x` [... C] over all axes but the last."""
        channels = x.shape[-1]
        init = nn.initializers.zeros if self.zero_scale else nn.initializers.ones
        scale = self.param("scale", init, (channels,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,), self.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), self.param_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), self.param_dtype)
        count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)

        def per_channel(values: jax.Array) -> jax.Array:
            return jnp.expand_dims(values, range(x.ndim - 1))

        dtype = at_least_float32(self.dtype)
        x = x.astype(dtype)
        if train:
            axes = tuple(range(x.ndim - 1))
            mean = x.mean(axes)
            # Its gradient by the mean is zero, a sum of deviations: not to compute it saves a pass over `x`.
            var = jnp.square(x - per_channel(jax.lax.stop_gradient(mean))).mean(axes)
            if not self.is_initializing():
                values = x.size // channels
                if values == 1:
                    raise ValueError(
                        "Batch norm needs more than one value per channel when training, but the batch holds one:"
                        " train with two images or more."
                    )
                unbiased = var * (values / (values - 1))
                for running, new in ((running_mean, mean), (running_var, unbiased)):
                    old = running.value.astype(dtype)
                    running.value = (old + BATCH_NORM_MOMENTUM * (new - old)).astype(running.value.dtype)
                count.value += 1
        else:
            mean, var = running_mean.value.astype(dtype), running_var.value.astype(dtype)
        factor = scale.astype(dtype) * jax.lax.rsqrt(var + BATCH_NORM_EPSILON)
        # One multiplication and one addition, as in PyTorch, with fewer sums over the batch on the way back.
        shift = bias.astype(dtype) - mean * factor
        return (x * per_channel(factor) + per_channel(shift)).astype(self.dtype)


class ConvNorm(Layer):
    """Convolve without bias, then batch-normalize (`Conv2d_BN` of the original code)."""

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
            # Not "SAME", which pads an even image on the right and at the bottom only.
            padding=self.padding,
            use_bias=self.folded,
            kernel_init=torch_uniform,
            conv_general_dilated=training_convolution(train),
            name="conv",
            **self.numerics,
        )(x)
        return x if self.folded else BatchNorm(**self.shared, name="norm")(x, train)


class LinearNorm(Layer):
    """Multiply without bias, then batch-normalize over batch and tokens (`Linear_BN` of the original code)."""

    features: int
    zero_scale: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map [B N C] to [B N features]."""
        # As one matrix: XLA takes twice as long on CPU for the kernel's gradient over two axes (benchmarks/README.md).
        rows = x.reshape(-1, x.shape[-1])
        linear = nn.Dense(
            self.features, use_bias=self.folded, kernel_init=torch_uniform, name="linear", **self.numerics
        )
        rows = linear(rows)
        if not self.folded:
            rows = BatchNorm(zero_scale=self.zero_scale, **self.shared, name="norm")(rows, train)
        return rows.reshape(*x.shape[:-1], self.features)


class NormLinear(Layer):
    """Batch-normalize, then multiply and add a bias (`BN_Linear` of the original code): a classifier head."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map [B C] to [B features]."""
        if not self.folded:
            x = BatchNorm(**self.shared, name="norm")(x, train)
        # The original truncates at ±2, a hundred standard deviations: a plain normal distribution.
        return nn.Dense(self.features, kernel_init=nn.initializers.normal(0.02), name="linear", **self.numerics)(x)


class MLP(Layer):
    """Widen, apply hard swish, and narrow again."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map [B N C] to [B N C]."""
        channels = x.shape[-1]
        x = nn.hard_swish(LinearNorm(self.hidden, **self.shared, name="up")(x, train))
        return LinearNorm(channels, zero_scale=True, **self.shared, name="down")(x, train)


def drop_path(module: nn.Module, branch: jax.Array, rate: float, train: bool) -> jax.Array:
    """Drop a residual branch for a random part of the batch while training, and scale up what is left.

    Args:
        module: the module that calls, for its random stream "drop_path".
        branch: [B ...].
        rate: probability in [0, 1) to drop the branch of one image, the same at every depth.
        train: False returns `branch` unchanged.

    Source: Huang et al. 2016, "Deep Networks with Stochastic Depth"; `Residual` in facebookresearch/LeViT levit.py.
    """
    if not train or rate == 0:
        return branch
    shape = (branch.shape[0],) + (1,) * (branch.ndim - 1)
    keep = jax.random.bernoulli(module.make_rng("drop_path"), 1 - rate, shape)
    return jnp.where(keep, branch / (1 - rate), jnp.zeros_like(branch))
