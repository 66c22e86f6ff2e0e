"""Export a classifier as ONNX, in a graph that runtimes can optimize: a softmax per attention, no shape arithmetic."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .arguments import _check_types
from .attention import _BiasedAttention

_BATCH = "B"
_LARGEST_INTEGER = 2**63 - 1
_TOLERANCE = 1e-3  # relative to the largest logit; accelerators multiply with less precision than onnxruntime


def _with_plain_softmax(layer: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Intercept attention, and compute its weights with one softmax, for which runtimes have a kernel."""
    module = context.module
    if not isinstance(module, _BiasedAttention) or context.method_name != "mix":
        return layer(*args, **kwargs)
    logits, value = args
    weights = nn.softmax(logits)
    return jnp.matmul(weights.astype(module.dtype), value, precision=module.precision), weights


def _free_batch(graph: Any) -> None:
    """Let a graph that was traced with one image accept any number of images.

    The first axis of every reshaped array is the batch, or the tokens of all images.

    Args:
        graph: an `onnx.GraphProto`, which is changed.
    """
    from onnx import numpy_helper

    constants = {constant.name: constant for constant in graph.initializer}
    for node in graph.node:
        if node.op_type == "Reshape":
            index, value = 1, -1
        elif node.op_type == "Slice":
            index, value = 2, _LARGEST_INTEGER  # the ends
        else:
            continue
        constant = constants.get(node.input[index])
        if constant is None:
            raise RuntimeError(
                f"The ONNX graph cannot take batches: expected a constant shape of {node.name}, found"
                f" {node.input[index]}. Install the version of jax2onnx that levit-flax was tested with."
            )
        values = numpy_helper.to_array(constant).copy()
        values[0] = value
        changed = numpy_helper.from_array(values, f"{constant.name}_{_BATCH}")
        if changed.name not in constants:
            graph.initializer.append(changed)
            constants[changed.name] = changed
        node.input[index] = changed.name
    used = {name for node in graph.node for name in node.input}
    for constant in [constant for constant in graph.initializer if constant.name not in used]:
        graph.initializer.remove(constant)
    for array in (*graph.input, *graph.output):
        array.type.tensor_type.shape.dim[0].dim_param = _BATCH
    del graph.value_info[:]


def _check_batches(artifact: bytes, classify: Any, shape: tuple[int, ...]) -> None:
    """Raise RuntimeError unless onnxruntime computes the same logits for several numbers of images."""
    import onnxruntime

    session = onnxruntime.InferenceSession(artifact, providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).standard_normal((3, *shape), np.float32)
    expected = np.asarray(jax.jit(classify)(pixels))
    for count in (1, 3):
        [found] = session.run(None, {session.get_inputs()[0].name: pixels[:count]})
        difference = float(np.abs(found - expected[:count]).max())
        if not difference < _TOLERANCE * max(float(np.abs(expected).max()), 1e-6):
            raise RuntimeError(
                f"The ONNX graph is wrong: expected the logits of JAX for {count} images, found a difference of"
                f" {difference:.1e}."
            )


@_check_types
def to_onnx(classify: Any, shape: Sequence[int]) -> bytes:
    """Serialize a function of pixel values as an ONNX model, for any batch size.

    Args:
        classify: a function of float32 [B H W C] that JAX can trace.
        shape: (H, W, C).

    Returns:
        The serialized model, with the input `pixel_values` and the output `logits`.

    Raises:
        ImportError: jax2onnx is not installed.

    Examples:
        >>> import onnxruntime
        >>> artifact = to_onnx(lambda pixel_values: pixel_values.mean((1, 2)), shape=(8, 8, 3))
        >>> session = onnxruntime.InferenceSession(artifact)
        >>> [means] = session.run(None, {"pixel_values": jax.device_get(jnp.ones((5, 8, 8, 3)))})
        >>> means.shape
        (5, 3)
    """
    try:
        import jax2onnx
    except ImportError:
        raise ImportError(
            "Exporting ONNX requires jax2onnx, which is not installed. Run: pip install 'levit-flax[onnx]'"
        ) from None

    def trace(pixel_values: jax.Array) -> jax.Array:
        with nn.intercept_methods(_with_plain_softmax):
            logits: jax.Array = classify(pixel_values)
        return logits

    # Traced with one image, because a symbolic batch size fills the graph with arithmetic on shapes.
    exported = jax2onnx.to_onnx(
        trace, [(1, *shape)], model_name="levit", input_names=["pixel_values"], output_names=["logits"]
    )
    _free_batch(exported.graph)
    artifact = bytes(exported.SerializeToString())
    _check_batches(artifact, classify, tuple(shape))
    return artifact
