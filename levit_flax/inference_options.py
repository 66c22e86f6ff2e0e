"""Choose how a model is compiled for inference on a device.

Every choice runs the same `model.apply`. The weights are arguments or constants of the compiled program. The libraries
that XLA calls on CPUs prepare constant weights once instead of in every call, if its options and the operation of the
linear layers let them.
"""

import contextlib
import functools
import math
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_Variables = dict[str, Any]  # {"params": ...}
_Apply = Callable[[_Variables, jax.Array], jax.Array]
_Program = Callable[[jax.Array], jax.Array]
_Product = Callable[[jax.Array, jax.Array, Any], jax.Array]  # (rows [N C], kernel [C F], precision) -> [N F]


def _product_as_convolution(rows: jax.Array, kernel: jax.Array, precision: Any) -> jax.Array:
    """Compute a matrix product as a 1x1 convolution, which oneDNN prepares at any size; it ignores small products."""
    return lax.conv_general_dilated(
        rows[None, None],
        kernel[None, None],
        window_strides=(1, 1),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )[0, 0]


def _product_with_constant(rows: jax.Array, kernel: jax.Array, precision: Any) -> jax.Array:
    """Compute a matrix product whose kernel YNNPACK prepares once.

    Valid only if the kernel is a constant of the compiled program, because YNNPACK would not notice a change.
    """
    from jax.experimental.xla_metadata import set_xla_metadata  # experimental: `_compile` does without it

    flat = np.asarray(kernel).ravel()  # by NumPy, because JAX would copy it
    # Without the barrier, XLA folds the reshape into the constant and the metadata is lost.
    kernel = lax.reshape(lax.optimization_barrier(flat), kernel.shape)
    return jnp.matmul(rows, set_xla_metadata(kernel, is_constant="true"), precision=precision)


class _Options(NamedTuple):
    """How a model is compiled.

    Attributes:
        constants: whether the weights are constants of the program. JAX's persistent compilation cache is of little use
            for such programs: it stores the weights with them, or cannot store them.
        product: computes the matrix products of linear layers; None for Flax's own.
        compiler_options: options of XLA, by name.
    """

    constants: bool = False
    product: _Product | None = None
    compiler_options: Mapping[str, bool | str] = {}


def _fusions(*kinds: str) -> dict[str, bool | str]:
    """Return the options for convolutions in oneDNN and for these kinds of fusions in YNNPACK."""
    return {
        "xla_cpu_experimental_onednn_custom_call": True,
        "xla_cpu_experimental_ynn_fusion_type": ",".join(f"LIBRARY_FUSION_TYPE_{kind}" for kind in kinds),
    }


_ALL_OPTIONS = {
    "arguments": _Options(),
    "constants": _Options(constants=True),
    "onednn": _Options(constants=True, compiler_options=_fusions("REDUCE")),
    "convolution": _Options(constants=True, product=_product_as_convolution, compiler_options=_fusions("REDUCE")),
    "prepared": _Options(
        constants=True, product=_product_with_constant, compiler_options=_fusions("INDIVIDUAL_DOT", "REDUCE")
    ),
}
_PLAIN = _ALL_OPTIONS["arguments"]

# The fastest options for float32 on x86 processors: (AVX-512, largest batch size, name of the options). The first row
# that fits applies. `benchmarks/inference_options.py` measures all options; its results for AVX-512 are in
# benchmarks/results/inference_options.json, and those of a first trial with AVX2 in benchmarks/README.md.
_FASTEST_ON_X86: tuple[tuple[bool, float, str], ...] = (
    (True, math.inf, "prepared"),
    (False, 4, "convolution"),
    (False, math.inf, "prepared"),
)
_MEASURED_JAX = (0, 12)  # the oldest version with which the table was measured


def _choose_options(device: jax.Device, dtype: Any, batch_size: int) -> _Options:
    """Return the options that compile the fastest program for a device.

    Args:
        device: the device that computes.
        dtype: dtype of the computation.
        batch_size: images per device.
    """
    if device.platform == "tpu":
        return _PLAIN  # not measured
    x86 = device.platform == "cpu" and platform.machine().lower() in ("x86_64", "amd64")
    if not x86 or jnp.dtype(dtype) != jnp.float32 or jax.__version_info__ < _MEASURED_JAX:
        return _ALL_OPTIONS["constants"]
    avx512 = _has_avx512()
    name = next(name for row, largest, name in _FASTEST_ON_X86 if row == avx512 and batch_size <= largest)
    return _ALL_OPTIONS[name]


def _has_avx512() -> bool:
    """Return whether the processor has AVX-512, as far as Linux tells; False on other systems."""
    try:
        return "avx512f" in Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False


def _compile(apply: _Apply, variables: _Variables, pixels: jax.ShapeDtypeStruct, options: _Options) -> _Program:
    """Compile `apply(variables, pixels)` as a function of the pixels.

    If the installed version of JAX does not know one of the options, the program is compiled without any.

    Args:
        apply: applies a model.
        variables: its variables, on the device.
        pixels: shape, dtype and sharding of the input.
        options: the options.
    """
    try:
        return _compile_with(apply, variables, pixels, options)
    except (ImportError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "option" not in str(error):
            raise
        return _compile_with(apply, variables, pixels, _PLAIN)


def _compile_with(apply: _Apply, variables: _Variables, pixels: jax.ShapeDtypeStruct, options: _Options) -> _Program:
    if not options.constants:
        return functools.partial(jax.jit(apply).lower(variables, pixels).compile(), variables)

    def apply_constants(pixels: jax.Array) -> jax.Array:
        with contextlib.ExitStack() as stack:
            if options.product is not None:
                stack.enter_context(nn.intercept_methods(functools.partial(_compute_linear, options.product)))
            return apply(variables, pixels)

    with _no_cache_entries():
        compiled: _Program = (
            jax.jit(apply_constants).lower(pixels).compile(compiler_options=dict(options.compiler_options))
        )
    return compiled


@contextlib.contextmanager
def _no_cache_entries() -> Iterator[None]:
    """Add nothing to the persistent compilation cache, in which an entry would be as large as the weights."""
    name = "jax_persistent_cache_min_compile_time_secs"
    seconds = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, seconds)


def _compute_linear(product: _Product, layer: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Intercept the linear layers, and compute their matrix products with `product`."""
    module = context.module
    if not isinstance(module, nn.Dense) or context.method_name != "__call__":
        return layer(*args, **kwargs)
    parameters: list[jax.Array] = [module.get_variable("params", name) for name in ("kernel", "bias")]
    x, kernel, bias = nn.dtypes.promote_dtype(*args, *parameters, dtype=module.dtype)
    return product(x, kernel, module.precision) + bias[None]
