"""The command `levit-flax info`."""

from typing import Annotated, Any

import typer

from .options import JsonOption, OfflineOption, RevisionOption
from .output import print_fields, print_json


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
        print_fields(facts)


def _describe_variants() -> dict[str, Any]:
    """Return the parameter count, widths and depths of every published variant with two heads."""
    import math

    from levit_flax.modeling import LevitForImageClassificationWithTeacher, _abstract_variables
    from levit_flax.variants import VARIANTS

    facts = {}
    for name, config in VARIANTS.items():
        leaves = _abstract_variables(LevitForImageClassificationWithTeacher(config))
        facts[name] = {
            "parameters": sum(math.prod(leaf.shape) for path, leaf in leaves.items() if path.startswith("params/")),
            "hidden_sizes": list(config.hidden_sizes),
            "depths": list(config.depths),
        }
    return facts


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
        "labels": f"{len(labels)}: {', '.join(labels[:3])}, ...",
        **config,
        "drop_path_rate": model.config.drop_path_rate,
        "preprocessing": processor.to_dict(),
        "weights": str(files.weights),
        "revision": files.revision,
        "provenance": _read_provenance(files.directory) or None,
    }
