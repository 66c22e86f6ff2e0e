"""Run classifiers in OpenVINO or onnxruntime, which are faster than JAX on many CPUs."""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .image_processing import LevitImageProcessor
from .inference import _InferenceFunction
from .inference_options import _Program
from .modeling import LevitBase, Variables
from .onnx_export import to_onnx

_Run = Callable[[np.ndarray], np.ndarray]  # float32 pixel values [B H W C] -> logits [B L]


class _RuntimeFunction(_InferenceFunction):
    """An inference function that another runtime computes on the CPU, from the model as an ONNX graph."""

    def __init__(
        self,
        model: LevitBase,
        variables: Variables,
        batch_size: int | None,
        processor: LevitImageProcessor | None,
        runtime: str,
    ) -> None:
        package = _import(runtime)
        cpu = jax.local_devices(backend="cpu")[:1]
        super().__init__(model, variables, batch_size, processor, cpu, fast_start=True)
        if jnp.dtype(self.model._shared["dtype"]) != jnp.float32:
            raise ValueError(
                f"The runtime {runtime} computes in float32: expected a model with dtype float32, found"
                f' {jnp.dtype(self.model._shared["dtype"])}. Use runtime="jax".'
            )
        host = jax.device_get(self.variables)
        shape = (*self.model.config.image_height_width, self.model.config.num_channels)
        artifact = to_onnx(lambda pixels: self._apply(host, pixels), shape)
        self._build_run = _RUNTIMES[runtime](package, artifact)

    def _put(self, pixels: Any) -> Any:
        return np.asarray(pixels)

    def _build(self, pixels: Any) -> _Program:
        run, processor = self._build_run(pixels.shape), self.processor

        def program(pixels: Any) -> Any:
            return run(processor.rescale_and_normalize(pixels) if pixels.dtype == np.uint8 else pixels)

        return program


def _onnxruntime(onnxruntime: Any, artifact: bytes) -> Callable[[tuple[int, ...]], _Run]:
    """Return a function from the shape of a batch to a function that computes logits in onnxruntime."""
    session = onnxruntime.InferenceSession(artifact, providers=["CPUExecutionProvider"])

    def run(pixels: np.ndarray) -> np.ndarray:
        logits: np.ndarray = session.run(None, {"pixel_values": pixels})[0]
        return logits

    return lambda _: run


def _openvino(openvino: Any, artifact: bytes) -> Callable[[tuple[int, ...]], _Run]:
    """Return a function from the shape of a batch to a function that computes logits in OpenVINO."""
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}

    def build(shape: tuple[int, ...]) -> _Run:
        model = core.read_model(artifact)
        model.reshape(list(shape))  # OpenVINO is faster with a fixed batch size
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        return lambda pixels: np.array(request.infer([pixels])[0])

    return build


def _import(runtime: str) -> Any:
    """Return the package of a runtime."""
    extra = "onnx" if runtime == "onnxruntime" else runtime
    try:
        return importlib.import_module(runtime)
    except ImportError:
        raise ImportError(
            f"This requires {runtime}, which is not installed. Run: pip install 'levit-flax[{extra}]'"
        ) from None


_RUNTIMES: dict[str, Callable[[Any, bytes], Callable[[tuple[int, ...]], _Run]]] = {
    "openvino": _openvino,
    "onnxruntime": _onnxruntime,
}
