"""The models against transformers, on random weights, statistics and biases.

Tolerances are relative to the largest entry of the reference. A wrong layer differs by far more.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import levit_flax as lf  # noqa: E402
from configs import TINY, UNUSUAL, compiled, unusual_config  # noqa: E402
from levit_flax import convert  # noqa: E402
from levit_flax.convert.layouts import _LAYOUTS, _Permutation, _Row, _Structure  # noqa: E402
from oracles import pixels, state_dict, torch_model  # noqa: E402

FLOAT32_LIMIT = 1e-5  # rounding through some sixty layers, at full matmul precision
FLOAT64_LIMIT = 1e-10  # only the algebra can differ
GRADIENT_FLOOR = 1e-12  # for gradients that are zero except for rounding: biases that the next batch norm subtracts
STATISTICS_LIMIT = 1e-10  # float64, after three passes

CLASSES = ("LevitModel", "LevitForImageClassification", "LevitForImageClassificationWithTeacher")
TWO_HEADS = CLASSES[2]
# Of the unusual configs, in the short run.
SHORT = ("one token at the end", "four stages", "stage without MLP", "other downsampling")


@contextlib.contextmanager
def double_precision():
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


def difference(result, reference):
    return np.abs(np.asarray(result, np.float64) - reference).max() / np.abs(reference).max()


def converted(reference, config, dtype):
    model, variables = convert.from_torch(state_dict(reference), dtype, config=config)
    return model.clone(precision="highest"), variables


def check_forward(config, class_name, dtype, limit):
    reference = torch_model(config, class_name)
    pixel_values = pixels(config)
    with torch.inference_mode():
        wanted = reference(torch.from_numpy(pixel_values).permute(0, 3, 1, 2), output_hidden_states=True)
    model, variables = converted(reference, config, dtype)
    assert type(model).__name__ == class_name
    out = compiled(model, output_hidden_states=True)(variables, jnp.asarray(pixel_values, dtype))
    for name, tensor in wanted.items():
        if name == "hidden_states":
            assert len(out.hidden_states) == len(tensor)
            for i, (state, expected) in enumerate(zip(out.hidden_states, tensor, strict=True)):
                assert difference(state, expected.numpy()) < limit, f"hidden state {i}"
        else:
            assert difference(getattr(out, name), tensor.numpy()) < limit, name


@pytest.fixture
def _normal_optimizations():
    """Compile as users do: `make test` disables most of XLA's optimizations, which must not hide a wrong result."""
    disabled = jax.config.values["jax_disable_most_optimizations"]
    compiled.cache_clear()  # otherwise a program compiled without optimizations could be reused
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", disabled)
        compiled.cache_clear()


def config_of(name):
    if name == "tiny":
        return lf.LevitConfig(**{**TINY, "image_size": 32})  # transformers takes square images only
    return lf.VARIANTS[name] if name in lf.VARIANTS else unusual_config(name)


def slow_except(names, *kept):
    return [pytest.param(name, marks=() if name in kept else pytest.mark.slow) for name in names]


@pytest.mark.usefixtures("_normal_optimizations")
@pytest.mark.parametrize("name", slow_except(lf.VARIANTS, "levit-128S"))
def test_variants_match_transformers_in_float32(name):
    check_forward(lf.VARIANTS[name], TWO_HEADS, jnp.float32, FLOAT32_LIMIT)


@pytest.mark.slow
@pytest.mark.parametrize("name", lf.VARIANTS)
def test_variants_match_transformers_in_float64(name):
    with double_precision():
        check_forward(lf.VARIANTS[name], TWO_HEADS, jnp.float64, FLOAT64_LIMIT)


@pytest.mark.parametrize("name", slow_except(UNUSUAL, *SHORT))
def test_unusual_configs_match_transformers_in_float64(name):
    with double_precision():
        check_forward(unusual_config(name), TWO_HEADS, jnp.float64, FLOAT64_LIMIT)


@pytest.mark.parametrize("name", slow_except(UNUSUAL, "small"))
def test_unusual_configs_match_transformers_in_float32(name):
    check_forward(unusual_config(name), TWO_HEADS, jnp.float32, FLOAT32_LIMIT)


@pytest.mark.slow
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_configs_with_several_blocks_match_transformers(name):
    check_forward(unusual_config(name, deep=True), TWO_HEADS, jnp.float32, FLOAT32_LIMIT)
    with double_precision():
        check_forward(unusual_config(name, deep=True), TWO_HEADS, jnp.float64, FLOAT64_LIMIT)


@pytest.mark.parametrize("class_name", slow_except(CLASSES[:2], CLASSES[0]))
def test_models_with_fewer_heads_match_transformers(class_name):
    check_forward(unusual_config("odd grids"), class_name, jnp.float32, FLOAT32_LIMIT)


@pytest.mark.slow  # in the short run, test_step compares five steps in float64
@pytest.mark.parametrize(
    ("name", "train"),
    [
        pytest.param("odd grids", True, id="odd grids-training"),
        pytest.param("other downsampling", False, id="other downsampling-evaluation"),
        pytest.param("odd grids", False, id="odd grids-evaluation"),
        pytest.param("other downsampling", True, id="other downsampling-training"),
    ],
)
def test_gradients_match_transformers_in_float64(name, train):
    config = unusual_config(name, deep=True)
    reference = torch_model(config, TWO_HEADS).train(train)
    pixel_values = pixels(config, batch=4)
    weights = np.random.default_rng(1).standard_normal((4, config.num_labels))
    with double_precision():
        model, variables = converted(reference, config, jnp.float64)

        @jax.jit
        @jax.grad
        def gradient(params):
            out = model.apply(
                {**variables, "params": params}, jnp.asarray(pixel_values), train=train, mutable=["batch_stats"]
            )[0]
            return (out.logits * weights).sum()

        found = flatten_dict(gradient(variables["params"]), sep="/")
    out = reference(torch.from_numpy(pixel_values).permute(0, 3, 1, 2))
    ((out.cls_logits + out.distillation_logits) / 2 * torch.from_numpy(weights)).sum().backward()
    parameters = dict(reference.named_parameters())
    rows = _LAYOUTS["hf"].rows(_Structure.of(config, model.head_names))
    compared = [row for row in rows if row.flax.startswith("params/")]
    assert len(compared) == len(parameters)
    for row in compared:
        wanted = row.permutation.to_flax(parameters[row.torch].grad.numpy())
        limit = FLOAT64_LIMIT * np.abs(wanted).max() + GRADIENT_FLOOR
        assert np.abs(np.asarray(found[row.flax.removeprefix("params/")]) - wanted).max() <= limit, row.flax


@pytest.mark.slow  # like the gradients
def test_running_statistics_match_transformers_after_three_passes():
    config = unusual_config("odd grids", deep=True)
    reference = torch_model(config, TWO_HEADS).train()
    with double_precision():
        model, variables = converted(reference, config, jnp.float64)
        step = compiled(model, train=True, mutable=("batch_stats",))
        for seed in range(3):
            pixel_values = pixels(config, batch=3, seed=seed)
            reference(torch.from_numpy(pixel_values).permute(0, 3, 1, 2))
            variables = {**variables, **step(variables, jnp.asarray(pixel_values))[1]}
        exported = convert.to_torch(model, variables)
    for name, wanted in state_dict(reference).items():
        if name.endswith("num_batches_tracked"):
            assert exported[name] == wanted
        elif "running" in name:
            assert difference(exported[name], wanted) < STATISTICS_LIMIT, name


@pytest.mark.usefixtures("_normal_optimizations")
@pytest.mark.parametrize("name", slow_except(("tiny", "levit-128S"), "tiny"))
def test_gradients_match_transformers_in_float32(name):
    config = config_of(name)
    reference = torch_model(config, TWO_HEADS).float()
    pixel_values = pixels(config).astype(np.float32)
    model, variables = converted(reference, config, jnp.float32)
    gradient = jax.jit(jax.grad(lambda p: model.apply({**variables, "params": p}, pixel_values).logits.mean()))
    found = flatten_dict(gradient(variables["params"]), sep="/")
    reference(torch.from_numpy(pixel_values).permute(0, 3, 1, 2)).logits.mean().backward()
    parameters = dict(reference.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in parameters.values())
    for row in _LAYOUTS["hf"].rows(_Structure.of(config, model.head_names)):
        if row.flax.startswith("params/"):
            wanted = row.permutation.to_flax(parameters[row.torch].grad.numpy())
            assert (
                np.abs(np.asarray(found[row.flax.removeprefix("params/")]) - wanted).max() < FLOAT32_LIMIT * largest
            ), row.flax


SWAPPED = {"mean": "var", "var": "mean"}


def forget_to_transpose(row):
    square = row.flax == "params/stage_0/block_0/attention/proj/linear/kernel"
    return row._replace(permutation=_Permutation.SAME) if square else row


def swap_mean_and_variance(row):
    place, _, leaf = row.flax.rpartition("/")
    return row._replace(flax=f"{place}/{SWAPPED.get(leaf, leaf)}")


@pytest.mark.parametrize("mistake", [forget_to_transpose, swap_mean_and_variance])
def test_parity_catches_mistakes_in_the_table(mistake, monkeypatch):
    config = unusual_config("small")
    rows = type(_LAYOUTS["hf"]).rows

    def wrong_rows(self, structure):
        changed = [mistake(row) for row in rows(self, structure)]
        assert changed != list(rows(self, structure))
        return iter(changed)

    check_forward(config, TWO_HEADS, jnp.float32, FLOAT32_LIMIT)
    monkeypatch.setattr(type(_LAYOUTS["hf"]), "rows", wrong_rows)
    # A negative mean in the place of a variance raises a ConversionError.
    with pytest.raises((AssertionError, convert.ConversionError)):
        check_forward(config, TWO_HEADS, jnp.float32, FLOAT32_LIMIT)


def test_layout_row_names_both_tensors_and_the_permutation():
    rows = list(_LAYOUTS["hf"].rows(_Structure.of(lf.VARIANTS["levit-128S"], ("head", "head_dist"))))
    assert rows[0] == _Row(
        "levit.patch_embeddings.embedding_layer_1.convolution.weight",
        "params/stem/conv_0/conv/kernel",
        _Permutation.OIHW_TO_HWIO,
    )
