"""Where every tensor of a PyTorch LeViT checkpoint belongs in the Flax tree, as a table.

A row names a tensor in the file, its place in the variables, and how its axes are permuted. The rows of a layout are
generated from the structure of the model, so that they can be printed, counted, inverted and tested with no checkpoint.
To add a layout: write a generator of prefixes, name its parts, and enter it in `LAYOUTS`.
"""

import enum
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from levit_flax.configuration import LevitConfig

from .errors import ConversionError


class Permutation(enum.Enum):
    """How the axes of a PyTorch tensor go into a Flax array."""

    SAME = None
    TRANSPOSE = (1, 0)  # linear [O I] -> [I O]; attention biases [H N] -> [N H]
    OIHW_TO_HWIO = (2, 3, 1, 0)

    def to_flax(self, tensor: np.ndarray) -> np.ndarray:
        """Permute the axes of a PyTorch tensor; a view, no copy."""
        return tensor if self.value is None else tensor.transpose(self.value)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Undo `to_flax`; a view, no copy."""
        return array if self.value is None else array.transpose(np.argsort(self.value))


class Row(NamedTuple):
    """One tensor: its name in the file, its path in the variables ("params/stem/..."), and its permutation."""

    torch: str
    flax: str
    permutation: Permutation


class Structure(NamedTuple):
    """What the names in a checkpoint depend on.

    Attributes:
        depths: blocks per stage.
        mlp: per stage, whether its blocks have an MLP.
        downsample_mlp: per downsampling, whether an MLP follows.
        heads: names of the classifier heads, from `head` and `head_dist`.
    """

    depths: tuple[int, ...]
    mlp: tuple[bool, ...]
    downsample_mlp: tuple[bool, ...]
    heads: tuple[str, ...]

    @classmethod
    def of(cls, config: LevitConfig, heads: tuple[str, ...]) -> "Structure":
        """Return the structure of a model with this config and these heads."""
        return cls(
            depths=config.depths,
            mlp=tuple(ratio > 0 for ratio in config.mlp_ratio),
            downsample_mlp=tuple(op.mlp_ratio > 0 for op in config.down_ops),
            heads=heads if config.num_labels else (),
        )


class Part(enum.Enum):
    """A piece of the network, with the names of its linear layers in the Flax tree."""

    STEM = ("",)
    ATTENTION = ("qkv", "proj")
    DOWNSAMPLE = ("kv", "q", "proj")
    MLP = ("up", "down")
    HEAD = ()


Prefix = tuple[str, str, Part]  # in the file, in the Flax tree, which piece


class CheckpointLayout(NamedTuple):
    """One way in which LeViT's tensors are named.

    Attributes:
        name: what the public functions call it.
        marker: matches a tensor name that only this layout has.
        prefixes: generates the prefix of every part; all index arithmetic of the layout stands there.
        structure: reads the structure back from the tensor names.
        linears: names of the parts' linear layers, by their names in the Flax tree.
        conv: name of the convolution inside a convolution and norm.
        linear: name of the linear layer inside a linear and norm.
        head_linear: name of the linear layer inside a head.
        norm: name of the batch norm.
    """

    name: str
    marker: re.Pattern[str]
    prefixes: Callable[[Structure], Iterator[Prefix]]
    structure: Callable[[Iterable[str]], Structure]
    linears: Mapping[str, str]
    conv: str
    linear: str
    head_linear: str
    norm: str

    def rows(self, structure: Structure) -> Iterator[Row]:
        """Yield a row for every tensor of a model with this structure."""
        for torch, flax, part in self.prefixes(structure):
            if part is Part.STEM:
                yield Row(f"{torch}.{self.conv}.weight", f"params/{flax}/conv/kernel", Permutation.OIHW_TO_HWIO)
                yield from norm_rows(f"{torch}.{self.norm}", f"{flax}/norm")
            elif part is Part.HEAD:
                yield from norm_rows(f"{torch}.{self.norm}", f"{flax}/norm")
                linear = f"{torch}.{self.head_linear}"
                yield Row(f"{linear}.weight", f"params/{flax}/linear/kernel", Permutation.TRANSPOSE)
                yield Row(f"{linear}.bias", f"params/{flax}/linear/bias", Permutation.SAME)
            else:
                if part is not Part.MLP:
                    yield Row(f"{torch}.attention_biases", f"params/{flax}/attention_biases", Permutation.TRANSPOSE)
                for name in part.value:
                    linear = f"{torch}.{self.linears[name]}"
                    yield Row(
                        f"{linear}.{self.linear}.weight", f"params/{flax}/{name}/linear/kernel", Permutation.TRANSPOSE
                    )
                    yield from norm_rows(f"{linear}.{self.norm}", f"{flax}/{name}/norm")


def norm_rows(torch: str, flax: str) -> Iterator[Row]:
    """Yield the five rows of a batch norm."""
    yield Row(f"{torch}.weight", f"params/{flax}/scale", Permutation.SAME)
    yield Row(f"{torch}.bias", f"params/{flax}/bias", Permutation.SAME)
    yield Row(f"{torch}.running_mean", f"batch_stats/{flax}/mean", Permutation.SAME)
    yield Row(f"{torch}.running_var", f"batch_stats/{flax}/var", Permutation.SAME)
    yield Row(f"{torch}.num_batches_tracked", f"batch_stats/{flax}/count", Permutation.SAME)


HF_HEADS = {"head": "classifier", "head_dist": "classifier_distill"}


def hf_prefixes(structure: Structure) -> Iterator[Prefix]:
    """Yield transformers' prefixes: layers are counted within their stage, a stage's downsampling at its end.

    Under a model with heads everything else is prefixed with `levit.`.
    """
    root = "levit." if structure.heads else ""
    for i in range(4):
        yield f"{root}patch_embeddings.embedding_layer_{i + 1}", f"stem/conv_{i}", Part.STEM
    for stage, depth in enumerate(structure.depths):
        layers = f"{root}encoder.stages.{stage}.layers"
        layer = 0
        for block in range(depth):
            yield f"{layers}.{layer}.module", f"stage_{stage}/block_{block}/attention", Part.ATTENTION
            layer += 1
            if structure.mlp[stage]:
                yield f"{layers}.{layer}.module", f"stage_{stage}/block_{block}/mlp", Part.MLP
                layer += 1
        if stage < len(structure.depths) - 1:
            yield f"{layers}.{layer}", f"downsample_{stage}/attention", Part.DOWNSAMPLE  # no residual, so no `.module`
            if structure.downsample_mlp[stage]:
                yield f"{layers}.{layer + 1}.module", f"downsample_{stage}/mlp", Part.MLP
    for head in structure.heads:
        yield HF_HEADS[head], head, Part.HEAD


HF_LAYER = re.compile(r"(?:levit\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.(?:module\.)?(\w+)\.")


def hf_structure(names: Iterable[str]) -> Structure:
    """Read the structure from transformers' tensor names."""
    kinds: dict[int, dict[int, str]] = {}  # stage -> layer -> a for attention, d for downsampling, m for MLP
    heads: set[str] = set()
    letters = {"queries_keys_values": "a", "keys_values": "d", "linear_up": "m"}
    for name in names:
        heads.update(head for head, torch in HF_HEADS.items() if name.startswith(f"{torch}."))
        match = HF_LAYER.match(name)
        if match and match[3] in letters:
            kinds.setdefault(int(match[1]), {})[int(match[2])] = letters[match[3]]
    stages = ["".join(kind for _, kind in sorted(kinds[stage].items())) for stage in sorted(kinds)]
    for stage, layers in enumerate(stages):
        if not re.fullmatch(r"(a*|(am)*)" + ("" if stage == len(stages) - 1 else "dm?"), layers):
            raise ConversionError(
                f"The layers of stage {stage} do not make a LeViT: expected attention and MLP in turn, then a"
                f" downsampling in all but the last stage; found {' '.join(layers) or 'nothing'} (a attention, m MLP,"
                " d downsampling)."
            )
    return Structure(
        depths=tuple(layers.count("a") for layers in stages),
        mlp=tuple("am" in layers for layers in stages),
        downsample_mlp=tuple(layers.endswith("dm") for layers in stages[:-1]),
        heads=tuple(head for head in HF_HEADS if head in heads),
    )


LAYOUTS = {
    layout.name: layout
    for layout in (
        CheckpointLayout(
            name="hf",
            marker=re.compile(r"(levit\.)?patch_embeddings\.embedding_layer_1\.convolution\.weight"),
            prefixes=hf_prefixes,
            structure=hf_structure,
            linears={
                "qkv": "queries_keys_values",
                "kv": "keys_values",
                "q": "queries",
                "proj": "projection",
                "up": "linear_up",
                "down": "linear_down",
            },
            conv="convolution",
            linear="linear",
            head_linear="linear",
            norm="batch_norm",
        ),
    )
}

# Tensors that are read past, by the end of their name, each with the reason.
IGNORED = {
    "attention_bias_idxs": "a table of indices that follows from the image size; compared with the recomputed one",
}


def detect_layout(names: Iterable[str], where: str) -> CheckpointLayout:
    """Return the layout whose marker is among the tensor names.

    Raises:
        ConversionError: no layout's is.
    """
    names = list(names)
    for layout in LAYOUTS.values():
        if any(layout.marker.fullmatch(name) for name in names):
            return layout
    shown = ", ".join(names[:3]) or "none"
    raise ConversionError(
        f"{where} does not hold a LeViT in a known layout ({', '.join(LAYOUTS)}): expected a tensor named like"
        f" levit.patch_embeddings.embedding_layer_1.convolution.weight; found {len(names)} tensors ({shown}, ...)."
    )
