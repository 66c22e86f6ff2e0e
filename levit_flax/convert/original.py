"""LeViT in PyTorch with the tensor names of the original repository.

Verification uses it for checkpoints in that layout, because the original cannot be installed as a package. It was
written from the names in those checkpoints and from the paper, and shares no code with the Flax model. Requires
PyTorch.

Source: Graham et al. 2021, section 4; names of facebookresearch/LeViT levit.py.
"""

import itertools
from collections import OrderedDict

import torch
from torch import Tensor, nn

from levit_flax.configuration import LevitConfig


class _TokenNorm(nn.BatchNorm1d):
    """Batch norm over the batch and token axes."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize [B N C]."""
        return super().forward(x.flatten(0, 1)).view_as(x)


def _normed(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """Return a layer and its batch norm under the names `c` and `bn`."""
    return nn.Sequential(OrderedDict(c=layer, bn=norm))


def _linear(inputs: int, outputs: int, fused: bool) -> nn.Module:
    """Return the original `Linear_BN`, or its fused form."""
    if fused:
        return nn.Linear(inputs, outputs)
    return _normed(nn.Linear(inputs, outputs, bias=False), _TokenNorm(outputs))


def _conv(inputs: int, outputs: int, config: LevitConfig, fused: bool) -> nn.Module:
    """Return the original `Conv2d_BN`, or its fused form."""
    layer = nn.Conv2d(inputs, outputs, config.kernel_size, config.stride, config.padding, bias=fused)
    return layer if fused else _normed(layer, nn.BatchNorm2d(outputs))


def _head(inputs: int, outputs: int, fused: bool) -> nn.Module:
    """Return the original `BN_Linear`, or its fused form."""
    if fused:
        return nn.Linear(inputs, outputs)
    return nn.Sequential(OrderedDict(bn=nn.BatchNorm1d(inputs), l=nn.Linear(inputs, outputs)))


class _Residual(nn.Module):
    """Add the output of the inner module to its input."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        """Map [B N C] to [B N C]."""
        return x + self.m(x)


class _Attention(nn.Module):
    """Self-attention on a grid of tokens; with a stride, only every `stride`-th token in each direction is a query."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        key_dim: int,
        heads: int,
        ratio: int,
        grid: tuple[int, int],
        stride: int | None,
        fused: bool,
    ) -> None:
        super().__init__()
        self.heads, self.key_dim, self.grid, self.stride = heads, key_dim, grid, stride
        keys, values = heads * key_dim, heads * key_dim * ratio
        if stride is None:
            self.qkv = _linear(inputs, 2 * keys + values, fused)
        else:
            self.kv = _linear(inputs, keys + values, fused)
            self.q = nn.Sequential(nn.Identity(), _linear(inputs, keys, fused))
        self.proj = nn.Sequential(nn.Hardswish(), _linear(values, outputs, fused))
        self.attention_biases = nn.Parameter(torch.zeros(heads, grid[0] * grid[1]))
        self.register_buffer("attention_bias_idxs", self.offsets())

    def offsets(self) -> Tensor:
        """Return the bias index of every pair [Q K]; offsets are numbered in order of first occurrence."""
        height, width = self.grid
        points = [(y, x) for y in range(height) for x in range(width)]
        step = self.stride or 1
        seen: dict[tuple[int, int], int] = {}
        rows = [
            [seen.setdefault((abs(qy - ky), abs(qx - kx)), len(seen)) for ky, kx in points]
            for qy, qx in points
            if qy % step == 0 and qx % step == 0
        ]
        return torch.tensor(rows)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B K inputs] to [B Q outputs]."""
        batch = len(x)
        if self.stride is None:
            query, key, value = self.split(self.qkv(x), 2)
        else:
            coarse = x.view(batch, *self.grid, -1)[:, :: self.stride, :: self.stride].flatten(1, 2)
            [query] = self.split(self.q(coarse), 0)
            key, value = self.split(self.kv(x), 1)
        bias = self.attention_biases[:, self.attention_bias_idxs]
        attention = (query @ key.transpose(-2, -1) * self.key_dim**-0.5 + bias).softmax(-1)
        return self.proj((attention @ value).transpose(1, 2).flatten(2))

    def split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """Split each head's channels [B N C] into `parts` keys or queries and the rest, each [B H N D]."""
        x = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        sizes = [self.key_dim] * parts + [x.shape[-1] - parts * self.key_dim]
        return tuple(x.split(sizes, -1))


class _OriginalLevit(nn.Module):
    """The complete model; in evaluation mode, it returns the average of its heads' logits, as the original does."""

    def __init__(self, config: LevitConfig, heads: tuple[str, ...], fused: bool) -> None:
        super().__init__()
        widths, grids = config.hidden_sizes, config.grids
        stem: list[nn.Module] = []
        channels = [config.num_channels, widths[0] // 8, widths[0] // 4, widths[0] // 2, widths[0]]
        for inputs, outputs in itertools.pairwise(channels):
            stem += [_conv(inputs, outputs, config, fused), nn.Hardswish()]
        self.patch_embed = nn.Sequential(*stem[:-1])

        def mlp(width: int, ratio: int) -> list[nn.Module]:
            if not ratio:
                return []
            layers = _linear(width, ratio * width, fused), nn.Hardswish(), _linear(ratio * width, width, fused)
            return [_Residual(nn.Sequential(*layers))]

        blocks: list[nn.Module] = []
        for i, width in enumerate(widths):
            for _ in range(config.depths[i]):
                shape = config.key_dim[i], config.num_attention_heads[i], config.attention_ratio[i], grids[i]
                blocks += [_Residual(_Attention(width, width, *shape, None, fused)), *mlp(width, config.mlp_ratio[i])]
            if i < len(widths) - 1:
                op = config.down_ops[i]
                shape = op.key_dim, op.num_attention_heads, op.attention_ratio, grids[i]
                blocks += [
                    _Attention(width, widths[i + 1], *shape, op.stride, fused),
                    *mlp(widths[i + 1], op.mlp_ratio),
                ]
        self.blocks = nn.Sequential(*blocks)
        self.head_names = heads
        for name in heads:
            self.add_module(name, _head(widths[-1], config.num_labels, fused))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map [B C H W] to logits [B num_labels], or to the last stage's tokens [B N C] if there are no heads."""
        x = self.blocks(self.patch_embed(pixel_values).flatten(2).transpose(1, 2))
        if not self.head_names:
            return x
        return torch.stack([getattr(self, name)(x.mean(1)) for name in self.head_names]).mean(0)
