"""Prepare models for inference: merge heads, fold batch norms, normalize images, compile."""

import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .arguments import _check_types
from .configuration import _MULTI_LABEL, _REGRESSION, LevitConfig
from .image_processing import LevitImageProcessor
from .inference_options import _PLAIN, _choose_options, _compile, _Options, _Program
from .layers import _at_least_float32
from .modeling import LevitBase, LevitForImageClassificationWithTeacher, LevitModel, Variables
from .surgery import _copy, fold_batch_norm, merge_heads


def _normalize(pixels: jax.Array, processor: LevitImageProcessor, dtype: Any = jnp.float32) -> jax.Array:
    """Compute `LevitImageProcessor.rescale_and_normalize` of levels [... C] on the device, in `dtype`."""
    values = pixels.astype(dtype)
    if processor.do_rescale:
        values = values * np.asarray(processor.rescale_factor, dtype)
    if processor.do_normalize:
        shape = (1,) * (pixels.ndim - 1) + (-1,)
        mean, std = (np.asarray(value, dtype).reshape(shape) for value in (processor.image_mean, processor.image_std))
        values = (values - mean) / std
    return values


def _prepare(model: LevitBase, variables: Variables) -> tuple[LevitBase, Variables]:
    """Return an equivalent model for inference, with merged heads and folded batch norms."""
    if isinstance(model, LevitModel) or not model.config.num_labels:
        raise ValueError(
            "The model has no classifier: expected a LevitForImageClassification or a"
            f" LevitForImageClassificationWithTeacher with classes, found a {type(model).__name__} with"
            f" num_labels={model.config.num_labels}."
        )
    variables = _upcast(variables, model._shared["dtype"])
    if isinstance(model, LevitForImageClassificationWithTeacher):
        model, variables = merge_heads(model, variables)
    if not model.folded:
        return fold_batch_norm(model, variables)
    return model, jax.tree.map(_copy, variables)  # the caller may donate or change them; folding copies by itself


def _upcast(variables: Variables, dtype: Any) -> Variables:
    """Return the variables with narrower floating-point arrays converted to `dtype`, once instead of in every call."""
    width = jnp.dtype(dtype).itemsize

    def is_narrow(leaf: jax.Array) -> bool:
        return jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < width

    if not any(is_narrow(leaf) for leaf in jax.tree.leaves(variables)):
        return variables
    # NumPy converts without compiling.
    upcast: Variables = jax.tree.map(lambda leaf: np.asarray(leaf, dtype if is_narrow(leaf) else leaf.dtype), variables)
    arrays: Variables = jax.device_put(upcast)
    return arrays


# For each program that was started: its logits, with rows of padding at the end, and the number of images.
_Parts = list[tuple[jax.Array, int]]


class _InferenceFunction:
    """The compiled function that `make_inference_fn` returns.

    Attributes:
        model: the folded model with merged heads.
        variables: its variables, on every device.
        processor: its settings normalize uint8 images.
        batch_size: maximum number of images per program, a multiple of the number of devices; None for no maximum.
    """

    def __init__(
        self,
        model: LevitBase,
        variables: Variables,
        batch_size: int | None,
        processor: LevitImageProcessor | None,
        devices: Sequence[jax.Device] | None,
        fast_start: bool,
    ) -> None:
        self.model, variables = _prepare(model, variables)
        self.processor = processor or LevitImageProcessor()
        mesh = Mesh(np.array(devices or jax.local_devices()), ("batch",))
        self._sharding = NamedSharding(mesh, PartitionSpec("batch"))
        self.batch_size = None if batch_size is None else -(-batch_size // mesh.size) * mesh.size
        self.variables: Variables = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
        self._fast_start = fast_start
        self._programs: dict[tuple[int, Any], _Program] = {}
        self._lock = threading.Lock()

    def __call__(self, pixels: Any) -> jax.Array:
        """Compute the logits of images.

        Args:
            pixels: [B H W C], either uint8 levels, or float32 normalized by the processor.

        Returns:
            Float [B num_labels], at least float32.

        Raises:
            ValueError: the batch is empty or does not fit the model.
            TypeError: the function is called inside `jax.jit` or another transformation.
        """
        if isinstance(pixels, jax.core.Tracer):
            raise TypeError(
                "A compiled inference function cannot be transformed: expected an array, found a tracer of jax.jit or"
                " another transformation. Use model.apply inside transformations."
            )
        parts = self.start(pixels)
        if len(parts) == 1 and len(parts[0][0]) == parts[0][1]:
            return parts[0][0]
        logits: jax.Array = jax.device_put(self.finish(parts))
        return logits

    def start(self, pixels: Any) -> _Parts:
        """Start to compute the logits of images, and return without waiting for them."""
        pixels = self._check(pixels)
        if len(pixels) == self._padded_size(len(pixels)):
            return [self._start_part(pixels)]
        # As NumPy array, because JAX compiles a program for every size of a slice.
        return [self._start_part(part) for part in self._split(np.asarray(pixels))]

    @staticmethod
    def finish(parts: _Parts) -> np.ndarray:
        """Wait for the logits that `start` began to compute."""
        return np.concatenate([np.asarray(logits)[:count] for logits, count in parts])

    def _start_part(self, pixels: Any) -> tuple[jax.Array, int]:
        count = len(pixels)
        size = self._padded_size(count)
        if size > count:
            pixels = np.concatenate([pixels, np.zeros((size - count, *pixels.shape[1:]), pixels.dtype)])
        return self._program(pixels)(self._put(pixels)), count

    def _put(self, pixels: Any) -> Any:
        return jax.device_put(pixels, self._sharding)

    def _check(self, pixels: Any) -> Any:
        """Return the pixels as an array of a dtype for which programs are compiled."""
        pixels = pixels if isinstance(pixels, jax.Array) else np.asarray(pixels)
        shape = (*self.model.config.image_height_width, self.model.config.num_channels)
        if pixels.ndim != 4 or pixels.shape[1:] != shape or not len(pixels):
            raise ValueError(
                f"The pixels do not fit the model: expected [B {' '.join(map(str, shape))}] with at least one image,"
                f" found {list(pixels.shape)}."
            )
        dtype = _at_least_float32(self.model._shared["dtype"])
        return pixels if pixels.dtype in (np.uint8, dtype) else pixels.astype(dtype)

    def _split(self, pixels: Any) -> list[Any]:
        """Split a batch into parts for which programs are compiled."""
        size, single = self.batch_size or len(pixels), self._sharding.num_devices
        rest = len(pixels) % size
        whole = len(pixels) - rest
        small = single if rest <= size // 8 else size  # a few single images take less time than a padded batch
        starts = [*range(0, whole, size), *range(whole, len(pixels), small)]
        return [pixels[i:j] for i, j in pairwise([*starts, len(pixels)])]

    def _padded_size(self, count: int) -> int:
        """Return the batch size of the program for `count` images."""
        devices = self._sharding.num_devices
        if self.batch_size is None:
            return devices << (-(-count // devices) - 1).bit_length()  # a power of two per device
        return devices if count <= devices else self.batch_size

    def _program(self, pixels: Any) -> _Program:
        """Return the program for the shape and dtype of `pixels`, and compile it on first use."""
        key = len(pixels), pixels.dtype
        with self._lock:
            if key not in self._programs:
                self._programs[key] = self._build(pixels)
            return self._programs[key]

    def _build(self, pixels: Any) -> _Program:
        batch = jax.ShapeDtypeStruct(pixels.shape, pixels.dtype, sharding=self._sharding)
        return _compile(self._apply, self.variables, batch, self._options(len(pixels)))

    def _options(self, size: int) -> _Options:
        if self._fast_start:
            return _PLAIN
        devices = self._sharding.mesh.devices
        return _choose_options(devices.flat[0], self.model._shared["dtype"], size // devices.size)

    def _apply(self, variables: Variables, pixels: jax.Array) -> jax.Array:
        if pixels.dtype == jnp.uint8:
            pixels = _normalize(pixels, self.processor)
        output: Any = self.model.apply(variables, pixels, return_dict=True)
        logits: jax.Array = output.logits
        return logits.astype(_at_least_float32(logits.dtype))


@_check_types
def make_inference_fn(
    model: LevitBase,
    variables: Variables,
    *,
    batch_size: int | None = None,
    processor: LevitImageProcessor | None = None,
    devices: Sequence[jax.Device] | None = None,
    fast_start: bool = False,
) -> Callable[[Any], jax.Array]:
    """Compile a classifier for the fastest inference on these devices.

    Heads are merged, batch norms are folded, and the weights become constants of the compiled programs. XLA's options
    are those that were measured to be the fastest for the device. Each batch size is compiled on first use, and each
    program contains a copy of the weights.

    Args:
        model: a model with a classifier.
        variables: its variables. The function keeps a copy.
        batch_size: maximum number of images per program, rounded up to a multiple of the number of devices. Larger
            batches are split, and smaller ones are padded, so that only this size and one image per device are
            compiled. None compiles powers of two without a maximum.
        processor: its mean and standard deviation normalize uint8 images; None for the default of the model.
        devices: devices to compute on; None for all local devices.
        fast_start: compile without options and with the weights as arguments. JAX's persistent compilation cache can
            store such programs, so that the next process starts sooner, but calls take longer.

    Returns:
        A function from pixel values [B H W C], float32 as normalized by the processor or uint8 levels, to logits
        [B num_labels], float32 or float64. It cannot be called inside `jax.jit` or other transformations.

    Raises:
        ValueError: the model has no classifier, or `batch_size` is less than 1.

    Examples:
        >>> from levit_flax import from_pretrained
        >>> predict = make_inference_fn(*from_pretrained("cifar10"))
        >>> predict(np.zeros((3, 144, 144, 3), np.float32)).shape
        (3, 10)
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, found {batch_size}.")
    return _InferenceFunction(model, variables, batch_size, processor, devices, fast_start)


def _scores(logits: np.ndarray, config: LevitConfig, function: str | None = None) -> np.ndarray:
    """Return the scores for logits [... L]; `function` is `function_to_apply` of `ImageClassifier`."""
    if function is None:
        regression = config.problem_type == _REGRESSION or config.num_labels == 1
        function = "none" if regression else "sigmoid" if config.problem_type == _MULTI_LABEL else "softmax"
    if function == "none":
        return logits
    if function == "sigmoid":
        return np.asarray(1 / (1 + np.exp(-logits)))
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(-1, keepdims=True))
