"""PyTorch models with random weights, statistics and biases, to compare with.

A newly initialized LeViT proves nothing: its residual branches are zero and its statistics are 0 and 1. Here every
tensor is random.
"""

import numpy as np
import torch
import transformers

from levit_flax import LevitConfig

BATCH = 2

torch.set_num_threads(1)  # a second thread costs more than it computes on models this small


def torch_config(config: LevitConfig) -> transformers.LevitConfig:
    return transformers.LevitConfig.from_dict(config.to_dict())


def torch_model(config: LevitConfig, class_name: str, seed: int = 0) -> torch.nn.Module:
    """Return transformers' model in float64 and evaluation mode with random weights, statistics and biases."""
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


LEAVES = {
    "timm": {
        "convolution": "linear",
        "batch_norm": "bn",
        "queries_keys_values": "qkv",
        "keys_values": "kv",
        "queries": "q.ln",
        "projection": "proj.ln",
        "linear_up": "ln1",
        "linear_down": "ln2",
        "classifier": "head",
        "classifier_distill": "head_dist",
    },
    "facebook": {
        "convolution": "c",
        "linear": "c",
        "batch_norm": "bn",
        "queries_keys_values": "qkv",
        "keys_values": "kv",
        "queries": "q.1",
        "projection": "proj.1",
        "linear_up": "0",
        "linear_down": "2",
        "classifier": "head",
        "classifier_distill": "head_dist",
    },
}


def renamed(name: str, layout: str, depths: tuple[int, ...]) -> str:
    """Return the name in timm or the original repository of a tensor of transformers' model with an MLP in every stage.

    The name is computed from the old one alone and shares nothing with the converter's tables.
    """
    leaves = LEAVES[layout]
    parts = name.removeprefix("levit.").split(".")
    if parts[0] == "patch_embeddings":
        conv = int(parts[1].removeprefix("embedding_layer_"))
        place = [f"stem.conv{conv}"] if layout == "timm" else [f"patch_embed.{2 * conv - 2}"]
        rest = parts[2:]
    elif parts[0] == "encoder":
        stage, layer, rest = int(parts[2]), int(parts[4]), [part for part in parts[5:] if part != "module"]
        block, is_mlp = divmod(layer, 2)
        if layout == "facebook":
            place = [f"blocks.{sum(2 * depth + 2 for depth in depths[:stage]) + layer}"]
            place += [] if block == depths[stage] and not is_mlp else ["m"]
        elif block < depths[stage]:
            place = [f"stages.{stage}.blocks.{block}", "mlp" if is_mlp else "attn"]
        else:
            place = [f"stages.{stage + 1}.downsample", "mlp" if is_mlp else "attn_downsample"]
    else:
        place, rest = [leaves[parts[0]]], parts[1:]
        if layout == "facebook" and rest[0] == "linear":
            return ".".join([*place, "l", *rest[1:]])
    return ".".join([*place, *(leaves.get(part, part) for part in rest)])


def in_layout(tensors: dict[str, np.ndarray], layout: str, depths: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Return transformers' tensors as another library would have saved them, without index tables."""
    if layout == "hf":
        return tensors
    family = layout.removesuffix("_conv")
    result = {renamed(name, family, depths): array for name, array in tensors.items()}
    if layout.endswith("_conv"):
        for name, array in result.items():
            if array.ndim == 2 and not name.endswith("attention_biases") and not name.startswith("head"):
                result[name] = array[:, :, None, None]
    return result


def timm_model(config: LevitConfig, heads: int, conv: bool = False) -> torch.nn.Module:
    """Return timm's model of this architecture in float64 and evaluation mode."""
    from timm.models import levit

    model = (levit.LevitDistilled if heads == 2 else levit.Levit)(
        img_size=config.image_height_width,
        in_chans=config.num_channels,
        num_classes=config.num_labels,
        embed_dim=config.hidden_sizes,
        key_dim=config.key_dim[0],
        depth=config.depths,
        num_heads=config.num_attention_heads,
        attn_ratio=config.attention_ratio,
        mlp_ratio=config.mlp_ratio,
        use_conv=conv,
    )
    return model.double().eval()
