"""The parts that a LeViT is built from: the stem, the stages and the downsampling between them."""

import flax.linen as nn
import jax

from .attention import Attention, DownsamplingAttention
from .configuration import LevitConfig
from .layers import MLP, ConvNorm, Layer, drop_path


class Stem(Layer):
    """Turn an image into tokens by four strided convolutions (section 4.2 of the paper)."""

    features: int
    kernel_size: int
    stride: int
    padding: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map [B H W C] to tokens [B N features], row by row."""
        for i, share in enumerate((8, 4, 2, 1)):
            if i:
                x = nn.hard_swish(x)
            conv = ConvNorm(
                self.features // share, self.kernel_size, self.stride, self.padding, **self.shared, name=f"conv_{i}"
            )
            x = conv(x, train)
        return x.reshape(x.shape[0], -1, x.shape[-1])


class Block(Layer):
    """Attend, then apply the MLP, each as a residual branch.

    Attributes:
        num_heads: as in `BiasedAttention`, and so are key_dim, attention_ratio and grid.
        mlp_ratio: hidden channels of the MLP as a multiple of the width; 0 for no MLP.
        drop_path_rate: probability in [0, 1) that a branch is dropped while training.
    """

    num_heads: int
    key_dim: int
    attention_ratio: int
    grid: tuple[int, int]
    mlp_ratio: int
    drop_path_rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Map [B N C] to [B N C], and return the attention [B H N N] with it."""
        branch, attention = Attention(
            num_heads=self.num_heads,
            key_dim=self.key_dim,
            attention_ratio=self.attention_ratio,
            grid=self.grid,
            **self.shared,
            name="attention",
        )(x, train)
        x = x + drop_path(self, branch, self.drop_path_rate, train)
        if self.mlp_ratio:
            branch = MLP(self.mlp_ratio * x.shape[-1], **self.shared, name="mlp")(x, train)
            x = x + drop_path(self, branch, self.drop_path_rate, train)
        return x, attention


class Stage(Layer):
    """Apply the blocks of one stage.

    Attributes:
        config: the architecture.
        index: which of its stages.
    """

    config: LevitConfig
    index: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, list[jax.Array]]:
        """Map [B N C] to [B N C], and return the attention [B H N N] of each block with it."""
        config, attentions = self.config, []
        for i in range(config.depths[self.index]):
            x, attention = Block(
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


class Downsample(Layer):
    """Go from one stage to the next: attention onto the coarser grid, then an MLP as a residual branch.

    Attributes:
        config: the architecture.
        index: which stage it leaves.
    """

    config: LevitConfig
    index: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Map [B K C] to [B Q C'], and return the attention [B H Q K] with it."""
        op = self.config.down_ops[self.index]
        x, attention = DownsamplingAttention(
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
            branch = MLP(op.mlp_ratio * x.shape[-1], **self.shared, name="mlp")(x, train)
            x = x + drop_path(self, branch, self.config.drop_path_rate, train)
        return x, attention
