"""Attention with a learned bias per offset, at one resolution and from one resolution to the next."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .layers import Layer, LinearNorm, at_least_float32

Grid = tuple[int, int]


@functools.cache
def offset_index(grid: Grid, stride: int = 1) -> np.ndarray:
    """Return the row of the attention-bias table that belongs to each pair of a query and a key.

    Keys stand on `grid`, queries on every `stride`-th row and column of it. A pair shares its bias with all pairs at
    the same distance, and the distance (|dy|, |dx|) is row |dy| * width + |dx|.

    Args:
        grid: (height, width) of the keys, in tokens.
        stride: the step from one query to the next, in tokens.

    Returns:
        int32 [Q K], read-only, with values in [0, height * width).

    Source: Graham et al. 2021, "Attention bias instead of a positional embedding"; the original levit.py numbers
    offsets as it meets them, which comes to the same order on square grids.
    """
    height, width = grid
    y, x = np.divmod(np.arange(height * width, dtype=np.int32), np.int32(width))
    query = np.flatnonzero((y % stride == 0) & (x % stride == 0))
    index = np.abs(y[query, None] - y[None]) * np.int32(width) + np.abs(x[query, None] - x[None])
    index.flags.writeable = False
    return index


class BiasedAttention(Layer, kw_only=True):
    """What attention and downsampling attention share.

    The table `attention_biases` is [N H], offsets first: a norm over its first axis is then a norm per head, as
    PyTorch's adaptive gradient clipping takes it on the transpose.

    Attributes:
        num_heads: number of heads.
        key_dim: channels of a query or key, per head.
        attention_ratio: value channels per key channel.
        grid: (height, width) of the incoming tokens.
        stride: the step from one query to the next, in tokens.
    """

    num_heads: int
    key_dim: int
    attention_ratio: int
    grid: Grid
    stride: int = 1

    def split_heads(self, x: jax.Array, *channels: int) -> list[jax.Array]:
        """Split [B N C] into one [B N H D] per entry of `channels`; head after head, each with all of its parts."""
        x = x.reshape(*x.shape[:2], self.num_heads, -1)
        return jnp.split(x, np.cumsum(channels[:-1]), axis=-1)

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mix values by softmax of scaled products plus biases.

        Args:
            query: [B Q H D].
            key: [B K H D].
            value: [B K H D'].

        Returns:
            The mixed values [B Q H*D'] and the attention [B H Q K], whose rows sum to 1.
        """
        table = self.param(
            "attention_biases",
            nn.initializers.zeros,
            (self.grid[0] * self.grid[1], self.num_heads),
            self.param_dtype,
        )
        bias = table[offset_index(self.grid, self.stride)].transpose(2, 0, 1)  # [H Q K]
        dtype = at_least_float32(self.dtype)
        # Products of whole matrices, heads in front, and the division after the second one, where there is less to
        # divide, take 6 % off the time of a model on CPU (benchmarks/README.md).
        query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))  # [B H N D]
        products = jnp.matmul(query * self.key_dim**-0.5, key.swapaxes(2, 3), precision=self.precision)
        logits = products.astype(dtype) + bias.astype(dtype)[None]
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
        total = weights.sum(-1, keepdims=True)
        mixed = jnp.matmul(
            weights.astype(self.dtype), value, precision=self.precision, preferred_element_type=dtype
        )  # of weights that do not sum to 1 yet, too large for float16
        mixed = (mixed / total).astype(self.dtype).transpose(0, 2, 1, 3)
        return mixed.reshape(*mixed.shape[:2], -1), (weights / total).astype(self.dtype)


class Attention(BiasedAttention):
    """Attend over all tokens of a stage (`Attention` of the original code, without its residual connection)."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Map [B N C] to [B N C], and return the attention [B H N N] with it."""
        value_dim = self.attention_ratio * self.key_dim
        qkv = LinearNorm(self.num_heads * (2 * self.key_dim + value_dim), **self.shared, name="qkv")(x, train)
        mixed, attention = self.attend(*self.split_heads(qkv, self.key_dim, self.key_dim, value_dim))
        x = LinearNorm(x.shape[-1], zero_scale=True, **self.shared, name="proj")(nn.hard_swish(mixed), train)
        return x, attention


class DownsamplingAttention(BiasedAttention):
    """Attend from a coarser grid to a finer one (`AttentionSubsample` of the original code), without a residual.

    Attributes:
        features: channels of the result, the width of the next stage.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Map [B K C] to [B Q features], and return the attention [B H Q K] with it."""
        value_dim = self.attention_ratio * self.key_dim
        kv = LinearNorm(self.num_heads * (self.key_dim + value_dim), **self.shared, name="kv")(x, train)
        image = x.reshape(x.shape[0], *self.grid, x.shape[-1])  # [B H W C]
        coarse = image[:, :: self.stride, :: self.stride].reshape(x.shape[0], -1, x.shape[-1])  # [B Q C]
        query = LinearNorm(self.num_heads * self.key_dim, **self.shared, name="q")(coarse, train)
        mixed, attention = self.attend(
            *self.split_heads(query, self.key_dim), *self.split_heads(kv, self.key_dim, value_dim)
        )
        return LinearNorm(self.features, **self.shared, name="proj")(nn.hard_swish(mixed), train), attention
