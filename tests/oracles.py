"""PyTorch models with random weights, statistics and biases, to compare with.

A freshly initialised LeViT proves nothing: its residual branches are zero and its statistics are 0 and 1. Here every
tensor is random, and the statistics are near those of the activations, so that these keep the size that they have in
life.
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
    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("attention_biases"):
                parameter.copy_(uniform(parameter, -2, 2))
            elif parameter.ndim > 1:
                bound = parameter[0].numel() ** -0.5
                parameter.copy_(uniform(parameter, -bound, bound))
            elif name.endswith("weight"):
                parameter.copy_(uniform(parameter, 0.3, 1.2))
            else:
                parameter.copy_(uniform(parameter, -0.3, 0.3))
        for norm in norms:
            norm.momentum = 1.0
        model.train()(torch.from_numpy(pixels(config, 8, seed + 1)).permute(0, 3, 1, 2))
        for norm in norms:
            norm.momentum = 0.1
            norm.running_mean.add_(uniform(norm.running_mean, -0.2, 0.2))
            norm.running_var.mul_(uniform(norm.running_var, 0.6, 1.4))
            norm.num_batches_tracked.fill_(int(torch.randint(1, 10**6, (), generator=generator)))
    return model.eval()


def pixels(config: LevitConfig, batch: int = BATCH, seed: int = 0) -> np.ndarray:
    """Return random float64 pixels [B H W C]."""
    return np.random.default_rng(seed).standard_normal((batch, *config.image_height_width, config.num_channels))


def state_dict(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().clone().numpy() for name, tensor in model.state_dict().items()}
