"""PyTorch models with random weights, statistics and biases, to compare with.

A freshly initialised LeViT proves nothing: its residual branches are zero and its statistics are 0 and 1. Here every
tensor is random.
"""

import numpy as np
import torch
import transformers

from levit_flax import LevitConfig

BATCH = 2


def torch_config(config: LevitConfig) -> transformers.LevitConfig:
    return transformers.LevitConfig.from_dict(config.to_dict())


def torch_model(config: LevitConfig, class_name: str, seed: int = 0) -> torch.nn.Module:
    """Return transformers' model in float64 and evaluation mode, everything in it random."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * (high - low) + low

    model = getattr(transformers, class_name)(torch_config(config)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("attention_biases"):
                parameter.copy_(uniform(parameter, -2, 2))
            elif parameter.ndim > 1:
                bound = (3 / parameter[0].numel()) ** 0.5  # keeps the variance from layer to layer
                parameter.copy_(uniform(parameter, -bound, bound))
            elif name.endswith("weight"):
                parameter.copy_(uniform(parameter, 0.3, 1.0))
            else:
                parameter.copy_(uniform(parameter, -0.3, 0.3))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(uniform(buffer, -0.3, 0.3))
            elif name.endswith("running_var"):
                buffer.copy_(uniform(buffer, 0.6, 1.4))
            elif name.endswith("num_batches_tracked"):
                buffer.fill_(int(torch.randint(1, 10**6, (), generator=generator)))
    return model.eval()


def pixels(config: LevitConfig, batch: int = BATCH, seed: int = 0) -> np.ndarray:
    """Return random float64 pixels [B H W C]."""
    return np.random.default_rng(seed).standard_normal((batch, *config.image_height_width, config.num_channels))


def state_dict(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().clone().numpy() for name, tensor in model.state_dict().items()}
