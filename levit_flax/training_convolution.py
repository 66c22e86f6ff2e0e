"""The stem's convolution during training on CPU, as a matrix product.

XLA computes the gradients of a convolution on CPU much more slowly than those of matrix products: a whole training
step takes 1.10 to 1.18 times as long with `nn.Conv` (benchmarks/README.md).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import PrecisionLike


def training_convolution(train: bool) -> Callable[..., jax.Array] | None:
    """Return the function that `nn.Conv` convolves with, or None for its own: only training on CPU needs another."""
    return _convolve_patches if train and jax.default_backend() == "cpu" else None


def _take_patches(x: jax.Array, size: int, stride: int, padding: int) -> jax.Array:
    """Copy what a kernel of `size` x `size` sees of `x` [B H W C] at each of its places: [B H' W' size size C]."""
    widths = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    height, width = ((edge + 2 * padding - size) // stride + 1 for edge in x.shape[1:3])

    @jax.custom_jvp
    def gather(x: jax.Array) -> jax.Array:
        row, column, down, right = np.ogrid[:height, :width, :size, :size]
        columns = stride * column + right
        # Indices for each image, so that XLA splits a batch that many devices share.
        rows = jnp.broadcast_to(stride * row + down, (len(x), height, 1, size, 1))
        patches = jax.vmap(lambda image, rows: image[rows, columns])(jnp.pad(x, widths), rows)
        # Apart from what follows: XLA copies whole pixels only as long as these axes are not merged.
        return jax.lax.optimization_barrier(patches)

    @gather.defjvp
    def differentiate(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
        # The same values as slices, which take longer, but whose gradients are sums and not scattered additions.
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
    """Do what `jax.lax.conv_general_dilated` does for `ConvNorm`, as one product of matrices.

    XLA computes the gradients of a convolution on CPU at a fraction of the speed of matrix products: a whole training
    step takes 1.10 to 1.18 times as long with it (benchmarks/README.md).
    """
    size, features = kernel.shape[0], kernel.shape[-1]
    patches = _take_patches(x, size, strides[0], padding[0][0])
    columns = kernel.reshape(-1, features)
    y = jnp.dot(patches.reshape(-1, len(columns)), columns, precision=precision)
    return y.reshape(*patches.shape[:3], features)
