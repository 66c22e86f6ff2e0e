"""The parts of a LeViT: the stem, the stages and the downsampling between them.

Axes are named as in `levit_flax.attention`.
"""

from typing import Any

import flax.linen as nn
import jax

from .attention import _Attention, _DownsamplingAttention
from .configuration import LevitConfig
from .layers import _MLP, _ConvNorm, _drop_path, _Layer


def _rematerialized(layer: type[_Layer]) -> Any:
    """Return the class of layers that keep only their input for the backward pass."""
    return nn.remat(layer, static_argnums=2)  # `train`, counted from `self`


class _Stem(_Layer):
    """Four strided convolutions that turn an image into tokens (section 4.2 of the paper).

    Attributes:
        features: channels of the tokens, a multiple of 8. The first convolution has an eighth of them, and each of the
            others twice as many as the one before.
        kernel_size: side of the convolution kernels, in pixels.
        stride: stride of each convolution, in pixels.
        padding: zero padding on every side, in pixels.
    """

    features: int
    kernel_size: int
    stride: int
    padding: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map [B H W C] to tokens [B N features], in row-major order."""
        for i, divisor in enumerate((8, 4, 2, 1)):
            if i:
                x = nn.hard_swish(x)
            conv = _ConvNorm(
                self.features // divisor, self.kernel_size, self.stride, self.padding, **self.shared, name=f"conv_{i}"
            )
            x = conv(x, train)  # [B H W C], half the height and width
        return x.reshape(x.shape[0], -1, x.shape[-1])


class _Block(_Layer):
    """Attention and an MLP, each in a residual branch.

    Attributes:
        num_heads: as in `_BiasedAttention`.
        key_dim: as in `_BiasedAttention`.
        attention_ratio: as in `_BiasedAttention`.
        grid: as in `_BiasedAttention`.
        mlp_ratio: hidden channels of the MLP as a multiple of the stage's width; 0 for no MLP.
        drop_path_rate: probability in [0, 1) that a residual branch is dropped during training.
    """

    num_heads: int
    key_dim: int
    attention_ratio: int
    grid: tuple[int, int]
    mlp_ratio: int
    drop_path_rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Map [B N C] to [B N C], and also return the attention weights [B H N N]."""
        branch, attention = _Attention(
            num_heads=self.num_heads,
            key_dim=self.key_dim,
            attention_ratio=self.attention_ratio,
            grid=self.grid,
            **self.shared,
            name="attention",
        )(x, train)
        x = x + _drop_path(self, branch, self.drop_path_rate, train)
        if self.mlp_ratio:
            branch = _MLP(self.mlp_ratio * x.shape[-1], **self.shared, name="mlp")(x, train)
            x = x + _drop_path(self, branch, self.drop_path_rate, train)
        return x, attention


class _Stage(_Layer):
    """The blocks of one stage.

    Attributes:
        config: the architecture.
        index: index of the stage, from 0.
        remat: keep only the input of each block for the backward pass, which computes the rest again.
    """

    config: LevitConfig
    index: int
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, list[jax.Array]]:
        """Map [B N C] to [B N C], and also return the attention weights [B H N N] of each block."""
        config, attentions = self.config, []
        block = _rematerialized(_Block) if self.remat else _Block
        for i in range(config.depths[self.index]):
            x, attention = block(
                num_heads=config.num_attention_heads[self.index],
                key_dim=config.key_dim[self.index],
                attention_ratio=config.attention_ratio[self.index],
                grid=config.grids[self.index],
                mlp_ratio=config.mlp_ratio[self.index],
                drop_path_rate=config.drop_path_rate,
                **self.shared,
                name=f"block_{i}",
            )(x, train)
            attentions.append(attention)
        return x, attentions


class _Downsample(_Layer):
    """The step from one stage to the next: attention onto a coarser grid, then an MLP in a residual branch.

    Attributes:
        config: the architecture.
        index: index of the stage before this step, from 0.
    """

    config: LevitConfig
    index: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Map [B K C] to [B Q C'], and also return the attention weights [B H Q K]."""
        op = self.config.down_ops[self.index]
        x, attention = _DownsamplingAttention(
            features=self.config.hidden_sizes[self.index + 1],
            num_heads=op.num_attention_heads,
            key_dim=op.key_dim,
            attention_ratio=op.attention_ratio,
            grid=self.config.grids[self.index],
            stride=op.stride,
            **self.shared,
            name="attention",
        )(x, train)
        if op.mlp_ratio:
            branch = _MLP(op.mlp_ratio * x.shape[-1], **self.shared, name="mlp")(x, train)
            x = x + _drop_path(self, branch, self.config.drop_path_rate, train)
        return x, attention
