"""The published LeViT variants."""

from collections.abc import Mapping

from .config_values import _DerivedLabels
from .configuration import LevitConfig
from .imagenet import _imagenet_labels

# timm registers these as LeViT variants, with SiLU instead of hard swish, and has not published weights for them.
_UNTRAINED_TIMM_VARIANTS = ("levit_384_s8", "levit_512_s8", "levit_512", "levit_256d", "levit_512d")


class _Variants(dict[str, LevitConfig]):
    """Configs of the published variants by name, with ImageNet's 1000 classes.

    Raises:
        KeyError: the name is not that of a published variant.

    Examples:
        >>> list(VARIANTS)
        ['levit-128S', 'levit-128', 'levit-192', 'levit-256', 'levit-384']
        >>> VARIANTS["levit-128S"].depths
        (2, 3, 4)

    Source: Graham et al. 2021, table 1.
    """

    def __missing__(self, name: str) -> LevitConfig:
        if str(name).replace("-", "_").replace("levit_conv_", "levit_") in _UNTRAINED_TIMM_VARIANTS:
            raise KeyError(
                f"{name} is not a published LeViT variant but an experiment of timm without weights: expected one of"
                f" {', '.join(self)}."
            )
        raise KeyError(f"{name} is not a published LeViT variant: expected one of {', '.join(self)}.")


def _published(
    hidden_sizes: tuple[int, ...],
    key_dim: int,
    heads: tuple[int, ...],
    depths: tuple[int, ...] = (4, 4, 4),
    drop_path_rate: float = 0.0,
) -> LevitConfig:
    return LevitConfig(
        hidden_sizes=hidden_sizes,
        key_dim=(key_dim,) * 3,
        num_attention_heads=heads,
        depths=depths,
        drop_path_rate=drop_path_rate,
        id2label=_DerivedLabels(_imagenet_labels()),  # replaced if num_labels changes
    )


# Widths, heads and depths are those of Graham et al. 2021, table 1; key_dim and drop_path_rate those of `specification`
# in facebookresearch/LeViT levit.py.
VARIANTS: Mapping[str, LevitConfig] = _Variants(
    {
        "levit-128S": _published((128, 256, 384), 16, (4, 6, 8), depths=(2, 3, 4)),
        "levit-128": _published((128, 256, 384), 16, (4, 8, 12)),
        "levit-192": _published((192, 288, 384), 32, (3, 5, 6)),
        "levit-256": _published((256, 384, 512), 32, (4, 6, 8)),
        "levit-384": _published((384, 512, 768), 32, (6, 9, 12), drop_path_rate=0.1),
    }
)
