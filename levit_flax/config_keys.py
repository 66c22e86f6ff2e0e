"""Sort the keys of a config.json: those of LeViT, those that do not matter, and unknown ones."""

import json
import warnings
from collections.abc import Collection, Mapping
from typing import Any

# Keys that transformers writes for its own use. They do not affect the model and are ignored without a warning.
_HOUSEKEEPING_KEYS = frozenset(
    "_name_or_path _commit_hash attn_implementation chunk_size_feed_forward is_encoder_decoder model_type torchscript"
    " transformers_version use_return_dict use_bfloat16".split()
)

# Fields that a config.json contains only if they differ from the default.
_WRITTEN_IF_CHANGED = frozenset(
    "problem_type output_hidden_states output_attentions return_dict architectures dtype".split()
)

# Keys for which null means the default.
_NULL_IS_DEFAULT = frozenset("id2label label2id num_labels output_attentions output_hidden_states return_dict".split())

# Keys that would change the architecture: only the listed values, which are LeViT's, are accepted.
_FIXED_KEYS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("hardswish", "hard_swish"),
    "hidden_dropout_prob": (0, 0.0),
    "attention_probs_dropout_prob": (0, 0.0),
    "batch_norm_eps": (1e-5,),
    "layer_norm_eps": (1e-5,),
    "batch_norm_momentum": (0.1,),
    "qkv_bias": (False,),
    "use_conv": (False,),
    "stem_type": ("s16",),
    "global_pool": ("avg",),
    "attention_type": ("absolute_bias",),
    "pruned_heads": ({},),
    "tie_word_embeddings": (True, False),
}


def _sort_keys(
    values: Mapping[str, Any], known: Collection[str], drop_path_rate: float | None
) -> tuple[dict[str, Any], tuple[tuple[str, str], ...]]:
    """Return the values of a config's fields, and the unknown keys with their values as JSON.

    Args:
        values: the content of a config.json without the block of this package.
        known: names of the fields.
        drop_path_rate: the rate in that block; None for none.
    """
    values = {key: value for key, value in values.items() if value is not None or key not in _NULL_IS_DEFAULT}
    if "id2label" in values:
        values.pop("label2id", None)  # follows from id2label, also if two classes have the same name
    if "torch_dtype" in values:
        values.setdefault("dtype", values.pop("torch_dtype"))
    if drop_path_rate is not None:
        values["drop_path_rate"] = drop_path_rate
    fields, extra = {}, {}
    for key, value in values.items():
        if key in known:
            fields[key] = value
        elif key in _FIXED_KEYS:
            if value not in _FIXED_KEYS[key]:
                raise ValueError(
                    f"The config describes another architecture: expected {key}={_FIXED_KEYS[key][0]!r}, found"
                    f" {value!r}."
                )
        elif key not in _HOUSEKEEPING_KEYS:
            extra[key] = json.dumps(value, sort_keys=True)
    if extra:
        warnings.warn(
            f"The config has keys that LeViT does not use: {', '.join(sorted(extra))}. They have no effect and are"
            " kept in LevitConfig.extra.",
            stacklevel=3,
        )
    return fields, tuple(sorted(extra.items()))
