"""Verify a conversion by its round trip and by comparison with PyTorch."""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from levit_flax.blocks import _Block, _Downsample, _Stem
from levit_flax.modeling import LevitBase, Variables

from .conversion import _Conversion
from .errors import ConversionError
from .layouts import _LAYOUTS, _CheckpointLayout, _Part, _Permutation, _Structure
from .sources import _Source
from .timm_files import _model_arguments
from .writing import _check_transformers_size, _torch_tensors

if TYPE_CHECKING:
    import torch

_PROBES = 2
_PROBE_SEED = 0

# Float32 rounding errors through about sixty layers are a few times smaller; a wrong tensor causes far larger ones.
_PARITY_LIMIT = 1e-5
# Rounding the weights to a narrow dtype changes the logits by several multiples of its machine epsilon.
_ROUNDED_LIMIT = 32


class _Comparison(NamedTuple):
    """The difference between two arrays.

    Attributes:
        absolute: the largest absolute difference.
        relative: `absolute` divided by the largest absolute value of the reference.
        limit: the largest acceptable `relative`.
    """

    absolute: float
    relative: float
    limit: float = _PARITY_LIMIT

    @property
    def passed(self) -> bool:
        """Whether the difference is within the limit."""
        return self.relative <= self.limit


class _PyTorchComparison(NamedTuple):
    """The differences between a converted model and PyTorch.

    Attributes:
        reference: the package that ran the source's weights, with its version.
        blocks: the difference in each block's output, by the block's path in the variables.
        logits: the difference in the logits, or in the last hidden state of a model without heads.
    """

    reference: str
    blocks: dict[str, _Comparison]
    logits: _Comparison


def _compare(result: np.ndarray, reference: np.ndarray, limit: float = _PARITY_LIMIT) -> _Comparison:
    """Return the difference between two arrays, or raise ConversionError if the reference is not finite."""
    if not np.isfinite(reference).all():
        raise ConversionError(
            "The checkpoint's own outputs are not finite on random images: expected finite outputs, found NaN or"
            " infinity. Its weights are damaged, or training had diverged when it was saved."
        )
    absolute = float(np.abs(result - reference).max())
    largest = float(np.abs(reference).max())
    relative = absolute / largest if largest else float("inf" if absolute else 0)
    return _Comparison(absolute, relative, limit)


def _rounding_limit(dtype: Any) -> float:
    """Return the limit for weights of a dtype: float32's, or a larger one for narrower dtypes."""
    return max(_PARITY_LIMIT, _ROUNDED_LIMIT * float(jnp.finfo(dtype).eps))


def _probes(model: LevitBase) -> np.ndarray:
    """Return seeded random images [B H W C] in float32 for a model."""
    shape = (_PROBES, *model.config.image_height_width, model.config.num_channels)
    return np.random.default_rng(_PROBE_SEED).standard_normal(shape, np.float32)


def _forward(model: LevitBase, variables: Variables, pixel_values: np.ndarray) -> np.ndarray:
    """Return the first output of a model for float32 pixels [B H W C], computed at full precision."""
    return np.asarray(_apply_by_block(model, variables, pixel_values)[0][0])


def _apply_by_block(model: LevitBase, variables: Variables, pixel_values: np.ndarray) -> tuple[Any, Any]:
    """Return a model's outputs and the intermediates after its blocks, computed in float32 at full precision."""
    model = model.clone(precision="highest", dtype=jnp.float32)
    outputs, state = _apply_jitted(model, _in_float32(variables), pixel_values)
    return outputs, state


@functools.partial(jax.jit, static_argnums=0)
def _apply_jitted(model: LevitBase, variables: Variables, pixel_values: jax.Array) -> tuple[Any, Any]:
    return model.apply(
        variables,
        pixel_values,
        return_dict=False,
        capture_intermediates=lambda module, _: isinstance(module, _Stem | _Block | _Downsample),
        mutable=["intermediates"],
    )


def _in_float32(variables: Variables) -> Variables:
    """Cast float64 leaves to float32, which JAX would otherwise do with a warning."""
    converted: Variables = jax.tree.map(
        lambda leaf: leaf.astype(np.float32) if leaf.dtype == np.float64 else leaf, variables
    )
    return converted


def _forward_by_block(
    model: LevitBase, variables: Variables, pixel_values: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return every block's output [B N C] by its path ("stage_0/block_0"), and the model's first output."""
    outputs, state = _apply_by_block(model, variables, pixel_values)
    blocks: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree.leaves_with_path(state["intermediates"]):
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        blocks.setdefault("/".join(keys[:-1]), np.asarray(leaf))  # the tokens come first, then the attention
    return blocks, np.asarray(outputs[0])


def _find_differing_bytes(source: _Source, conversion: _Conversion) -> list[str]:
    """Convert back to the source's layout, and return the names of tensors whose bytes differ from the source's.

    If the conversion requested a dtype, the source's tensors are cast to it first.
    """
    differing = []
    inverse = {path: np.argsort(order) for path, order in conversion.reordered.items()}
    for row, (name, array) in zip(conversion.rows, _torch_tensors(conversion.rows, conversion.variables), strict=True):
        original = np.asarray(source.tensors[name])
        if row.flax.endswith("/count"):
            original = original.astype(np.int64)
        elif conversion.dtype is not None:
            original = original.astype(conversion.dtype)
        if row.flax in inverse:
            array = array[:, inverse[row.flax]]
        if not _same_bytes(array, original):
            differing.append(name)
    return differing


def _same_bytes(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two arrays have the same dtype, shape and bytes; equal bytes count as equal even if NaN."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    one, other = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (one, other))
    return np.array_equal(one, other)


class _Peer(NamedTuple):
    """A PyTorch implementation that can load a layout's checkpoints.

    Attributes:
        package: its package.
        needs: the packages that must be installed.
        build: builds the model of a conversion, with arbitrary weights.
        block: maps the prefix of a block's last layer to the name of the module that returns the block's output.
    """

    package: str
    needs: tuple[str, ...]
    build: Callable[[_Conversion], "torch.nn.Module"]
    block: Callable[[str], str]

    @property
    def missing(self) -> list[str]:
        """The required packages that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]


def _build_transformers(conversion: _Conversion) -> "torch.nn.Module":
    """Return transformers' model, or raise ConversionError if transformers does not support the image size."""
    import transformers

    _check_transformers_size(conversion.model.config)
    config = transformers.LevitConfig.from_dict(conversion.model.config.to_dict())
    model: torch.nn.Module = getattr(transformers, type(conversion.model).__name__)(config)
    return model


def _build_timm(conversion: _Conversion) -> "torch.nn.Module":
    """Return timm's model, fused if the checkpoint is, or raise ConversionError for unsupported architectures."""
    from timm.models.levit import Levit, LevitDistilled
    from timm.utils import reparameterize_model

    heads = conversion.model.head_names
    arguments = _model_arguments(conversion.model.config, heads)
    model_class = LevitDistilled if len(heads) == 2 else Levit
    model: torch.nn.Module = model_class(
        **arguments, use_conv=conversion.layout.name == "timm_conv", global_pool="avg" if heads else ""
    )
    return reparameterize_model(model) if conversion.model.folded else model


def _build_original(conversion: _Conversion) -> "torch.nn.Module":
    """Return a PyTorch model with the original repository's tensor names."""
    from .original import _OriginalLevit

    model = conversion.model
    return _OriginalLevit(model.config, model.head_names if model.config.num_labels else (), model.folded)


_TRANSFORMERS = _Peer(
    "transformers", ("torch", "transformers"), _build_transformers, lambda p: p.removesuffix(".module")
)
_TIMM = _Peer("timm", ("torch", "timm"), _build_timm, lambda prefix: prefix.rpartition(".")[0])
_ORIGINAL = _Peer("torch", ("torch",), _build_original, lambda prefix: prefix.removesuffix(".m"))
_PEERS = {
    "hf": _TRANSFORMERS,
    "timm": _TIMM,
    "timm_conv": _TIMM,
    "facebook": _ORIGINAL,
    "facebook_conv": _ORIGINAL,
}


def _block_modules(conversion: _Conversion, layout: _CheckpointLayout, peer: _Peer) -> Iterator[tuple[str, str]]:
    """Yield each block's path in the variables and the name of the PyTorch module that returns its output."""
    model, last = conversion.model, {}
    structure = _Structure.of(model.config, model.head_names, model.folded)
    for torch_prefix, flax, part in layout.prefixes(structure):
        if part is not _Part.HEAD:
            last[flax.rpartition("/")[0]] = peer.block(torch_prefix)  # keeps the last layer of each block
    yield from last.items()


def _compare_with_pytorch(source: _Source, conversion: _Conversion) -> _PyTorchComparison | str:
    """Compare the converted model with PyTorch on seeded inputs, or return the reason why that is not possible.

    PyTorch uses the source's own tensors in float32. transformers and timm run checkpoints in their own layouts. A
    plain PyTorch model with the original repository's names runs all other checkpoints. It is also used if the
    layout's library is not installed or does not support the architecture.
    """
    if _ORIGINAL.missing:
        return f"{' and '.join(_ORIGINAL.missing)} is not installed"
    peer, layout, reference = _build_reference(conversion)
    reference.load_state_dict(_reference_state(reference, layout, source, conversion))
    modules = {module: path for path, module in _block_modules(conversion, layout, peer)}
    pixel_values = _probes(conversion.model)
    expected_blocks, expected = _run_pytorch(reference, modules, pixel_values)
    blocks, result = _forward_by_block(conversion.model, conversion.variables, pixel_values)
    limit = _PARITY_LIMIT if conversion.dtype is None else _rounding_limit(conversion.dtype)
    return _PyTorchComparison(
        reference=f"{peer.package} {version(peer.package)}",
        blocks={path: _compare(blocks[path], expected_blocks[path], limit) for path in modules.values()},
        logits=_compare(result, expected, limit),
    )


def _build_reference(conversion: _Conversion) -> tuple[_Peer, _CheckpointLayout, "torch.nn.Module"]:
    """Return the peer that can build a conversion's model, its layout, and the model in evaluation mode."""
    peer, layout = _PEERS[conversion.layout.name], conversion.layout
    try:
        reference = None if peer.missing else peer.build(conversion)
    except (ConversionError, TypeError):  # transformers raises TypeError for some configs that it reads
        reference = None
    if reference is None:
        peer, layout = _ORIGINAL, _LAYOUTS["facebook"]
        reference = peer.build(conversion)
    return peer, layout, reference.float().eval()


def _run_pytorch(
    reference: "torch.nn.Module", modules: dict[str, str], pixel_values: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the outputs [B N C] of the named modules, by the paths given for them, and the model's first output."""
    import torch

    def tokens(output: torch.Tensor) -> torch.Tensor:
        return output.flatten(2).transpose(1, 2) if output.ndim == 4 else output

    blocks: dict[str, np.ndarray] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(_module: object, _inputs: object, output: torch.Tensor) -> None:
            blocks[path] = tokens(output).numpy()

        return hook

    for name, module in reference.named_modules():
        if name in modules:
            module.register_forward_hook(keep(modules[name]))
    with torch.inference_mode():
        output = reference(torch.from_numpy(pixel_values).permute(0, 3, 1, 2))
    first = output if isinstance(output, torch.Tensor) else output.to_tuple()[0]
    return blocks, tokens(first).numpy()


def _reference_state(
    reference: "torch.nn.Module", layout: _CheckpointLayout, source: _Source, conversion: _Conversion
) -> dict[str, "torch.Tensor"]:
    """Return the source's own tensors under the names that a PyTorch model of a layout expects.

    Index tables are the source's if it has tables for this layout. Otherwise the model uses its own, and biases that
    the source stores in another order are permuted.
    """
    import torch

    model = conversion.model
    state: dict[str, torch.Tensor] = reference.state_dict()
    structure = _Structure.of(model.config, model.head_names, model.folded)
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
        if row.permutation is _Permutation.OI11_TO_IO and state[names[row.flax]].ndim == 2:
            tensor = tensor.flatten(1)  # a 1x1 convolution that runs as a linear layer
        loaded[names[row.flax]] = tensor
    return loaded
