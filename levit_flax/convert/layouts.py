"""Map every tensor of a PyTorch LeViT checkpoint to a leaf of the Flax tree.

A row holds the tensor's name in the file, its path in the variables, and the permutation of its axes. The rows of a
layout are generated from the structure of a model alone, so they can be counted, inverted and tested without a
checkpoint. To add a layout, write a generator of prefixes and its inverse, name the parts, and add it to `_LAYOUTS`.
"""

import enum
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from levit_flax.attention import _offset_index
from levit_flax.configuration import LevitConfig

from .errors import ConversionError

_Shape = tuple[int, ...]


class _Permutation(enum.Enum):
    """Permutation of a PyTorch tensor's axes into a Flax array's; the value is the order of PyTorch's axes."""

    SAME = ()
    TRANSPOSE = (1, 0)  # linear [O I] -> [I O]; attention biases [H N] -> [N H]
    OIHW_TO_HWIO = (2, 3, 1, 0)
    OI11_TO_IO = (1, 0, 2, 3)  # linear layer as a 1x1 convolution; drops the last two axes

    def to_flax(self, tensor: np.ndarray) -> np.ndarray:
        """Return a view of a PyTorch tensor with Flax's axis order."""
        if self is _Permutation.SAME:
            return tensor
        array = tensor.transpose(self.value)
        return array.squeeze((2, 3)) if self is _Permutation.OI11_TO_IO else array

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Return a view of a Flax array with PyTorch's axis order."""
        if self is _Permutation.SAME:
            return array
        if self is _Permutation.OI11_TO_IO:
            array = array[..., None, None]
        return array.transpose(np.argsort(self.value))

    def flax_shape(self, shape: _Shape) -> _Shape | None:
        """Return the Flax shape of a PyTorch tensor of this shape, or None if the permutation does not apply."""
        if self is _Permutation.SAME:
            return shape
        if len(shape) != len(self.value) or (self is _Permutation.OI11_TO_IO and shape[2:] != (1, 1)):
            return None
        return self.to_flax(np.broadcast_to(False, shape)).shape

    def torch_shape(self, shape: _Shape) -> _Shape:
        """Return the PyTorch shape of a Flax array of this shape."""
        return self.to_torch(np.broadcast_to(False, shape)).shape


class _Row(NamedTuple):
    """A tensor: its name in the file, its path in the variables ("params/stem/..."), and its permutation."""

    torch: str
    flax: str
    permutation: _Permutation


class _Structure(NamedTuple):
    """The properties of a model that determine its tensor names.

    Attributes:
        depths: number of blocks per stage.
        mlp: per stage, whether its blocks have an MLP.
        downsample_mlp: per downsampling, whether an MLP follows.
        heads: names of the classifier heads, from `head` and `head_dist`.
        folded: whether the batch norms are folded into the adjacent layers; PyTorch libraries call this "fused".
    """

    depths: tuple[int, ...]
    mlp: tuple[bool, ...]
    downsample_mlp: tuple[bool, ...]
    heads: tuple[str, ...]
    folded: bool = False

    @classmethod
    def of(cls, config: LevitConfig, heads: tuple[str, ...], folded: bool = False) -> "_Structure":
        """Return the structure of a model with this config and these heads."""
        return cls(
            depths=config.depths,
            mlp=tuple(ratio > 0 for ratio in config.mlp_ratio),
            downsample_mlp=tuple(op.mlp_ratio > 0 for op in config.down_ops),
            heads=heads if config.num_labels else (),
            folded=folded,
        )


class _Part(enum.Enum):
    """A part of the network, with the names of its linear layers in the Flax tree."""

    STEM = ("",)
    ATTENTION = ("qkv", "proj")
    DOWNSAMPLE = ("kv", "q", "proj")
    MLP = ("up", "down")
    HEAD = ()


_Prefix = tuple[str, str, _Part]  # in the file, in the Flax tree, of which part


class _CheckpointLayout(NamedTuple):
    """A naming scheme for LeViT's tensors.

    Attributes:
        name: the name that public functions accept.
        marker: matches the kernel of the first convolution if it has a batch norm.
        folded_marker: matches it if the batch norm is folded; None if the layout has no folded form.
        prefixes: generates the prefix of every part, and does all index arithmetic of the layout.
        layers: reads each stage's layers from the tensor names, as a string of a (attention), m (MLP) and d
            (downsampling, at the end of the stage before it).
        heads: names of the heads, by their names in the Flax tree.
        linears: names of the parts' linear layers, by their names in the Flax tree.
        conv: name of the convolution in a convolution with batch norm.
        linear: name of the linear layer in a linear layer with batch norm.
        head_linear: name of the linear layer in a head.
        norm: name of the batch norm.
        kernel: permutation of the kernels of linear layers outside the heads.
        index_tables: whether the layout stores `attention_bias_idxs`.
    """

    name: str
    marker: re.Pattern[str]
    folded_marker: re.Pattern[str] | None
    prefixes: Callable[[_Structure], Iterator[_Prefix]]
    layers: Callable[[Iterable[str]], list[str]]
    heads: Mapping[str, str]
    linears: Mapping[str, str]
    conv: str
    linear: str
    head_linear: str
    norm: str
    kernel: _Permutation = _Permutation.TRANSPOSE
    index_tables: bool = False

    def rows(self, structure: _Structure) -> Iterator[_Row]:
        """Yield a row for every tensor of a model with this structure."""
        folded = structure.folded
        for torch, flax, part in self.prefixes(structure):
            if part is _Part.STEM:
                conv = torch if folded else f"{torch}.{self.conv}"
                yield _Row(f"{conv}.weight", f"params/{flax}/conv/kernel", _Permutation.OIHW_TO_HWIO)
                yield from _bias_row(conv, f"{flax}/conv") if folded else _norm_rows(f"{torch}.{self.norm}", flax)
            elif part is _Part.HEAD:
                if not folded:
                    yield from _norm_rows(f"{torch}.{self.norm}", flax)
                linear = torch if folded else f"{torch}.{self.head_linear}"
                yield _Row(f"{linear}.weight", f"params/{flax}/linear/kernel", _Permutation.TRANSPOSE)
                yield from _bias_row(linear, f"{flax}/linear")
            else:
                if part is not _Part.MLP:
                    yield _Row(f"{torch}.attention_biases", f"params/{flax}/attention_biases", _Permutation.TRANSPOSE)
                for name in part.value:
                    layer = f"{torch}.{self.linears[name]}"
                    linear = layer if folded else f"{layer}.{self.linear}"
                    yield _Row(f"{linear}.weight", f"params/{flax}/{name}/linear/kernel", self.kernel)
                    yield from (
                        _bias_row(linear, f"{flax}/{name}/linear")
                        if folded
                        else _norm_rows(f"{layer}.{self.norm}", f"{flax}/{name}")
                    )

    def tables(self, structure: _Structure) -> dict[str, str]:
        """Return the path of each table of attention biases, by the name of its index table."""
        return {
            f"{torch}.attention_bias_idxs": f"params/{flax}/attention_biases"
            for torch, flax, part in self.prefixes(structure)
            if part in (_Part.ATTENTION, _Part.DOWNSAMPLE)
        }

    def structure(self, names: Iterable[str]) -> _Structure:
        """Read the structure from the tensor names.

        Raises:
            ConversionError: the order of the layers is not LeViT's.
        """
        names = list(names)
        stages = self.layers(names)
        for stage, layers in enumerate(stages):
            if not re.fullmatch(r"(a*|(am)*)" + ("" if stage == len(stages) - 1 else "dm?"), layers):
                raise ConversionError(
                    f"The layers of stage {stage} are not LeViT's: expected attention (a) and MLP (m) alternately, then"
                    f" a downsampling (d) except in the last stage, found {' '.join(layers) or 'no layers'}. Check"
                    " that the checkpoint is complete."
                )
        return _Structure(
            depths=tuple(layers.count("a") for layers in stages),
            mlp=tuple("am" in layers for layers in stages),
            downsample_mlp=tuple(layers.endswith("dm") for layers in stages[:-1]),
            heads=tuple(
                head for head, torch in self.heads.items() if any(name.startswith(f"{torch}.") for name in names)
            ),
            folded=self.folded_marker is not None and any(self.folded_marker.fullmatch(name) for name in names),
        )


def _norm_rows(torch: str, flax: str) -> Iterator[_Row]:
    """Yield the five rows of a batch norm; `flax` is the path of its layer."""
    yield _Row(f"{torch}.weight", f"params/{flax}/norm/scale", _Permutation.SAME)
    yield _Row(f"{torch}.bias", f"params/{flax}/norm/bias", _Permutation.SAME)
    yield _Row(f"{torch}.running_mean", f"batch_stats/{flax}/norm/mean", _Permutation.SAME)
    yield _Row(f"{torch}.running_var", f"batch_stats/{flax}/norm/var", _Permutation.SAME)
    yield _Row(f"{torch}.num_batches_tracked", f"batch_stats/{flax}/norm/count", _Permutation.SAME)


def _bias_row(torch: str, flax: str) -> Iterator[_Row]:
    """Yield the row of a bias."""
    yield _Row(f"{torch}.bias", f"params/{flax}/bias", _Permutation.SAME)


_HF_HEADS = {"head": "classifier", "head_dist": "classifier_distill"}


def _hf_prefixes(structure: _Structure) -> Iterator[_Prefix]:
    """Yield transformers' prefixes: layers are numbered per stage, and a downsampling ends the stage before it.

    In a model with heads, all other names start with `levit.`.
    """
    root = "levit." if structure.heads else ""
    for i in range(4):
        yield f"{root}patch_embeddings.embedding_layer_{i + 1}", f"stem/conv_{i}", _Part.STEM
    for stage, depth in enumerate(structure.depths):
        layers = f"{root}encoder.stages.{stage}.layers"
        layer = 0
        for block in range(depth):
            yield f"{layers}.{layer}.module", f"stage_{stage}/block_{block}/attention", _Part.ATTENTION
            layer += 1
            if structure.mlp[stage]:
                yield f"{layers}.{layer}.module", f"stage_{stage}/block_{block}/mlp", _Part.MLP
                layer += 1
        if stage < len(structure.depths) - 1:
            yield f"{layers}.{layer}", f"downsample_{stage}/attention", _Part.DOWNSAMPLE  # no residual, so no `.module`
            if structure.downsample_mlp[stage]:
                yield f"{layers}.{layer + 1}.module", f"downsample_{stage}/mlp", _Part.MLP
    for head in structure.heads:
        yield _HF_HEADS[head], head, _Part.HEAD


_HF_LAYER = re.compile(r"(?:levit\.)?encoder\.stages\.(\d{1,18})\.layers\.(\d{1,18})\.(?:module\.)?(\w+)\.")
_HF_KINDS = {"queries_keys_values": "a", "keys_values": "d", "linear_up": "m"}


def _hf_layers(names: Iterable[str]) -> list[str]:
    """Read each stage's layers from transformers' tensor names."""
    kinds: dict[int, dict[int, str]] = {}
    for name in names:
        match = _HF_LAYER.match(name)
        if match and match[3] in _HF_KINDS:
            kinds.setdefault(int(match[1]), {})[int(match[2])] = _HF_KINDS[match[3]]
    return ["".join(kind for _, kind in sorted(kinds[stage].items())) for stage in sorted(kinds)]


_SAME_HEADS = {"head": "head", "head_dist": "head_dist"}


def _facebook_prefixes(structure: _Structure) -> Iterator[_Prefix]:
    """Yield the original code's prefixes: blocks are numbered across stages, convolutions along with activations."""
    for i in range(4):
        yield f"patch_embed.{2 * i}", f"stem/conv_{i}", _Part.STEM
    block = 0
    for stage, depth in enumerate(structure.depths):
        for i in range(depth):
            yield f"blocks.{block}.m", f"stage_{stage}/block_{i}/attention", _Part.ATTENTION
            block += 1
            if structure.mlp[stage]:
                yield f"blocks.{block}.m", f"stage_{stage}/block_{i}/mlp", _Part.MLP
                block += 1
        if stage < len(structure.depths) - 1:
            yield f"blocks.{block}", f"downsample_{stage}/attention", _Part.DOWNSAMPLE  # no residual, so no `.m`
            block += 1
            if structure.downsample_mlp[stage]:
                yield f"blocks.{block}.m", f"downsample_{stage}/mlp", _Part.MLP
                block += 1
    for head in structure.heads:
        yield head, head, _Part.HEAD


_FACEBOOK_BLOCK = re.compile(r"blocks\.(\d{1,18})\.(m\.qkv|m\.0|kv)\.")
_FACEBOOK_KINDS = {"m.qkv": "a", "m.0": "m", "kv": "d"}


def _facebook_layers(names: Iterable[str]) -> list[str]:
    """Read each stage's layers from the original code's tensor names."""
    matches = filter(None, map(_FACEBOOK_BLOCK.match, names))
    kinds = {int(match[1]): _FACEBOOK_KINDS[match[2]] for match in matches}
    return re.findall("[am]*dm?|[am]+$", "".join(kind for _, kind in sorted(kinds.items())))


def _timm_prefixes(structure: _Structure) -> Iterator[_Prefix]:
    """Yield timm's prefixes: a downsampling begins the stage after it."""
    for i in range(4):
        yield f"stem.conv{i + 1}", f"stem/conv_{i}", _Part.STEM
    for stage, depth in enumerate(structure.depths):
        if stage:
            downsample = f"stages.{stage}.downsample"
            yield f"{downsample}.attn_downsample", f"downsample_{stage - 1}/attention", _Part.DOWNSAMPLE
            if structure.downsample_mlp[stage - 1]:
                yield f"{downsample}.mlp", f"downsample_{stage - 1}/mlp", _Part.MLP
        for i in range(depth):
            block = f"stages.{stage}.blocks.{i}"
            yield f"{block}.attn", f"stage_{stage}/block_{i}/attention", _Part.ATTENTION
            if structure.mlp[stage]:
                yield f"{block}.mlp", f"stage_{stage}/block_{i}/mlp", _Part.MLP
    for head in structure.heads:
        yield head, head, _Part.HEAD


_TIMM_LAYER = re.compile(r"stages\.(\d{1,18})\.(?:blocks\.(\d{1,18})|downsample)\.(attn|attn_downsample|mlp)\.")


def _timm_layers(names: Iterable[str]) -> list[str]:
    """Read each stage's layers from timm's tensor names."""
    layers = {(int(m[1]), int(m[2] or -1), m[3]) for m in map(_TIMM_LAYER.match, names) if m}
    last = max((stage for stage, _, _ in layers), default=-1)
    if last > len(layers):  # a number of many digits must not become a list of that length
        raise ConversionError(f"The layers of stage {last} are not LeViT's: the stages before it have no layers.")
    stages = [""] * (last + 1)
    for stage, block, kind in sorted(layers):  # downsampling (-1) first, attention before MLP
        if block >= 0:
            stages[stage] += kind[0]
        elif stage:
            stages[stage - 1] += "d" if kind == "attn_downsample" else "m"
    return stages


_HF = _CheckpointLayout(
    name="hf",
    marker=re.compile(r"(levit\.)?patch_embeddings\.embedding_layer_1\.convolution\.weight"),
    folded_marker=None,
    prefixes=_hf_prefixes,
    layers=_hf_layers,
    heads=_HF_HEADS,
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
_TIMM = _CheckpointLayout(
    name="timm",
    marker=re.compile(r"stem\.conv1\.linear\.weight"),
    folded_marker=re.compile(r"stem\.conv1\.weight"),
    prefixes=_timm_prefixes,
    layers=_timm_layers,
    heads=_SAME_HEADS,
    linears={"qkv": "qkv", "kv": "kv", "q": "q.ln", "proj": "proj.ln", "up": "ln1", "down": "ln2"},
    conv="linear",
    linear="linear",
    head_linear="linear",
    norm="bn",
)
_FACEBOOK = _CheckpointLayout(
    name="facebook",
    marker=re.compile(r"patch_embed\.0\.c\.weight"),
    folded_marker=re.compile(r"patch_embed\.0\.weight"),
    prefixes=_facebook_prefixes,
    layers=_facebook_layers,
    heads=_SAME_HEADS,
    linears={"qkv": "qkv", "kv": "kv", "q": "q.1", "proj": "proj.1", "up": "0", "down": "2"},
    conv="c",
    linear="c",
    head_linear="l",
    norm="bn",
    index_tables=True,
)

# A layout and its convolutional form use the same names; `_detect_layout` distinguishes them by shapes.
_LAYOUTS = {
    layout.name: layout
    for layout in (
        _HF,
        _TIMM,
        _TIMM._replace(name="timm_conv", kernel=_Permutation.OI11_TO_IO),
        _FACEBOOK,  # also timm before 0.8
        _FACEBOOK._replace(name="facebook_conv", kernel=_Permutation.OI11_TO_IO),  # levit_c.py; read only
    )
}

# Tensors that are not converted, by the last part of their name, each with the reason.
_IGNORED = {
    "attention_bias_idxs": "index tables, recomputed from the image size and compared",
}


def _index_table(config: LevitConfig, path: str) -> np.ndarray:
    """Return the index table [Q K] of the attention biases at this path."""
    place, _, index = path.split("/")[1].rpartition("_")
    stride = config.down_ops[int(index)].stride if place == "downsample" else 1
    return _offset_index(config.grids[int(index)], stride)


def _detect_layout(shapes: Mapping[str, _Shape], where: str) -> _CheckpointLayout:
    """Return the layout of a checkpoint, from its tensor names and the shapes of its kernels."""
    matching = [
        layout
        for layout in _LAYOUTS.values()
        if any(layout.marker.fullmatch(name) for name in shapes)
        or (layout.folded_marker and any(layout.folded_marker.fullmatch(name) for name in shapes))
    ]
    if not matching:
        shown = ", ".join(list(shapes)[:3]) or "none"
        raise ConversionError(
            f"{where} does not contain a LeViT in a known layout ({', '.join(_LAYOUTS)}): expected a tensor named"
            " levit.patch_embeddings.embedding_layer_1.convolution.weight, stem.conv1.linear.weight or"
            f" patch_embed.0.c.weight, found {len(shapes)} tensors ({shown}, ...). Check that it is a LeViT checkpoint."
        )
    if len({layout.prefixes for layout in matching}) > 1:
        names = " and ".join(sorted({layout.name.removesuffix("_conv") for layout in matching}))
        raise ConversionError(
            f"{where} mixes layouts: expected the tensors of one model, found the first convolution of {names}. Remove"
            " the tensors of the other model."
        )

    def count_kernels(layout: _CheckpointLayout) -> int:
        rank = len(layout.kernel.value)
        stem = [prefix for prefix, _, part in layout.prefixes(_Structure((), (), (), ())) if part is _Part.STEM]
        return sum(
            len(shape) == rank and name.endswith(".weight") and not name.startswith(tuple(stem))
            for name, shape in shapes.items()
        )

    return max(matching, key=count_kernels)
