import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import levit_flax as lf
from configs import SMALL, TINY, random_variables
from levit_flax import inference, inference_options
from levit_flax.inference_options import _ALL_OPTIONS, _FASTEST_ON_X86, _PLAIN, _choose_options, _Options

LIMIT = 1e-5  # float32, of the largest logit: the contract for logits


def model_and_variables(config=TINY, **fields):
    model = lf.LevitForImageClassificationWithTeacher(lf.LevitConfig(**config), **fields)
    return model, random_variables(model)


def pixel_values(model, batch, seed=0):
    shape = (batch, *model.config.image_height_width, model.config.num_channels)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_same_logits(found, model, variables, pixels, limit=LIMIT):
    precise = model.clone(precision="highest", dtype=jnp.float32)
    expected = np.asarray(jax.jit(lambda pixels: precise.apply(variables, pixels).logits)(pixels))
    assert np.abs(np.asarray(found) - expected).max() < limit * np.abs(expected).max()


@pytest.fixture
def choose(monkeypatch):
    def choose(options):
        monkeypatch.setattr(inference, "_choose_options", lambda *_: options)

    return choose


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("name", _ALL_OPTIONS)
def test_all_options_compute_the_same_logits(name, batch, choose):
    choose(_ALL_OPTIONS[name])
    model, variables = model_and_variables(SMALL)
    pixels = pixel_values(model, batch)
    assert_same_logits(lf.make_inference_fn(model, variables)(pixels), model, variables, pixels)


def test_options_change_the_program(choose):
    model, variables = model_and_variables()
    pixels = jax.ShapeDtypeStruct(pixel_values(model, 1).shape, jnp.float32)
    programs = set()
    for options in _ALL_OPTIONS.values():
        function = inference._InferenceFunction(model, variables, None, None, jax.devices()[:1], False)
        program = inference_options._compile(function._apply, function.variables, pixels, options)
        programs.add(getattr(program, "func", program).as_text())
    assert len(programs) == len(_ALL_OPTIONS)


@pytest.mark.parametrize(
    "options",
    [
        _Options(constants=True, compiler_options={"xla_option_that_no_version_has": True}),
        _Options(constants=True, compiler_options={"xla_cpu_experimental_ynn_fusion_type": "NO_SUCH_FUSION"}),
    ],
)
def test_unknown_options_fall_back_to_plain_compilation(options, choose):
    choose(options)
    model, variables = model_and_variables()
    pixels = pixel_values(model, 2)
    predict = lf.make_inference_fn(model, variables)
    assert_same_logits(predict(pixels), model, variables, pixels)


def test_missing_experimental_module_falls_back_to_plain_compilation(choose, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax.experimental.xla_metadata", None)
    choose(_ALL_OPTIONS["prepared"])
    model, variables = model_and_variables()
    pixels = pixel_values(model, 2)
    assert_same_logits(lf.make_inference_fn(model, variables)(pixels), model, variables, pixels)


def test_compilation_errors_other_than_unknown_options_are_raised(monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(inference_options, "_compile_with", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Out of memory"):
        inference_options._compile(None, {}, None, _PLAIN)


class FakeDevice:
    def __init__(self, platform):
        self.platform = platform


@pytest.fixture
def processor(monkeypatch):
    """Pretend to run on a processor with the newest measured version of JAX."""

    def pretend(machine, avx512, version=(0, 12, 0)):
        monkeypatch.setattr("platform.machine", lambda: machine)
        monkeypatch.setattr(inference_options, "_has_avx512", lambda: avx512)
        monkeypatch.setattr(jax, "__version_info__", version)

    return pretend


def test_table_has_a_row_for_every_batch_size_and_names_known_options():
    for avx512 in (True, False):
        assert max(largest for row, largest, _ in _FASTEST_ON_X86 if row == avx512) == float("inf")
    assert {name for _, _, name in _FASTEST_ON_X86} <= set(_ALL_OPTIONS)


def test_options_depend_on_the_processor_and_the_batch_size(processor):
    processor("x86_64", avx512=False)
    assert _choose_options(FakeDevice("cpu"), jnp.float32, 1) is _ALL_OPTIONS["convolution"]
    assert _choose_options(FakeDevice("cpu"), jnp.float32, 16) is _ALL_OPTIONS["prepared"]
    processor("AMD64", avx512=True)
    assert _choose_options(FakeDevice("cpu"), jnp.float32, 1) is _ALL_OPTIONS["prepared"]


def test_unmeasured_settings_use_no_options_of_xla(processor):
    processor("aarch64", avx512=False)
    assert _choose_options(FakeDevice("cpu"), jnp.float32, 1) is _ALL_OPTIONS["constants"]
    processor("x86_64", avx512=True, version=(0, 11, 0))
    assert _choose_options(FakeDevice("cpu"), jnp.float32, 1) is _ALL_OPTIONS["constants"]
    processor("x86_64", avx512=True)
    assert _choose_options(FakeDevice("cpu"), jnp.bfloat16, 1) is _ALL_OPTIONS["constants"]
    assert _choose_options(FakeDevice("gpu"), jnp.float32, 1) is _ALL_OPTIONS["constants"]
    assert _choose_options(FakeDevice("tpu"), jnp.float32, 1) is _PLAIN


def test_avx512_is_unknown_without_proc(monkeypatch):
    def fail(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr("pathlib.Path.read_text", fail)
    assert not inference_options._has_avx512()


@pytest.mark.parametrize(("batch_size", "sizes"), [(None, {1, 2, 4, 16}), (8, {1, 8})])
def test_batches_are_padded_to_few_sizes(batch_size, sizes):
    model, variables = model_and_variables()
    predict = lf.make_inference_fn(model, variables, batch_size=batch_size, devices=jax.devices()[:1])
    pixels = pixel_values(model, 16)
    whole = np.asarray(predict(pixels))
    for count in (1, 2, 3, 9, 13):
        found = predict(pixels[:count])
        assert found.shape == (count, 5) and found.dtype == jnp.float32 and isinstance(found, jax.Array)
        np.testing.assert_allclose(found, whole[:count], atol=LIMIT * np.abs(whole).max())
    assert {size for size, _ in predict._programs} == sizes


def test_steady_state_compiles_nothing():
    model, variables = model_and_variables()
    predict = lf.make_inference_fn(model, variables, batch_size=4, devices=jax.devices()[:1])
    pixels = pixel_values(model, 11)
    for count in (1, 2, 11):
        predict(pixels[:count])
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        listen := lambda event, _, **__: compilations.append(event) if "compile" in event else None
    )
    try:
        for count in range(1, 12):
            predict(pixels[:count])
            predict(jax.device_put(pixels[:count]))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compilations


def test_uint8_images_are_normalized_like_the_processor_does():
    model, variables = model_and_variables()
    processor = lf.LevitImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    levels = np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), np.uint8)
    predict = lf.make_inference_fn(model, variables, processor=processor)
    normalized = np.stack([processor.rescale_and_normalize(image) for image in levels])
    np.testing.assert_allclose(predict(levels), predict(normalized), rtol=1e-4, atol=1e-4)


def test_float64_models_compute_in_float64():
    with jax.enable_x64(True):
        model, variables = model_and_variables(param_dtype=jnp.float64)
        pixels = pixel_values(model, 2).astype(np.float64)
        found = lf.make_inference_fn(model, variables)(pixels)
        expected = np.asarray(model.apply(variables, pixels).logits)
        assert found.dtype == jnp.float64
        assert np.abs(np.asarray(found) - expected).max() < 1e-10 * np.abs(expected).max()


def test_only_programs_without_constants_are_cached(monkeypatch):
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    thresholds = []

    def compile(*_, **__):
        thresholds.append(jax.config.jax_persistent_cache_min_compile_time_secs)
        return len

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile)
    function = inference._InferenceFunction(*model_and_variables(), None, None, jax.devices()[:1], False)
    pixels = jax.ShapeDtypeStruct((1, 32, 48, 3), jnp.float32)
    for name in ("arguments", "constants"):
        inference_options._compile(function._apply, function.variables, pixels, _ALL_OPTIONS[name])
    assert thresholds == [seconds, float("inf")]
    assert jax.config.jax_persistent_cache_min_compile_time_secs == seconds


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((0, 32, 48, 3), np.float32), "at least one image, found"),
        (np.zeros((32, 48, 3), np.float32), r"expected \[B 32 48 3\]"),
        (np.zeros((2, 3, 32, 48), np.float32), r"expected \[B 32 48 3\] .* found \[2, 3, 32, 48\]"),
    ],
)
def test_pixels_of_another_shape_raise(pixels, message):
    with pytest.raises(ValueError, match=message):
        lf.make_inference_fn(*model_and_variables())(pixels)


def test_inference_function_inside_jit_raises():
    predict = lf.make_inference_fn(*model_and_variables())
    with pytest.raises(TypeError, match=r"Use model\.apply inside transformations"):
        jax.jit(predict)(np.zeros((1, 32, 48, 3), np.float32))


def test_batch_size_below_one_raises():
    with pytest.raises(ValueError, match="batch_size must be at least 1, found 0"):
        lf.make_inference_fn(*model_and_variables(), batch_size=0)
