"""Where every tensor of a PyTorch LeViT checkpoint belongs in the Flax tree, as a table.

A row names a tensor in the file, its place in the variables, and how its axes are permuted. The rows of a layout are
generated from the structure of the model, so that they can be printed, counted, inverted and tested with no checkpoint.
To add a layout: write a generator of prefixes and its inverse, name the parts, and enter it in `LAYOUTS`.
"""

import enum
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from levit_flax.choices import WRITTEN_LAYOUTS as WRITTEN_LAYOUTS
from levit_flax.configuration import LevitConfig

from .errors import ConversionError

Shape = tuple[int, ...]


class Permutation(enum.Enum):
    """How the axes of a PyTorch tensor go into a Flax array; the value is the order of PyTorch's axes."""

    SAME = ()
    TRANSPOSE = (1, 0)  # linear [O I] -> [I O]; attention biases [H N] -> [N H]
    OIHW_TO_HWIO = (2, 3, 1, 0)
    OI11_TO_IO = (1, 0, 2, 3)  # a linear layer as a 1x1 convolution; the last two axes go

    def to_flax(self, tensor: np.ndarray) -> np.ndarray:
        """Permute the axes of a PyTorch tensor; a view, no copy."""
        if self is Permutation.SAME:
            return tensor
        array = tensor.transpose(self.value)
        return array.squeeze((2, 3)) if self is Permutation.OI11_TO_IO else array

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Undo `to_flax`; a view, no copy."""
        if self is Permutation.SAME:
            return array
        if self is Permutation.OI11_TO_IO:
            array = array[..., None, None]
        return array.transpose(np.argsort(self.value))

    def flax_shape(self, shape: Shape) -> Shape | None:
        """Return the shape that a PyTorch tensor of this shape takes on, or None where it cannot."""
        if self is Permutation.SAME:
            return shape
        if len(shape) != len(self.value) or (self is Permutation.OI11_TO_IO and shape[2:] != (1, 1)):
            return None
        return self.to_flax(np.broadcast_to(False, shape)).shape

    def torch_shape(self, shape: Shape) -> Shape:
        """Return the shape in PyTorch of a Flax array of this shape."""
        return self.to_torch(np.broadcast_to(False, shape)).shape


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
        folded: whether the batch norms are folded into their neighbors ("fused", as PyTorch's libraries say).
    """

    depths: tuple[int, ...]
    mlp: tuple[bool, ...]
    downsample_mlp: tuple[bool, ...]
    heads: tuple[str, ...]
    folded: bool = False

    @classmethod
    def of(cls, config: LevitConfig, heads: tuple[str, ...], folded: bool = False) -> "Structure":
        """Return the structure of a model with this config and these heads."""
        return cls(
            depths=config.depths,
            mlp=tuple(ratio > 0 for ratio in config.mlp_ratio),
            downsample_mlp=tuple(op.mlp_ratio > 0 for op in config.down_ops),
            heads=heads if config.num_labels else (),
            folded=folded,
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
        marker: name of the first convolution's kernel, with batch norm.
        folded_marker: the same without; None where the layout has no folded form.
        prefixes: generates the prefix of every part; all index arithmetic of the layout stands there.
        layers: reads the layers of every stage back from the tensor names, as a string of a (attention), m (MLP) and
            d (downsampling, at the end of the stage that it leaves).
        heads: names of the heads, by their names in the Flax tree.
        linears: names of the parts' linear layers, by their names in the Flax tree.
        conv: name of the convolution inside a convolution and norm.
        linear: name of the linear layer inside a linear and norm.
        head_linear: name of the linear layer inside a head.
        norm: name of the batch norm.
        kernel: how the kernels of linear layers outside the heads are stored.
        index_tables: whether the layout stores `attention_bias_idxs`.
    """

    name: str
    marker: re.Pattern[str]
    folded_marker: re.Pattern[str] | None
    prefixes: Callable[[Structure], Iterator[Prefix]]
    layers: Callable[[Iterable[str]], list[str]]
    heads: Mapping[str, str]
    linears: Mapping[str, str]
    conv: str
    linear: str
    head_linear: str
    norm: str
    kernel: Permutation = Permutation.TRANSPOSE
    index_tables: bool = False

    def rows(self, structure: Structure) -> Iterator[Row]:
        """Yield a row for every tensor of a model with this structure."""
        folded = structure.folded
        for torch, flax, part in self.prefixes(structure):
            if part is Part.STEM:
                conv = torch if folded else f"{torch}.{self.conv}"
                yield Row(f"{conv}.weight", f"params/{flax}/conv/kernel", Permutation.OIHW_TO_HWIO)
                yield from bias_row(conv, f"{flax}/conv") if folded else norm_rows(f"{torch}.{self.norm}", flax)
            elif part is Part.HEAD:
                if not folded:
                    yield from norm_rows(f"{torch}.{self.norm}", flax)
                linear = torch if folded else f"{torch}.{self.head_linear}"
                yield Row(f"{linear}.weight", f"params/{flax}/linear/kernel", Permutation.TRANSPOSE)
                yield from bias_row(linear, f"{flax}/linear")
            else:
                if part is not Part.MLP:
                    yield Row(f"{torch}.attention_biases", f"params/{flax}/attention_biases", Permutation.TRANSPOSE)
                for name in part.value:
                    layer = f"{torch}.{self.linears[name]}"
                    linear = layer if folded else f"{layer}.{self.linear}"
                    yield Row(f"{linear}.weight", f"params/{flax}/{name}/linear/kernel", self.kernel)
                    yield from (
                        bias_row(linear, f"{flax}/{name}/linear")
                        if folded
                        else norm_rows(f"{layer}.{self.norm}", f"{flax}/{name}")
                    )

    def tables(self, structure: Structure) -> dict[str, str]:
        """Return the path of each table of attention biases by the name of the table of indices that goes with it."""
        return {
            f"{torch}.attention_bias_idxs": f"params/{flax}/attention_biases"
            for torch, flax, part in self.prefixes(structure)
            if part in (Part.ATTENTION, Part.DOWNSAMPLE)
        }

    def structure(self, names: Iterable[str]) -> Structure:
        """Read the structure back from the tensor names.

        Raises:
            ConversionError: the layers do not follow each other as in a LeViT.
        """
        names = list(names)
        stages = self.layers(names)
        for stage, layers in enumerate(stages):
            if not re.fullmatch(r"(a*|(am)*)" + ("" if stage == len(stages) - 1 else "dm?"), layers):
                raise ConversionError(
                    f"The layers of stage {stage} do not make a LeViT: expected attention and MLP in turn, then a"
                    f" downsampling in all but the last stage; found {' '.join(layers) or 'nothing'} (a attention, m"
                    " MLP, d downsampling)."
                )
        return Structure(
            depths=tuple(layers.count("a") for layers in stages),
            mlp=tuple("am" in layers for layers in stages),
            downsample_mlp=tuple(layers.endswith("dm") for layers in stages[:-1]),
            heads=tuple(
                head for head, torch in self.heads.items() if any(name.startswith(f"{torch}.") for name in names)
            ),
            folded=self.folded_marker is not None and any(self.folded_marker.fullmatch(name) for name in names),
        )


def norm_rows(torch: str, flax: str) -> Iterator[Row]:
    """Yield the five rows of a batch norm; `flax` is the path of the layer that it belongs to."""
    yield Row(f"{torch}.weight", f"params/{flax}/norm/scale", Permutation.SAME)
    yield Row(f"{torch}.bias", f"params/{flax}/norm/bias", Permutation.SAME)
    yield Row(f"{torch}.running_mean", f"batch_stats/{flax}/norm/mean", Permutation.SAME)
    yield Row(f"{torch}.running_var", f"batch_stats/{flax}/norm/var", Permutation.SAME)
    yield Row(f"{torch}.num_batches_tracked", f"batch_stats/{flax}/norm/count", Permutation.SAME)


def bias_row(torch: str, flax: str) -> Iterator[Row]:
    """Yield the row of a bias."""
    yield Row(f"{torch}.bias", f"params/{flax}/bias", Permutation.SAME)


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
HF_KINDS = {"queries_keys_values": "a", "keys_values": "d", "linear_up": "m"}


def hf_layers(names: Iterable[str]) -> list[str]:
    """Read the layers of every stage from transformers' tensor names."""
    kinds: dict[int, dict[int, str]] = {}
    for name in names:
        match = HF_LAYER.match(name)
        if match and match[3] in HF_KINDS:
            kinds.setdefault(int(match[1]), {})[int(match[2])] = HF_KINDS[match[3]]
    return ["".join(kind for _, kind in sorted(kinds[stage].items())) for stage in sorted(kinds)]


SAME_HEADS = {"head": "head", "head_dist": "head_dist"}


def facebook_prefixes(structure: Structure) -> Iterator[Prefix]:
    """Yield the original code's prefixes: blocks are counted through all stages, convolutions with activations."""
    for i in range(4):
        yield f"patch_embed.{2 * i}", f"stem/conv_{i}", Part.STEM
    block = 0
    for stage, depth in enumerate(structure.depths):
        for i in range(depth):
            yield f"blocks.{block}.m", f"stage_{stage}/block_{i}/attention", Part.ATTENTION
            block += 1
            if structure.mlp[stage]:
                yield f"blocks.{block}.m", f"stage_{stage}/block_{i}/mlp", Part.MLP
                block += 1
        if stage < len(structure.depths) - 1:
            yield f"blocks.{block}", f"downsample_{stage}/attention", Part.DOWNSAMPLE  # no residual, so no `.m`
            block += 1
            if structure.downsample_mlp[stage]:
                yield f"blocks.{block}.m", f"downsample_{stage}/mlp", Part.MLP
                block += 1
    for head in structure.heads:
        yield head, head, Part.HEAD


FACEBOOK_BLOCK = re.compile(r"blocks\.(\d+)\.(m\.qkv|m\.0|kv)\.")
FACEBOOK_KINDS = {"m.qkv": "a", "m.0": "m", "kv": "d"}


def facebook_layers(names: Iterable[str]) -> list[str]:
    """Read the layers of every stage from the original code's tensor names."""
    matches = filter(None, map(FACEBOOK_BLOCK.match, names))
    kinds = {int(match[1]): FACEBOOK_KINDS[match[2]] for match in matches}
    return re.findall("[am]*dm?|[am]+$", "".join(kind for _, kind in sorted(kinds.items())))


def timm_prefixes(structure: Structure) -> Iterator[Prefix]:
    """Yield timm's prefixes: a downsampling belongs to the stage that it leads to."""
    for i in range(4):
        yield f"stem.conv{i + 1}", f"stem/conv_{i}", Part.STEM
    for stage, depth in enumerate(structure.depths):
        if stage:
            downsample = f"stages.{stage}.downsample"
            yield f"{downsample}.attn_downsample", f"downsample_{stage - 1}/attention", Part.DOWNSAMPLE
            if structure.downsample_mlp[stage - 1]:
                yield f"{downsample}.mlp", f"downsample_{stage - 1}/mlp", Part.MLP
        for i in range(depth):
            block = f"stages.{stage}.blocks.{i}"
            yield f"{block}.attn", f"stage_{stage}/block_{i}/attention", Part.ATTENTION
            if structure.mlp[stage]:
                yield f"{block}.mlp", f"stage_{stage}/block_{i}/mlp", Part.MLP
    for head in structure.heads:
        yield head, head, Part.HEAD


TIMM_LAYER = re.compile(r"stages\.(\d+)\.(?:blocks\.(\d+)|downsample)\.(attn|attn_downsample|mlp)\.")


def timm_layers(names: Iterable[str]) -> list[str]:
    """Read the layers of every stage from timm's tensor names."""
    found = {(int(m[1]), int(m[2] or -1), m[3]) for m in map(TIMM_LAYER.match, names) if m}
    stages = [""] * (max((stage for stage, _, _ in found), default=-1) + 1)
    for stage, block, kind in sorted(found):  # downsampling (-1) first, attention before MLP
        if block >= 0:
            stages[stage] += kind[0]
        elif stage:
            stages[stage - 1] += "d" if kind == "attn_downsample" else "m"
    return stages


HF = CheckpointLayout(
    name="hf",
    marker=re.compile(r"(levit\.)?patch_embeddings\.embedding_layer_1\.convolution\.weight"),
    folded_marker=None,
    prefixes=hf_prefixes,
    layers=hf_layers,
    heads=HF_HEADS,
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
)
TIMM = CheckpointLayout(
    name="timm",
    marker=re.compile(r"stem\.conv1\.linear\.weight"),
    folded_marker=re.compile(r"stem\.conv1\.weight"),
    prefixes=timm_prefixes,
    layers=timm_layers,
    heads=SAME_HEADS,
    linears={"qkv": "qkv", "kv": "kv", "q": "q.ln", "proj": "proj.ln", "up": "ln1", "down": "ln2"},
    conv="linear",
    linear="linear",
    head_linear="linear",
    norm="bn",
)
FACEBOOK = CheckpointLayout(
    name="facebook",
    marker=re.compile(r"patch_embed\.0\.c\.weight"),
    folded_marker=re.compile(r"patch_embed\.0\.weight"),
    prefixes=facebook_prefixes,
    layers=facebook_layers,
    heads=SAME_HEADS,
    linears={"qkv": "qkv", "kv": "kv", "q": "q.1", "proj": "proj.1", "up": "0", "down": "2"},
    conv="c",
    linear="c",
    head_linear="l",
    norm="bn",
    index_tables=True,
)

# A layout and its convolutional flavour name the same tensors; `detect_layout` tells them apart by the shapes.
LAYOUTS = {
    layout.name: layout
    for layout in (
        HF,
        TIMM,
        TIMM._replace(name="timm_conv", kernel=Permutation.OI11_TO_IO),
        FACEBOOK,  # also timm before 0.8
        FACEBOOK._replace(name="facebook_conv", kernel=Permutation.OI11_TO_IO),  # levit_c.py; read only
    )
}

# Tensors that are read past, by the end of their name, each with the reason.
IGNORED = {
    "attention_bias_idxs": "a table of indices that follows from the image size; compared with the recomputed one",
}


def detect_layout(shapes: Mapping[str, Shape], where: str) -> CheckpointLayout:
    """Return the layout whose marker is among the tensor names, in the flavour that most kernels have.

    Args:
        shapes: the shape of every tensor by its name.
        where: what to call the checkpoint in messages.

    Raises:
        ConversionError: there is no marker of any layout, or of two.
    """
    found = [
        layout
        for layout in LAYOUTS.values()
        if any(layout.marker.fullmatch(name) for name in shapes)
        or (layout.folded_marker and any(layout.folded_marker.fullmatch(name) for name in shapes))
    ]
    if not found:
        shown = ", ".join(list(shapes)[:3]) or "none"
        raise ConversionError(
            f"{where} does not hold a LeViT in a known layout ({', '.join(LAYOUTS)}): expected a tensor named like"
            " levit.patch_embeddings.embedding_layer_1.convolution.weight, stem.conv1.linear.weight or"
            f" patch_embed.0.c.weight; found {len(shapes)} tensors ({shown}, ...)."
        )
    if len({layout.prefixes for layout in found}) > 1:
        names = " and of ".join(layout.name for layout in found)
        raise ConversionError(
            f"{where} mixes layouts: it has the first convolution of {names}. Expected the tensors of one model."
        )

    def kernels(layout: CheckpointLayout) -> int:
        rank = len(layout.kernel.value)
        stem = [prefix for prefix, _, part in layout.prefixes(Structure((), (), (), ())) if part is Part.STEM]
        return sum(
            len(shape) == rank and name.endswith(".weight") and not name.startswith(tuple(stem))
            for name, shape in shapes.items()
        )

    return max(found, key=kernels)
