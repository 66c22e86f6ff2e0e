"""Attention with a learned bias per offset, within and between stages.

Axes: B batch, N tokens, Q queries, K keys, H heads, C channels, D channels per head. In images [B H W C], H and W are
height and width.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .layers import _at_least_float32, _Layer, _LinearNorm

_Grid = tuple[int, int]


@functools.cache
def _offset_index(grid: _Grid, stride: int = 1) -> np.ndarray:
    """Return the row of the attention-bias table for each pair of a query and a key.

    Keys are all tokens of `grid`. Queries are the tokens in every `stride`-th row and column. All pairs with the same
    offset (|dy|, |dx|) share the bias in row |dy| * width + |dx|.

    Args:
        grid: (height, width) of the keys, in tokens.
        stride: distance between neighboring queries, in tokens.

    Returns:
        int32 [Q K], read-only, with values in [0, height * width).

    Source: Graham et al. 2021, "Attention bias instead of a positional embedding". The original levit.py numbers the
        offsets in order of appearance, which gives the same order on square grids.
    """
    height, width = grid
    y, x = np.divmod(np.arange(height * width, dtype=np.int32), np.int32(width))
    query = np.flatnonzero((y % stride == 0) & (x % stride == 0))
    index = np.abs(y[query, None] - y[None]) * np.int32(width) + np.abs(x[query, None] - x[None])
    index.flags.writeable = False
    return index


class _BiasedAttention(_Layer, kw_only=True):
    """The base class of attention and downsampling attention.

    The parameter `attention_biases` is [N H], one row per offset. With the heads on the last axis, adaptive gradient
    clipping computes one norm per head, as it does in PyTorch, which stores the transpose.

    Attributes:
        num_heads: number of heads.
        key_dim: channels of a query or key, per head.
        attention_ratio: value channels as a multiple of `key_dim`.
        grid: (height, width) of the input tokens.
        stride: distance between neighboring queries, in tokens.
    """

    num_heads: int
    key_dim: int
    attention_ratio: int
    grid: _Grid
    stride: int = 1

    def split_heads(self, x: jax.Array, *channels: int) -> list[jax.Array]:
        """Split [B N C] into one [B N H D] per entry of `channels`. The channels of a head are contiguous in C."""
        x = x.reshape(*x.shape[:2], self.num_heads, -1)
        return jnp.split(x, np.cumsum(channels[:-1]), axis=-1)

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Compute softmax(query keyᵀ / sqrt(key_dim) + bias) value.

        Args:
            query: [B Q H D].
            key: [B K H D].
            value: [B K H D'].

        Returns:
            The mixed values [B Q H*D'] and the attention weights [B H Q K], which sum to 1 over K.
        """
        table = self.param(
            "attention_biases",
            nn.initializers.zeros,
            (self.grid[0] * self.grid[1], self.num_heads),
            self.param_dtype,
        )
        bias = table[_offset_index(self.grid, self.stride)].transpose(2, 0, 1)  # [H Q K]
        dtype = _at_least_float32(self.dtype)
        # The heads axis comes first, so that the products are plain matrix products (benchmarks/README.md).
        query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))  # [B H N D]
        products = jnp.matmul(query * self.key_dim**-0.5, key.swapaxes(2, 3), precision=self.precision)
        logits = products.astype(dtype) + bias.astype(dtype)[None]
        mixed, weights = self.mix(logits, value)
        mixed = mixed.astype(self.dtype).transpose(0, 2, 1, 3)
        return mixed.reshape(*mixed.shape[:2], -1), weights.astype(self.dtype)

    def mix(self, logits: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Compute softmax(logits) value.

        Args:
            logits: [B H Q K], float32 or float64.
            value: [B H K D'].

        Returns:
            The mixed values [B H Q D'] and the attention weights [B H Q K], in the dtype of the logits.
        """
        # The second product is divided, which has fewer entries than the weights (benchmarks/README.md).
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
        total = weights.sum(-1, keepdims=True)
        mixed = jnp.matmul(
            weights.astype(self.dtype), value, precision=self.precision, preferred_element_type=logits.dtype
        )  # not yet divided by `total`, and therefore too large for float16
        return mixed / total, weights / total


class _Attention(_BiasedAttention):
    """Attention over all tokens of a stage: `_Attention` of the original code, without the residual connection."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Map [B N C] to [B N C], and also return the attention weights [B H N N]."""
        value_dim = self.attention_ratio * self.key_dim
        qkv = _LinearNorm(self.num_heads * (2 * self.key_dim + value_dim), **self.shared, name="qkv")(x, train)
        mixed, attention = self.attend(*self.split_heads(qkv, self.key_dim, self.key_dim, value_dim))
        x = _LinearNorm(x.shape[-1], zero_scale=True, **self.shared, name="proj")(nn.hard_swish(mixed), train)
        return x, attention


class _DownsamplingAttention(_BiasedAttention):
    """Attention from the queries of a coarser grid to all tokens: `AttentionSubsample` of the original code.

    Attributes:
        features: channels of the result, the width of the next stage.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Map [B K C] to [B Q features], and also return the attention weights [B H Q K]."""
        value_dim = self.attention_ratio * self.key_dim
        kv = _LinearNorm(self.num_heads * (self.key_dim + value_dim), **self.shared, name="kv")(x, train)
        image = x.reshape(x.shape[0], *self.grid, x.shape[-1])  # [B H W C]
        coarse = image[:, :: self.stride, :: self.stride].reshape(x.shape[0], -1, x.shape[-1])  # [B Q C]
        query = _LinearNorm(self.num_heads * self.key_dim, **self.shared, name="q")(coarse, train)
        mixed, attention = self.attend(
            *self.split_heads(query, self.key_dim), *self.split_heads(kv, self.key_dim, value_dim)
        )
        return _LinearNorm(self.features, **self.shared, name="proj")(nn.hard_swish(mixed), train), attention
