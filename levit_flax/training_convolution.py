"""The stem's convolution in training on CPU, as a matrix product.

XLA on CPU computes the gradients of a convolution much more slowly than those of a matrix product. With `nn.Conv`, a
training step takes 1.10 to 1.18 times as long (benchmarks/README.md).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import PrecisionLike


def _training_convolution(train: bool) -> Callable[..., jax.Array] | None:
    """Return the convolution function to pass to `nn.Conv`: None, the default, except for training on CPU."""
    return _convolve_patches if train and jax.default_backend() == "cpu" else None


def _take_patches(x: jax.Array, size: int, stride: int, padding: int) -> jax.Array:
    """Return the patches of `x` [B H W C] under a `size` x `size` kernel: [B H' W' size size C]."""
    widths = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    height, width = ((edge + 2 * padding - size) // stride + 1 for edge in x.shape[1:3])

    @jax.custom_jvp
    def gather(x: jax.Array) -> jax.Array:
        row, column, down, right = np.ogrid[:height, :width, :size, :size]
        columns = stride * column + right
        # Indices per image, so that XLA can shard the batch over devices.
        rows = jnp.broadcast_to(stride * row + down, (len(x), height, 1, size, 1))
        patches = jax.vmap(lambda image, rows: image[rows, columns])(jnp.pad(x, widths), rows)
        # XLA copies whole pixels only if these axes are not merged with later ones, so prevent fusion.
        unfused: jax.Array = jax.lax.optimization_barrier(patches)
        return unfused

    @gather.defjvp
    def differentiate(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
        # The same values as slices: slower than the gather, but their gradients are sums instead of scatters.
        x = jnp.pad(*tangents, widths)
        rows, columns = stride * (height - 1) + 1, stride * (width - 1) + 1
        slices = [
            x[:, down : down + rows : stride, right : right + columns : stride]
            for down, right in np.ndindex(size, size)
        ]
        return gather(*primals), jnp.stack(slices, -2).reshape(*slices[0].shape[:-1], size, size, -1)

    return gather(x)


def _convolve_patches(
    x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, *, precision: PrecisionLike, **_: Any
) -> jax.Array:
    """Compute `jax.lax.conv_general_dilated` as `_ConvNorm` uses it, with one matrix product."""
    size, features = kernel.shape[0], kernel.shape[-1]
    patches = _take_patches(x, size, strides[0], padding[0][0])
    columns = kernel.reshape(-1, features)
    y = jnp.dot(patches.reshape(-1, len(columns)), columns, precision=precision)
    return y.reshape(*patches.shape[:3], features)
