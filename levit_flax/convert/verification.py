"""Proof of a conversion: the way back to the source's bytes, and the same inputs through PyTorch."""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from levit_flax.blocks import Block, Downsample, Stem
from levit_flax.modeling import LevitBase, Variables

from .conversion import Conversion, check_transformers_size, torch_tensors
from .errors import ConversionError
from .layouts import LAYOUTS, CheckpointLayout, Part, Permutation, Structure
from .sources import Source
from .timm_files import model_arguments

if TYPE_CHECKING:
    import torch

PROBES = 2
PROBE_SEED = 0

# Float32 rounding through some sixty layers stays a few times below this; a wrong tensor is far above it.
PARITY_LIMIT = 1e-5
# Weights that were rounded to a narrow type move the logits by some multiples of its precision.
ROUNDED_LIMIT = 32


class Comparison(NamedTuple):
    """How far two results are apart.

    Attributes:
        absolute: the largest difference of two values.
        relative: the same as a share of the largest value.
        limit: what `relative` may be.
    """

    absolute: float
    relative: float
    limit: float = PARITY_LIMIT

    @property
    def passed(self) -> bool:
        """Whether the results agree within the limit."""
        return self.relative <= self.limit


class PyTorchComparison(NamedTuple):
    """How far the converted model is from PyTorch's.

    Attributes:
        reference: what ran in PyTorch, with its version.
        blocks: the difference behind every block, by its path in the variables.
        logits: the difference of the logits; of the last hidden state, for a model without heads.
    """

    reference: str
    blocks: dict[str, Comparison]
    logits: Comparison


def compare(result: np.ndarray, reference: np.ndarray, limit: float = PARITY_LIMIT) -> Comparison:
    """Return the largest difference between two arrays.

    Raises:
        ConversionError: the reference is not finite, so that nothing can be told.
    """
    if not np.isfinite(reference).all():
        raise ConversionError(
            "The checkpoint's own results are not finite on images of noise: its weights are damaged, or training had"
            " diverged when it was saved."
        )
    absolute = float(np.abs(result - reference).max())
    largest = float(np.abs(reference).max())
    relative = absolute / largest if largest else float("inf" if absolute else 0)
    return Comparison(absolute, relative, limit)


def rounding_limit(dtype: Any) -> float:
    """Return the limit for weights of a type: that of float32, or more for narrower ones."""
    return max(PARITY_LIMIT, ROUNDED_LIMIT * float(jnp.finfo(dtype).eps))


def probes(model: LevitBase) -> np.ndarray:
    """Return seeded float32 images [B H W C] for a model."""
    shape = (PROBES, *model.config.image_height_width, model.config.num_channels)
    return np.random.default_rng(PROBE_SEED).standard_normal(shape, np.float32)


def forward(model: LevitBase, variables: Variables, pixel_values: np.ndarray) -> np.ndarray:
    """Return the first output of a model for float32 pixels [B H W C], at full precision."""
    return np.asarray(apply_by_block(model, variables, pixel_values)[0][0])


def apply_by_block(model: LevitBase, variables: Variables, pixel_values: np.ndarray) -> tuple[Any, Any]:
    """Return the outputs of a model and the intermediate results behind its blocks, in float32 at full precision."""
    model = model.clone(precision="highest", dtype=jnp.float32)
    return _apply_by_block(model, in_float32(variables), pixel_values)


@functools.partial(jax.jit, static_argnums=0)
def _apply_by_block(model: LevitBase, variables: Variables, pixel_values: jax.Array) -> tuple[Any, Any]:
    return model.apply(
        variables,
        pixel_values,
        return_dict=False,
        capture_intermediates=lambda module, _: isinstance(module, Stem | Block | Downsample),
        mutable=["intermediates"],
    )


def in_float32(variables: Variables) -> Variables:
    """Return the variables with float64, which JAX might cut with a warning, in float32."""
    return jax.tree.map(lambda leaf: leaf.astype(np.float32) if leaf.dtype == np.float64 else leaf, variables)


def forward_by_block(
    model: LevitBase, variables: Variables, pixel_values: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return what leaves every block [B N C], by its path ("stage_0/block_0"), and the first output."""
    outputs, state = apply_by_block(model, variables, pixel_values)
    blocks: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree.leaves_with_path(state["intermediates"]):
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        blocks.setdefault("/".join(keys[:-1]), np.asarray(leaf))  # of a block's tokens and attention, the tokens
    return blocks, np.asarray(outputs[0])


def find_differing_bytes(source: Source, conversion: Conversion) -> list[str]:
    """Turn a conversion back into the source's layout, and return the tensors that are not what the source holds.

    Args:
        source: the opened checkpoint.
        conversion: what became of it. Where it was turned into another type, the source's tensors are too.
    """
    differing = []
    inverse = {path: np.argsort(order) for path, order in conversion.reordered.items()}
    for row, (name, array) in zip(conversion.rows, torch_tensors(conversion.rows, conversion.variables), strict=True):
        original = np.asarray(source.tensors[name])
        if row.flax.endswith("/count"):
            original = original.astype(np.int64)
        elif conversion.dtype is not None:
            original = original.astype(conversion.dtype)
        if row.flax in inverse:
            array = array[:, inverse[row.flax]]
        if not same_bytes(array, original):
            differing.append(name)
    return differing


def same_bytes(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two arrays have the same type, shape and bytes, whatever numbers these make."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    one, other = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (one, other))
    return np.array_equal(one, other)


class Peer(NamedTuple):
    """A PyTorch implementation that runs a layout's checkpoints.

    Attributes:
        package: what it is called.
        needs: the packages that must be there.
        build: makes the model, for a conversion, with any weights.
        block: turns the prefix of a block's last layer into the name of the module that the block's result leaves.
    """

    package: str
    needs: tuple[str, ...]
    build: Callable[[Conversion], "torch.nn.Module"]
    block: Callable[[str], str]

    @property
    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


def build_transformers(conversion: Conversion) -> "torch.nn.Module":
    """Return transformers' model of the converted architecture.

    Raises:
        ConversionError: its model does not fit the image size.
    """
    import transformers

    check_transformers_size(conversion.model.config)
    config = transformers.LevitConfig.from_dict(conversion.model.config.to_dict())
    model: torch.nn.Module = getattr(transformers, type(conversion.model).__name__)(config)
    return model


def build_timm(conversion: Conversion) -> "torch.nn.Module":
    """Return timm's model of the converted architecture, fused where the checkpoint is.

    Raises:
        ConversionError: timm cannot build it.
    """
    from timm.models.levit import Levit, LevitDistilled
    from timm.utils import reparameterize_model

    heads = conversion.model.head_names
    arguments = model_arguments(conversion.model.config, heads)
    model_class = LevitDistilled if len(heads) == 2 else Levit
    model: torch.nn.Module = model_class(
        **arguments, use_conv=conversion.layout.name == "timm_conv", global_pool="avg" if heads else ""
    )
    return reparameterize_model(model) if conversion.model.folded else model


def build_original(conversion: Conversion) -> "torch.nn.Module":
    """Return a model with the original repository's names."""
    from .original import OriginalLevit

    model = conversion.model
    return OriginalLevit(model.config, model.head_names if model.config.num_labels else (), model.folded)


TRANSFORMERS = Peer("transformers", ("torch", "transformers"), build_transformers, lambda p: p.removesuffix(".module"))
TIMM = Peer("timm", ("torch", "timm"), build_timm, lambda prefix: prefix.rpartition(".")[0])
ORIGINAL = Peer("torch", ("torch",), build_original, lambda prefix: prefix.removesuffix(".m"))
PEERS = {
    "hf": TRANSFORMERS,
    "timm": TIMM,
    "timm_conv": TIMM,
    "facebook": ORIGINAL,
    "facebook_conv": ORIGINAL,
}


def block_modules(conversion: Conversion, layout: CheckpointLayout, peer: Peer) -> Iterator[tuple[str, str]]:
    """Yield each block's path in the variables and the name of the PyTorch module that its result leaves."""
    model, last = conversion.model, {}
    structure = Structure.of(model.config, model.head_names, model.folded)
    for torch_prefix, flax, part in layout.prefixes(structure):
        if part is not Part.HEAD:
            last[flax.rpartition("/")[0]] = peer.block(torch_prefix)  # the last layer of a block wins
    yield from last.items()


def compare_with_pytorch(source: Source, conversion: Conversion) -> PyTorchComparison | str:
    """Run seeded inputs through PyTorch with the source's own tensors, and through the converted model.

    transformers and timm run their own layouts. The original repository's is run by a plain PyTorch model with its
    names, and so is any other that its own library is not there for or cannot build.

    Args:
        source: the opened checkpoint.
        conversion: what became of it.

    Returns:
        The differences in float32, or why there was nothing to compare with.
    """
    if ORIGINAL.missing:
        return f"{' and '.join(ORIGINAL.missing)} is not installed"
    import torch

    peer, layout = PEERS[conversion.layout.name], conversion.layout
    try:
        reference = None if peer.missing else peer.build(conversion)
    except (ConversionError, TypeError):  # TypeError: transformers cannot build every config that it reads
        reference = None
    if reference is None:
        peer, layout = ORIGINAL, LAYOUTS["facebook"]
        reference = peer.build(conversion)
    reference = reference.float().eval()
    reference.load_state_dict(reference_state(reference, layout, source, conversion))
    paths = {module: path for path, module in block_modules(conversion, layout, peer)}
    outputs: dict[str, np.ndarray] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(_module: object, _inputs: object, output: "torch.Tensor") -> None:
            tokens = output.flatten(2).transpose(1, 2) if output.ndim == 4 else output
            outputs[path] = tokens.numpy()

        return hook

    for name, module in reference.named_modules():
        if name in paths:
            module.register_forward_hook(keep(paths[name]))
    pixel_values = probes(conversion.model)
    with torch.inference_mode():
        wanted = reference(torch.from_numpy(pixel_values).permute(0, 3, 1, 2))
        if not isinstance(wanted, torch.Tensor):
            wanted = wanted.to_tuple()[0]
        if wanted.ndim == 4:
            wanted = wanted.flatten(2).transpose(1, 2)
    limit = PARITY_LIMIT if conversion.dtype is None else rounding_limit(conversion.dtype)
    blocks, result = forward_by_block(conversion.model, conversion.variables, pixel_values)
    return PyTorchComparison(
        reference=f"{peer.package} {version(peer.package)}",
        blocks={path: compare(blocks[path], outputs[path], limit) for path in paths.values()},
        logits=compare(result, wanted.numpy(), limit),
    )


def reference_state(
    reference: "torch.nn.Module", layout: CheckpointLayout, source: Source, conversion: Conversion
) -> dict[str, "torch.Tensor"]:
    """Return the source's own tensors under the names that a PyTorch model of a layout gives them.

    Index tables come from the source where it has those of this layout. Where the model numbers the distances itself,
    biases that the source stores in another order are brought into its own.
    """
    import torch

    model = conversion.model
    state: dict[str, torch.Tensor] = reference.state_dict()
    structure = Structure.of(model.config, model.head_names, model.folded)
    names = {row.flax: row.torch for row in layout.rows(structure)}
    tables = {path: name for name, path in layout.tables(structure).items() if name in state}
    stored = {path: name for path, name in tables.items() if name in source.shapes}
    loaded = {name: state[name] for path, name in tables.items() if path not in stored}
    for name in stored.values():
        loaded[name] = torch.from_numpy(np.array(source.tensors[name]))
    for row in conversion.rows:
        array = source.tensors[row.torch]
        if row.flax in conversion.reordered and row.flax not in stored:
            array = array[:, conversion.reordered[row.flax]]
        tensor = torch.from_numpy(np.array(array, np.float32 if array.dtype.kind in "fV" else array.dtype))
        if row.permutation is Permutation.OI11_TO_IO and state[names[row.flax]].ndim == 2:
            tensor = tensor.flatten(1)  # a 1x1 convolution, computed with a linear layer
        loaded[names[row.flax]] = tensor
    return loaded
