"""Every layout that LeViT is published in, against the libraries that write it, for the five variants."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("timm")

import levit_flax as lf  # noqa: E402
from configs import SMALL  # noqa: E402
from levit_flax import convert  # noqa: E402
from levit_flax.convert.layouts import _LAYOUTS  # noqa: E402
from levit_flax.convert.original import _OriginalLevit  # noqa: E402
from oracles import in_layout, pixels, state_dict, timm_model, torch_model  # noqa: E402

PROGRAMS = Path(__file__).parents[1] / "programs"

FLOAT32_LIMIT = 1e-5  # of the largest logit: rounding through some sixty layers, at full matmul precision
FLOAT64_LIMIT = 1e-10
FOLDED_LIMIT = 1e-5  # of the largest entry of a kernel that was folded in float32, by PyTorch

CLASSES = {1: "LevitForImageClassification", 2: "LevitForImageClassificationWithTeacher"}
# With two heads: with batch norms, and fused. Source: counted on each library's state dicts.
TENSORS = {
    "small": {"hf": (225, None), "timm": (225, 79), "timm_conv": (225, 79), "facebook": (232, 86)},
    "levit-128S": {"hf": (325, None), "timm": (325, 115), "timm_conv": (325, 115), "facebook": (336, 126)},
    "others": {"hf": (400, None), "timm": (400, 142), "timm_conv": (400, 142), "facebook": (414, 156)},
}
CONFIGS = {**lf.VARIANTS, "small": lf.LevitConfig(**SMALL)}
SHORT = [("levit-128S", 2), ("small", 1)]  # in the short run; in the full one all variants with one head and two
MODELS = [
    pytest.param(name, heads, marks=() if (name, heads) in SHORT else pytest.mark.slow)
    for name in CONFIGS
    for heads in (2, 1)
]
FUSED_MODELS = [
    pytest.param(name, heads, marks=() if (name, heads) == ("small", 2) else pytest.mark.slow)
    for name in CONFIGS
    for heads in (2, 1)
]


def as_tensors(arrays):
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def index_tables(model):
    return {name: b.numpy() for name, b in model.named_buffers() if name.endswith("attention_bias_idxs")}


def largest_difference(result, reference):
    return np.abs(np.asarray(result, np.float64) - reference).max() / np.abs(reference).max()


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].tobytes() == array.tobytes(), name


def count(name, layout, heads, fused):
    """Return how many tensors a state dict has."""
    number = TENSORS.get(name, TENSORS["others"])[layout][fused]
    return number - (2 if fused else 7) * (2 - heads)


def narrowed(tensors):
    return {n: a.astype(np.float32) if a.dtype == np.float64 else a for n, a in tensors.items()}


@pytest.mark.parametrize(("name", "heads"), MODELS)
def test_every_layout_round_trips_bit_for_bit(name, heads):
    """The same random tensors in every layout load in its library, give one tree, and convert back bit for bit.

    test_parity compares the computation of that tree with transformers.
    """
    config = CONFIGS[name]
    reference = torch_model(config, CLASSES[heads])
    tensors = state_dict(reference)
    image = torch.from_numpy(pixels(config)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        wanted = reference(image).logits.numpy()
    expected = None
    for layout in convert.WRITTEN_LAYOUTS:
        named = in_layout(tensors, layout, config.depths)
        if layout.startswith("timm"):
            peer = timm_model(config, heads, conv=layout == "timm_conv")
        elif layout == "facebook":
            peer = _OriginalLevit(config, ("head", "head_dist")[:heads], fused=False).double().eval()
            named |= index_tables(peer)
        if layout != "hf":
            peer.load_state_dict(as_tensors(named), strict=True)
            with torch.inference_mode():
                assert largest_difference(peer(image).numpy(), wanted) < FLOAT64_LIMIT, layout
        assert len(named) == count(name, layout, heads, fused=False)
        named = narrowed(named)
        model, variables = convert.from_torch(named)
        assert type(model).__name__ == CLASSES[heads] and model.config == config_as_inferred(config)
        flat = flatten_dict(variables, sep="/")
        expected = expected or flat
        assert_same_bits({p: np.asarray(a) for p, a in flat.items()}, {p: np.asarray(a) for p, a in expected.items()})
        assert_same_bits(convert.to_torch(model, variables, layout), named)


def config_as_inferred(config):
    """Return a published config as it is inferred from shapes: without the drop path rate."""
    return lf.LevitConfig.from_dict({**config.to_dict(), "levit_flax": {}})


@pytest.mark.parametrize(("name", "heads"), FUSED_MODELS)
def test_fused_layouts_equal_timm_and_our_folding(name, heads):
    """A model fused by timm computes the same here, and folding gives the same numbers."""
    from timm.utils import reparameterize_model

    config = CONFIGS[name]
    tensors = narrowed(state_dict(torch_model(config, CLASSES[heads])))
    model, variables = convert.from_torch(tensors)
    ours = flatten_dict(lf.fold_batch_norm(model, variables)[1], sep="/")
    trees = {}
    for layout in ("timm", "timm_conv"):
        peer = timm_model(config, heads, conv=layout == "timm_conv").float()
        peer.load_state_dict(as_tensors(in_layout(tensors, layout, config.depths)))
        peer = reparameterize_model(peer)
        fused = state_dict(peer)
        assert len(fused) == count(name, layout, heads, fused=True)
        folded, trees[layout] = convert.from_torch(fused)
        assert folded.folded and "batch_stats" not in trees[layout]
        assert_same_bits(convert.to_torch(folded, trees[layout], layout), fused)
        for path, leaf in flatten_dict(trees[layout], sep="/").items():
            assert largest_difference(leaf, np.asarray(ours[path], np.float64)) < FOLDED_LIMIT, path
    original = _OriginalLevit(config, ("head", "head_dist")[:heads], fused=True)
    fused = convert.to_torch(folded, trees["timm"], "facebook")
    original.load_state_dict(as_tensors(fused), strict=True)
    assert len(fused) == count(name, "facebook", heads, fused=True)
    assert_same_bits(
        {p: np.asarray(a) for p, a in flatten_dict(convert.from_torch(fused)[1], sep="/").items()},
        {p: np.asarray(a) for p, a in flatten_dict(trees["timm"], sep="/").items()},
    )
    pixel_values = pixels(config).astype(np.float32)
    with torch.inference_mode():
        wanted = original.double().eval()(torch.from_numpy(pixel_values).double().permute(0, 3, 1, 2)).numpy()
    exact = folded.clone(precision="highest")
    logits = jax.jit(lambda v, x: exact.apply(v, x).logits)(trees["timm"], pixel_values)
    assert largest_difference(logits, wanted) < FLOAT32_LIMIT


@pytest.mark.slow  # in the short run, test_surgery folds in float64
@pytest.mark.parametrize("name", CONFIGS)
def test_fusing_and_folding_keep_the_logits_in_float64(name):
    """Without rounding, the model fused by timm and the model folded here equal the original."""
    from timm.utils import reparameterize_model

    config = CONFIGS[name]
    reference = torch_model(config, CLASSES[2])
    tensors = state_dict(reference)
    peer = timm_model(config, heads=2)
    peer.load_state_dict(as_tensors(in_layout(tensors, "timm", config.depths)))
    pixel_values = pixels(config)
    with torch.inference_mode():
        wanted = reference(torch.from_numpy(pixel_values).permute(0, 3, 1, 2)).logits.numpy()
    torch.set_default_dtype(torch.float64)  # the dtype of timm's fused layers
    jax.config.update("jax_enable_x64", True)
    try:
        fused, fused_variables = convert.from_torch(state_dict(reparameterize_model(peer)))
        assert fused.folded and fused.param_dtype == np.float64
        apply = jax.jit(lambda v, x: fused.clone(precision="highest").apply(v, x).logits)
        assert largest_difference(apply(fused_variables, pixel_values), wanted) < FLOAT64_LIMIT
        folded, folded_variables = lf.fold_batch_norm(*convert.from_torch(tensors))
        assert folded == fused
        assert largest_difference(apply(folded_variables, pixel_values), wanted) < FLOAT64_LIMIT
    finally:
        torch.set_default_dtype(torch.float32)
        jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize("heads", [2, 1])
def test_original_convolutional_layout_is_read_and_not_written(heads):
    config = lf.LevitConfig(**SMALL)
    tensors = narrowed(state_dict(torch_model(config, CLASSES[heads])))
    expected = convert.from_torch(tensors, config=config)[1]
    named = in_layout(tensors, "facebook_conv", config.depths)
    assert named["blocks.0.m.qkv.c.weight"].ndim == 4
    model, variables = convert.from_torch(named)
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    with pytest.raises(ValueError, match=r"Unknown layout: .* found 'facebook_conv'"):
        convert.to_torch(model, variables, "facebook_conv")


@pytest.mark.parametrize("layout", _LAYOUTS)
def test_layout_is_detected_from_names_and_shapes(layout):
    config = lf.LevitConfig(**SMALL)
    tensors = narrowed(state_dict(torch_model(config, CLASSES[2])))
    from levit_flax.convert.layouts import _detect_layout

    named = in_layout(tensors, layout, config.depths)
    assert _detect_layout({name: array.shape for name, array in named.items()}, "here").name == layout


@pytest.mark.slow  # in the short run, test_pickles reads without PyTorch
def test_every_layout_is_read_without_pytorch(tmp_path):
    """Every layout in safetensors and in pickles, in a process that has no torch."""
    config = lf.LevitConfig(**SMALL)
    tensors = narrowed(state_dict(torch_model(config, CLASSES[2])))
    model, variables = convert.from_torch(tensors)
    folded = lf.fold_batch_norm(model, variables)
    for layout in convert.WRITTEN_LAYOUTS:
        for suffix in ("safetensors", "pth", "bin"):
            convert.save_torch(tmp_path / f"{layout}.{suffix}", model, variables, layout)
            if layout != "hf":
                convert.save_torch(tmp_path / f"{layout}-fused.{suffix}", *folded, layout)
    files = sorted(map(str, tmp_path.iterdir()))
    assert len(files) == 3 * 7
    program = PROGRAMS / "read_without_torch.py"
    done = subprocess.run([sys.executable, program, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == ["fused" in file for file in files]


def test_written_pickles_load_in_each_library(tmp_path):
    config = lf.LevitConfig(**SMALL)
    tensors = narrowed(state_dict(torch_model(config, CLASSES[2])))
    model, variables = convert.from_torch(tensors, config=config)
    convert.save_torch(tmp_path / "levit.pth", model, variables, "facebook")
    checkpoint = torch.load(tmp_path / "levit.pth", weights_only=True)
    _OriginalLevit(config, model.head_names, fused=False).load_state_dict(checkpoint["model"], strict=True)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if leaf.dtype == np.float32 else leaf, variables)
    convert.save_torch(tmp_path / "levit.bin", model, narrow, "timm")
    loaded = torch.load(tmp_path / "levit.bin", weights_only=True)
    assert loaded["stem.conv1.linear.weight"].dtype == torch.bfloat16
    timm_model(config, 2).load_state_dict(loaded, strict=True)
