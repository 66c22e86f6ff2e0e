"""The ways to run LeViT that are compared.

Each builds a `Runner`, which computes logits from a batch on the device.
"""

import json
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LAYOUTS = ("hf", "timm", "timm_conv")
TINY = {
    "image_size": 32,
    "hidden_sizes": [16, 32, 48],
    "num_attention_heads": [1, 2, 3],
    "depths": [1, 1, 1],
    "key_dim": [8, 8, 8],
    "num_labels": 4,
}


class Case(NamedTuple):
    """A model, a dtype and a device.

    Attributes:
        directory: contains the same weights in `flax` and in one directory per PyTorch layout.
        dtype: "float32" or "bfloat16".
        device: "cpu" or "cuda".
    """

    directory: Path
    dtype: str
    device: str


class Runner(NamedTuple):
    """A model that is ready to run.

    Attributes:
        put: copies pixel values, float32 [B H W C], to the device in the layout of the peer.
        call: starts the computation.
        fetch: waits for the result of `call` and returns it as float32 logits [B L].
        returns_early: whether `call` returns before the computation ends.
    """

    put: Callable[[np.ndarray], Any]
    call: Callable[[Any], Any]
    fetch: Callable[[Any], np.ndarray]
    returns_early: bool


def use_jax_on(device: str) -> None:
    """Restrict JAX to one platform; otherwise it reserves memory on every GPU."""
    import jax

    jax.config.update("jax_platforms", device)


def write_models(directory: Path, variant: str) -> None:
    """Write a variant with two heads and random weights in all layouts.

    The weights have the magnitude of those of a trained model.
    """
    from flax.traverse_util import unflatten_dict

    use_jax_on("cpu")
    import levit_flax as lf
    from levit_flax.convert.workflow import _convert_to_directory
    from levit_flax.modeling_variables import _abstract_variables

    config = lf.LevitConfig(**TINY) if variant == "tiny" else lf.VARIANTS[variant]
    model = lf.LevitForImageClassificationWithTeacher(config)
    generator = np.random.default_rng(0)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        name = path.rpartition("/")[2]
        if name in ("scale", "var"):
            return generator.uniform(0.5, 1.5, shape)
        spread = (np.prod(shape[:-1]) ** -0.5) if name == "kernel" else 0.1
        return generator.standard_normal(shape) * spread

    leaves = _abstract_variables(model)
    variables = {path: np.asarray(draw(path, leaf.shape), leaf.dtype) for path, leaf in leaves.items()}
    lf.save_pretrained(directory / "flax", model, unflatten_dict(variables, sep="/"))
    for layout in LAYOUTS:
        _convert_to_directory(str(directory / "flax"), directory / layout, layout=layout, verify=False)


def levit_flax(case: Case, precision: str | None = None) -> Runner:
    """Run the model as `ImageClassifier` does."""
    import jax
    import jax.numpy as jnp

    use_jax_on(case.device)
    import levit_flax as lf

    model, variables = lf.from_pretrained(case.directory / "flax")
    predict = lf.make_inference_fn(model.clone(dtype=jnp.dtype(case.dtype), precision=precision), variables)
    return Runner(jax.device_put, predict, lambda y: np.asarray(y, np.float32), True)


def levit_flax_in(case: Case, runtime: str) -> Runner:
    """Run levit-flax's exported model in OpenVINO or onnxruntime, as `ImageClassifier(runtime=...)` does."""
    if case.device != "cpu" or case.dtype != "float32":
        raise NotImplementedError("other runtimes compute float32 on CPUs")
    use_jax_on("cpu")
    import levit_flax as lf
    from levit_flax.runtimes import _RuntimeFunction

    predict = _RuntimeFunction(*lf.from_pretrained(case.directory / "flax"), None, None, runtime)
    return Runner(np.ascontiguousarray, predict, np.asarray, False)


def levit_flax_keeping(case: Case) -> Runner:
    """Run levit-flax with freed memory kept, as `evaluate` and `classify` do."""
    from levit_flax.memory import keep_freed_memory

    if case.device != "cpu" or not keep_freed_memory():
        raise NotImplementedError("keeping freed memory requires a CPU and glibc")
    return levit_flax(case)


def keras(case: Case) -> Runner:
    """Run the LeViT of zeromodels, which uses Keras on JAX, compiled."""
    import os

    os.environ["KERAS_BACKEND"] = "jax"
    import jax
    from safetensors.numpy import load_file

    use_jax_on(case.device)
    from zeromodels.models.levit.levit_model import LevitImageClassify

    if case.dtype != "float32":
        import keras

        keras.config.set_dtype_policy(case.dtype)
    config = load_config(case)
    shape = ("num_channels", "hidden_sizes", "num_attention_heads", "depths", "key_dim", "mlp_ratio", "attention_ratio")
    model = LevitImageClassify(
        image_size=config.image_height_width[0],
        num_classes=config.num_labels,
        **{name: getattr(config, name) for name in shape},
    )
    model.transfer_from_hf(model, load_file(case.directory / "hf" / "model.safetensors"))
    weights = [variable.value for variable in model.trainable_variables]
    state = [variable.value for variable in model.non_trainable_variables]
    apply = jax.jit(lambda weights, state, pixels: model.stateless_call(weights, state, pixels, training=False)[0])
    return Runner(
        jax.device_put, lambda pixels: apply(weights, state, pixels), lambda y: np.asarray(y, np.float32), True
    )


def load_torch(case: Case, layout: str) -> Any:
    """Load the PyTorch model of a layout in evaluation mode; timm's are fused."""
    from timm.utils import reparameterize_model

    use_jax_on("cpu")
    from levit_flax.convert import conversion, layouts, sources, verification

    source = sources._open_source(case.directory / layout)
    converted = conversion._convert(source)
    model = verification._PEERS[layout].build(converted)
    model.load_state_dict(verification._reference_state(model, layouts._LAYOUTS[layout], source, converted))
    return model.eval() if layout == "hf" else reparameterize_model(model.eval())


def torch_runner(case: Case, layout: str, *, channels_last: bool = False, compile: bool = False) -> Runner:
    """Run a PyTorch model, eagerly or compiled."""
    import torch

    torch.set_float32_matmul_precision("high")  # TF32 on GPUs, as in JAX; float32 on CPUs
    dtype = getattr(torch, case.dtype)
    order = torch.channels_last if channels_last else torch.contiguous_format
    model = load_torch(case, layout).to(device=case.device, dtype=dtype, memory_format=order)
    if compile:
        if case.device == "cpu":
            from torch._inductor import config

            config.freezing = True  # its fastest setting for inference: weights are constants
        model = torch.compile(model, mode="max-autotune" if case.device == "cuda" else None, dynamic=False)

    def put(pixels: np.ndarray) -> Any:
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).to(case.device, dtype, memory_format=order)

    def call(pixels: Any) -> Any:
        with torch.inference_mode():
            logits = model(pixels)
            logits = getattr(logits, "logits", logits)
            return logits.clone() if compile else logits  # the next call writes to the same CUDA buffer

    return Runner(put, call, lambda logits: logits.float().cpu().numpy(), case.device == "cuda")


def onnx_file(case: Case) -> Path:
    """Return the path of timm's fused model as ONNX; a separate process exports it."""
    path = case.directory / "model.onnx"
    if not path.exists():
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(write_onnx, case, path).result()
    return path


def write_onnx(case: Case, path: Path) -> None:
    """Export timm's fused model, which has the fewest operations."""
    import torch

    height, width = load_config(case).image_height_width
    model, pixels = load_torch(case, "timm"), torch.zeros(2, 3, height, width)
    batch = torch.export.Dim("batch")
    torch.onnx.export(model, (pixels,), path, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)


def load_config(case: Case) -> Any:
    """Return the `LevitConfig` of a case."""
    import levit_flax as lf

    return lf.LevitConfig.from_dict(json.loads((case.directory / "hf" / "config.json").read_text(encoding="utf-8")))


def onnxruntime(case: Case) -> Runner:
    """Run timm's fused model in onnxruntime."""
    import onnxruntime as ort

    if case.dtype != "float32":
        raise NotImplementedError("onnxruntime does not support bfloat16 on CPUs")
    provider = "CUDAExecutionProvider" if case.device == "cuda" else "CPUExecutionProvider"
    if provider not in ort.get_available_providers():
        raise NotImplementedError(f"this onnxruntime has no {provider}")
    session = ort.InferenceSession(onnx_file(case), providers=[provider])
    [pixels_input], [logits] = session.get_inputs(), session.get_outputs()

    def put(pixels: np.ndarray) -> Any:
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)), case.device, 0)

    def call(pixels: Any) -> Any:
        return session.run_with_ort_values([logits.name], {pixels_input.name: pixels})[0]

    return Runner(put, call, lambda logits: logits.numpy(), False)


def openvino(case: Case) -> Runner:
    """Run timm's fused model in OpenVINO."""
    import openvino as ov

    if case.device != "cpu":
        raise NotImplementedError("OpenVINO does not run on NVIDIA GPUs")
    path, core, compiled, own = onnx_file(case), ov.Core(), {}, threading.local()
    precision = {"float32": "f32", "bfloat16": "bf16"}[case.dtype]
    settings = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}

    def put(pixels: np.ndarray) -> np.ndarray:
        model = core.read_model(path)
        model.reshape([len(pixels), 3, *pixels.shape[1:3]])
        compiled[len(pixels)] = core.compile_model(model, "CPU", settings)
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))

    def call(pixels: np.ndarray) -> np.ndarray:
        requests = own.__dict__.setdefault("requests", {})  # a request must not be shared between threads
        if len(pixels) not in requests:
            requests[len(pixels)] = compiled[len(pixels)].create_infer_request()
        return np.array(requests[len(pixels)].infer(pixels)[0])

    return Runner(put, call, np.asarray, False)


OURS = "levit-flax"
PEERS: dict[str, Callable[[Case], Runner]] = {
    OURS: levit_flax,
    "levit-flax, highest precision": lambda case: levit_flax(case, "highest"),
    "levit-flax, freed memory kept": levit_flax_keeping,
    "levit-flax in OpenVINO": lambda case: levit_flax_in(case, "openvino"),
    "levit-flax in onnxruntime": lambda case: levit_flax_in(case, "onnxruntime"),
    "transformers": lambda case: torch_runner(case, "hf"),
    "transformers compiled": lambda case: torch_runner(case, "hf", compile=True),
    "timm fused": lambda case: torch_runner(case, "timm"),
    "timm fused, compiled": lambda case: torch_runner(case, "timm", channels_last=True, compile=True),
    "timm fused conv": lambda case: torch_runner(case, "timm_conv", channels_last=True),
    "timm fused conv, compiled": lambda case: torch_runner(case, "timm_conv", channels_last=True, compile=True),
    "onnxruntime": onnxruntime,
    "OpenVINO": openvino,
    "zeromodels": keras,
}
PACKAGES = ("torch", "transformers", "timm", "onnxruntime", "openvino", "keras", "zeromodels")
