"""Quantize exported classifiers to int8, and measure what that costs in accuracy."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .configuration import _SINGLE_LABEL
from .datasets import DataError, LabeledImages
from .image_processing import LevitImageProcessor
from .runtimes import _Run

_CALIBRATION_IMAGES = 300
_HELD_OUT_IMAGES = 2000
_BATCH_SIZE = 25

# The layers with weights and the products of attention. The others are faster and more accurate in float32.
_QUANTIZED = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class _Quantization:
    """How a classifier was quantized, and what that cost.

    Attributes:
        calibration_images: number of images from which the ranges of activations were taken.
        held_out_images: number of other images on which the accuracy was measured.
        top1_float32: fraction of these that the model classified correctly, in [0, 1].
        top1_int8: the same for the quantized model.
    """

    calibration_images: int
    held_out_images: int
    top1_float32: float
    top1_int8: float

    @property
    def drop(self) -> float:
        """The lost accuracy in percentage points."""
        return 100 * (self.top1_float32 - self.top1_int8)

    def check(self, max_drop: float) -> None:
        """Raise ValueError if more than `max_drop` percentage points were lost."""
        if self.drop > max_drop:
            raise ValueError(
                f"The int8 model lost too much accuracy: expected a drop of at most {max_drop:g} percentage points,"
                f" found {self.drop:.2f}, from {self.top1_float32:.2%} to {self.top1_int8:.2%} of"
                f" {self.held_out_images} images. Calibrate with more images of the model's classes, or raise"
                " max_drop=..."
            )


def _split_images(data: LabeledImages) -> tuple[LabeledImages, LabeledImages]:
    """Return images for calibration and held-out images, in random order, at most half of them for calibration."""
    if data.problem_type != _SINGLE_LABEL:
        raise DataError(f"{data.where} is for {data.problem_type}: expected images with one class each.")
    if len(data) < 2:
        raise DataError(
            f"{data.where} has {len(data)} images: expected two or more, some for calibration and some to measure the"
            " accuracy."
        )
    order = np.random.default_rng(0).permutation(len(data))
    count = min(_CALIBRATION_IMAGES, len(data) // 2)
    return (
        data.select(order[:count], f"{data.where}, for calibration"),
        data.select(order[count : count + _HELD_OUT_IMAGES], f"{data.where}, held out"),
    )


def _pixel_values(data: LabeledImages, processor: LevitImageProcessor) -> Iterator[np.ndarray]:
    """Yield batches of processed images, float32 [B H W C]."""
    for start in range(0, len(data), _BATCH_SIZE):
        images = [data.load(i) for i in range(start, min(start + _BATCH_SIZE, len(data)))]
        yield np.stack([processor.rescale_and_normalize(processor.resize_and_crop(image)) for image in images])


def _top1(run: Callable[[tuple[int, ...]], _Run], data: LabeledImages, processor: LevitImageProcessor) -> float:
    """Return the fraction of images that a model in a runtime classifies correctly; `run` as in `runtimes`."""
    predicted = [run(batch.shape)(batch).argmax(-1) for batch in _pixel_values(data, processor)]
    return float(np.mean(np.concatenate(predicted) == data.targets))


def _quantize(artifact: bytes, data: LabeledImages, processor: LevitImageProcessor) -> bytes:
    """Quantize an ONNX model to int8 with the ranges of activations that calibration images have.

    Weights are signed and scaled per channel. Activations are unsigned, because CPUs multiply these types fastest.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]  # untyped
        batches = _pixel_values(data, processor)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"pixel_values": batch}

    with tempfile.TemporaryDirectory() as folder:
        original, prepared, quantized = (Path(folder, name) for name in ("original", "prepared", "quantized"))
        original.write_bytes(artifact)
        quant_pre_process(original, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            quantized,
            Reader(),
            op_types_to_quantize=list(_QUANTIZED),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        return quantized.read_bytes()


def _quantize_and_measure(
    artifact: bytes,
    data: LabeledImages,
    processor: LevitImageProcessor,
    build: Callable[[bytes], Callable[[tuple[int, ...]], _Run]],
    max_drop: float,
) -> tuple[bytes, _Quantization]:
    """Return an int8 model, unless it is too inaccurate, and what it lost.

    Args:
        artifact: an ONNX model.
        data: images with one class each.
        processor: their processor.
        build: makes a model run in the runtime in which it will be used.
        max_drop: largest accepted drop of the accuracy in percentage points.

    Raises:
        ValueError: the accuracy drops by more than `max_drop`.
        DataError: there are too few images, or one cannot be used.
    """
    calibration, held_out = _split_images(data)
    quantized = _quantize(artifact, calibration, processor)
    top1 = [_top1(build(model), held_out, processor) for model in (artifact, quantized)]
    result = _Quantization(len(calibration), len(held_out), *top1)
    result.check(max_drop)
    return quantized, result
