"""The command `levit-flax info`."""

from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import JsonOption, OfflineOption, RevisionOption
from .output import print_fields, print_json

if TYPE_CHECKING:
    from levit_flax.configuration import LevitConfig


def info(
    model: Annotated[
        str | None, typer.Argument(help="Model directory or Hub id; by default, the published variants are listed.")
    ] = None,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Describe a model, or list the published variants."""
    facts = _describe_variants() if model is None else _describe_model(model, revision, offline)
    if as_json:
        print_json(facts)
    else:
        if "labels" in facts:
            labels = facts["labels"]
            facts["labels"] = f"{len(labels)}: {', '.join(labels[:3])}{', ...' if len(labels) > 3 else ''}"
        print_fields(facts)


def _describe_variants() -> dict[str, Any]:
    """Return the parameter count, widths and depths of every published variant with two heads."""
    from levit_flax.variants import VARIANTS

    return {
        name: {
            "parameters": _count_parameters(config),
            "hidden_sizes": list(config.hidden_sizes),
            "depths": list(config.depths),
        }
        for name, config in VARIANTS.items()
    }


def _count_parameters(config: "LevitConfig") -> int:
    """Return the number of parameters of a model with two heads, without JAX, which takes a second to import."""

    def linear(inputs: int, outputs: int) -> int:
        return inputs * outputs + 2 * outputs  # with the scale and the bias of its batch norm

    widths = [config.num_channels, *(config.hidden_sizes[0] // divisor for divisor in (8, 4, 2, 1))]
    count = sum(linear(config.kernel_size**2 * inputs, outputs) for inputs, outputs in pairwise(widths))
    for i, (width, depth) in enumerate(zip(config.hidden_sizes, config.depths, strict=True)):
        heads, key_dim, tokens = config.num_attention_heads[i], config.key_dim[i], prod(config.grids[i])
        value_dim, hidden = config.attention_ratio[i] * key_dim, config.mlp_ratio[i] * width
        attention = linear(width, heads * (2 * key_dim + value_dim)) + linear(heads * value_dim, width) + tokens * heads
        count += depth * (attention + (linear(width, hidden) + linear(hidden, width) if hidden else 0))
    for op, (width, new), grid in zip(config.down_ops, pairwise(config.hidden_sizes), config.grids[:-1], strict=True):
        heads, value_dim, hidden = op.num_attention_heads, op.attention_ratio * op.key_dim, op.mlp_ratio * new
        count += linear(width, heads * (op.key_dim + value_dim)) + linear(width, heads * op.key_dim)
        count += linear(heads * value_dim, new) + prod(grid) * heads
        count += linear(new, hidden) + linear(hidden, new) if hidden else 0
    last = config.hidden_sizes[-1]
    return count + 2 * (2 * last + last * config.num_labels + config.num_labels)


def _describe_model(source: str, revision: str | None, offline: bool) -> dict[str, Any]:
    """Return the class, weights, config, preprocessing and provenance of a model."""
    import jax

    from levit_flax.checkpoint import _read_provenance
    from levit_flax.configuration import _OWN_BLOCK
    from levit_flax.hub import _HubOptions
    from levit_flax.loading import _load_model

    model, variables, processor, files = _load_model(
        source, _HubOptions(revision, local_files_only=offline), dtype="auto"
    )
    config = model.config.to_dict()
    labels = model.config.id2label
    for key in ("id2label", "label2id", _OWN_BLOCK):
        config.pop(key, None)
    return {
        "model": type(model).__name__,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        "dtype": str(jax.numpy.dtype(model.param_dtype)),
        "folded": model.folded,
        "labels": list(labels),
        **config,
        "drop_path_rate": model.config.drop_path_rate,
        "preprocessing": processor.to_dict(),
        "weights": str(files.weights),
        "revision": files.revision,
        "provenance": _read_provenance(files.directory) or None,
    }
