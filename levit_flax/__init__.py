"""LeViT for JAX: fast image classification with convolution and attention.

Names are imported on first use, so `import levit_flax` is cheap. It never imports PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import save_pretrained as save_pretrained
    from .classifier import ImageClassifier as ImageClassifier
    from .configuration import LevitConfig as LevitConfig
    from .image_processing import LevitFeatureExtractor as LevitFeatureExtractor
    from .image_processing import LevitImageProcessor as LevitImageProcessor
    from .image_processing import LevitImageProcessorFast as LevitImageProcessorFast
    from .inference import make_inference_fn as make_inference_fn
    from .loading import from_pretrained as from_pretrained
    from .loading import push_to_hub as push_to_hub
    from .modeling import LevitForImageClassification as LevitForImageClassification
    from .modeling import LevitForImageClassificationWithTeacher as LevitForImageClassificationWithTeacher
    from .modeling import LevitModel as LevitModel
    from .nnx import from_nnx as from_nnx
    from .nnx import to_nnx as to_nnx
    from .surgery import change_channels as change_channels
    from .surgery import fold_batch_norm as fold_batch_norm
    from .surgery import merge_heads as merge_heads
    from .surgery import replace_head as replace_head
    from .surgery import resize_image as resize_image
    from .variants import VARIANTS as VARIANTS

_MODULES = {
    # The architecture
    "VARIANTS": "variants",
    "LevitConfig": "configuration",
    # The models
    "LevitModel": "modeling",
    "LevitForImageClassification": "modeling",
    "LevitForImageClassificationWithTeacher": "modeling",
    # Loading and saving; `levit_flax.convert` handles PyTorch checkpoints
    "from_pretrained": "loading",
    "save_pretrained": "checkpoint",
    "push_to_hub": "loading",
    # Model transformations
    "fold_batch_norm": "surgery",
    "merge_heads": "surgery",
    "resize_image": "surgery",
    "replace_head": "surgery",
    "change_channels": "surgery",
    # flax.nnx
    "to_nnx": "nnx",
    "from_nnx": "nnx",
    # Preprocessing and inference
    "LevitImageProcessor": "image_processing",
    "LevitImageProcessorFast": "image_processing",
    "LevitFeatureExtractor": "image_processing",
    "make_inference_fn": "inference",
    "ImageClassifier": "classifier",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
