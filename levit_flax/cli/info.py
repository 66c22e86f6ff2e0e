"""`levit-flax info`."""

import json
from typing import Annotated, Any

import typer

from .options import JsonOption, OfflineOption, RevisionOption
from .output import print_fields, print_json


def info(
    model: Annotated[
        str | None, typer.Argument(help="Directory or Hub id; left out, the published variants are listed.")
    ] = None,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Describe a model, or list the published variants."""
    facts = describe_variants() if model is None else describe_model(model, revision, offline)
    if as_json:
        print_json(facts)
    else:
        print_fields(facts)


def describe_variants() -> dict[str, Any]:
    """Return the parameter count and the widths of every published variant, with two heads."""
    import math

    from levit_flax.configuration import VARIANTS
    from levit_flax.modeling import LevitForImageClassificationWithTeacher, abstract_variables

    facts = {}
    for name, config in VARIANTS.items():
        leaves = abstract_variables(LevitForImageClassificationWithTeacher(config))
        facts[name] = {
            "parameters": sum(math.prod(leaf.shape) for path, leaf in leaves.items() if path.startswith("params/")),
            "hidden_sizes": list(config.hidden_sizes),
            "depths": list(config.depths),
        }
    return facts


def describe_model(source: str, revision: str | None, offline: bool) -> dict[str, Any]:
    """Return what is known of a model."""
    import jax

    from levit_flax.configuration import OWN_BLOCK
    from levit_flax.hub import HubOptions
    from levit_flax.loading import load_model

    model, variables, processor, found = load_model(source, HubOptions(revision, local_files_only=offline))
    config = model.config.to_dict()
    stored = json.loads((found.directory / "config.json").read_text(encoding="utf-8"))
    labels = model.config.id2label
    for key in ("id2label", "label2id", OWN_BLOCK):
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
        "weights": str(found.weights),
        "revision": found.revision,
        "provenance": stored.get(OWN_BLOCK, {}).get("provenance"),
    }
