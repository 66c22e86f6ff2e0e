"""Every layout that LeViT is published in, against the libraries that write it, for the five variants."""

import subprocess
import sys

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
from levit_flax.convert.layouts import LAYOUTS  # noqa: E402
from levit_flax.convert.original import OriginalLevit  # noqa: E402
from oracles import in_layout, pixels, state_dict, timm_model, torch_model  # noqa: E402

FLOAT32_LIMIT = 1e-5  # of the largest logit: rounding through some sixty layers, at full matmul precision
FLOAT64_LIMIT = 1e-10
FOLDED_LIMIT = 1e-5  # of the largest entry of a kernel that was folded in float32, by PyTorch

CLASSES = {1: "LevitForImageClassification", 2: "LevitForImageClassificationWithTeacher"}
TENSORS = {  # with two heads: with batch norms, and fused. Source: counted on each library's state dicts.
    "hf": ((325, 400), None),
    "timm": ((325, 400), (115, 142)),
    "timm_conv": ((325, 400), (115, 142)),
    "facebook": ((336, 414), (126, 156)),
}
# All of them in the full run; in the short one the smallest with one head and two, and the largest with two.
MODELS = [
    pytest.param(
        name, heads, marks=() if name == "levit-128S" or (name, heads) == ("levit-384", 2) else pytest.mark.slow
    )
    for name in lf.VARIANTS
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


def narrowed(tensors):
    return {n: a.astype(np.float32) if a.dtype == np.float64 else a for n, a in tensors.items()}


@pytest.mark.parametrize(("name", "heads"), MODELS)
def test_every_layout_of_a_variant(name, heads):
    """The same random tensors in every layout: accepted by its library, equal in the tree, and out again bit for bit.

    That the tree computes what transformers computes is tested in test_parity.
    """
    config = lf.VARIANTS[name]
    reference = torch_model(config, CLASSES[heads])
    tensors = state_dict(reference)
    image = torch.from_numpy(pixels(config)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        wanted = reference(image).logits.numpy()
    expected = None
    for layout, ((few, many), _) in TENSORS.items():
        named = in_layout(tensors, layout, config.depths)
        if layout.startswith("timm"):
            peer = timm_model(config, heads, conv=layout == "timm_conv")
        elif layout == "facebook":
            peer = OriginalLevit(config, ("head", "head_dist")[:heads], fused=False).double().eval()
            named |= index_tables(peer)
        if layout != "hf":
            peer.load_state_dict(as_tensors(named), strict=True)
            with torch.inference_mode():
                assert largest_difference(peer(image).numpy(), wanted) < FLOAT64_LIMIT, layout
        assert len(named) == (few if name == "levit-128S" else many) - 7 * (2 - heads)
        named = narrowed(named)
        model, variables = convert.from_torch(named)
        assert type(model).__name__ == CLASSES[heads] and model.config == config_as_inferred(config)
        flat = flatten_dict(variables, sep="/")
        expected = expected or flat
        assert_same_bits({p: np.asarray(a) for p, a in flat.items()}, {p: np.asarray(a) for p, a in expected.items()})
        assert_same_bits(convert.to_torch(model, variables, layout), named)


def config_as_inferred(config):
    """Return what shapes tell of a published config, all but the rate of stochastic depth."""
    return lf.LevitConfig.from_dict({**config.to_dict(), "levit_flax": {}})


@pytest.mark.parametrize(("name", "heads"), MODELS)
def test_every_fused_layout_of_a_variant(name, heads):
    """What timm's own function fuses computes the same here, and our folding comes to the same numbers."""
    from timm.utils import reparameterize_model

    config = lf.VARIANTS[name]
    tensors = narrowed(state_dict(torch_model(config, CLASSES[heads])))
    model, variables = convert.from_torch(tensors)
    ours = flatten_dict(lf.fold_batch_norm(model, variables)[1], sep="/")
    trees = {}
    for layout in ("timm", "timm_conv"):
        peer = timm_model(config, heads, conv=layout == "timm_conv").float()
        peer.load_state_dict(as_tensors(in_layout(tensors, layout, config.depths)))
        peer = reparameterize_model(peer)
        fused = state_dict(peer)
        assert len(fused) == TENSORS[layout][1][name != "levit-128S"] - 2 * (2 - heads)
        folded, trees[layout] = convert.from_torch(fused)
        assert folded.folded and "batch_stats" not in trees[layout]
        assert_same_bits(convert.to_torch(folded, trees[layout], layout), fused)
        for path, leaf in flatten_dict(trees[layout], sep="/").items():
            assert largest_difference(leaf, np.asarray(ours[path], np.float64)) < FOLDED_LIMIT, path
    original = OriginalLevit(config, ("head", "head_dist")[:heads], fused=True)
    fused = convert.to_torch(folded, trees["timm"], "facebook")
    original.load_state_dict(as_tensors(fused), strict=True)
    assert len(fused) == TENSORS["facebook"][1][name != "levit-128S"] - 2 * (2 - heads)
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


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "levit-128S" else pytest.mark.slow) for name in lf.VARIANTS]
)
def test_fused_and_folded_variants_in_float64(name):
    """The algebra alone: what timm fuses and what is folded here, against the model before."""
    from timm.utils import reparameterize_model

    config = lf.VARIANTS[name]
    reference = torch_model(config, CLASSES[2])
    tensors = state_dict(reference)
    peer = timm_model(config, heads=2)
    peer.load_state_dict(as_tensors(in_layout(tensors, "timm", config.depths)))
    pixel_values = pixels(config)
    with torch.inference_mode():
        wanted = reference(torch.from_numpy(pixel_values).permute(0, 3, 1, 2)).logits.numpy()
    torch.set_default_dtype(torch.float64)  # in which timm makes the fused layers
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
def test_the_original_s_convolutional_flavour_is_read_and_not_written(heads):
    config = lf.LevitConfig(**SMALL)
    tensors = narrowed(state_dict(torch_model(config, CLASSES[heads])))
    expected = convert.from_torch(tensors, config=config)[1]
    named = in_layout(tensors, "facebook_conv", config.depths)
    assert named["blocks.0.m.qkv.c.weight"].ndim == 4
    model, variables = convert.from_torch(named)
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    with pytest.raises(ValueError, match=r"Unknown layout: .* found 'facebook_conv'"):
        convert.to_torch(model, variables, "facebook_conv")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_told_apart_by_names_and_shapes(layout):
    config = lf.LevitConfig(**SMALL)
    tensors = narrowed(state_dict(torch_model(config, CLASSES[2])))
    from levit_flax.convert.layouts import detect_layout

    named = in_layout(tensors, layout, config.depths)
    assert detect_layout({name: array.shape for name, array in named.items()}, "here").name == layout


def test_no_layout_needs_pytorch_to_be_read(tmp_path):
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
    script = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from levit_flax import convert\n"
        f"for file in {files!r}:\n"
        "    model, variables = convert.from_torch(file)\n"
        "    assert model.folded == ('fused' in file)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_pickles_are_what_each_library_loads(tmp_path):
    config = lf.LevitConfig(**SMALL)
    tensors = narrowed(state_dict(torch_model(config, CLASSES[2])))
    model, variables = convert.from_torch(tensors, config=config)
    convert.save_torch(tmp_path / "levit.pth", model, variables, "facebook")
    checkpoint = torch.load(tmp_path / "levit.pth", weights_only=True)
    OriginalLevit(config, model.head_names, fused=False).load_state_dict(checkpoint["model"], strict=True)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if leaf.dtype == np.float32 else leaf, variables)
    convert.save_torch(tmp_path / "levit.bin", model, narrow, "timm")
    loaded = torch.load(tmp_path / "levit.bin", weights_only=True)
    assert loaded["stem.conv1.linear.weight"].dtype == torch.bfloat16
    timm_model(config, 2).load_state_dict(loaded, strict=True)
