"""`levit-flax convert` from end to end: directories that other libraries open, reports with proofs, atomic writes."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from huggingface_hub import constants
from safetensors.numpy import save_file

import levit_flax as lf
from configs import SMALL, in_another_order, random_variables
from hub_server import HubServer
from levit_flax import checkpoint, convert, loading
from levit_flax import hub as hub_module
from levit_flax.cli import main
from levit_flax.convert import ConversionError, conversion, verification, workflow
from levit_flax.convert.layouts import _LAYOUTS, _index_table, _Structure
from levit_flax.convert.sources import _open_source
from levit_flax.convert.timm_files import _write_timm_config
from levit_flax.hub import HubError, _HubOptions


def slow_except(kept, layouts):
    return [pytest.param(layout, marks=() if layout == kept else pytest.mark.slow) for layout in layouts]


PROGRAMS = Path(__file__).parents[1] / "programs"
KILLS, SHORT_KILLS = 50, 4


@pytest.fixture
def model():
    return lf.LevitForImageClassificationWithTeacher(lf.LevitConfig(**SMALL, id2label=("a", "b", "c", "d", "e")))


@pytest.fixture
def own(model, tmp_path):
    """The directory of a model in our format."""
    lf.save_pretrained(tmp_path / "own", model, random_variables(model), lf.LevitImageProcessor(size=70, crop_size=64))
    return tmp_path / "own"


def run(source, out, **options):
    return workflow._convert_to_directory(str(source), out, **options).to_dict()


@pytest.mark.parametrize("layout", convert.WRITTEN_LAYOUTS)
def test_round_trip_restores_everything(own, model, layout, tmp_path):
    """The report of each direction is written next to the model, as JSON and as text."""
    report = run(own, tmp_path / "torch", layout=layout, verify=False)
    assert report["proof"]["read back"]["passed"] and report["written"]["layout"] == layout
    back = run(tmp_path / "torch", tmp_path / "back", verify=False)
    assert back["checkpoint"]["layout"] == layout and back["proof"]["round trip"]["passed"]
    assert back["proof"]["PyTorch"] == {
        "passed": None,
        "outcome": "not compared with PyTorch",
        "because": "verify=False",
    }
    loaded, variables = lf.from_pretrained(tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, variables, random_variables(model))
    stored = json.loads((tmp_path / "back" / checkpoint._REPORT_FILE).read_text())
    assert stored == json.loads(json.dumps(back))
    readable = (tmp_path / "back" / checkpoint._READABLE_REPORT_FILE).read_text()
    assert "not compared with PyTorch (verify=False)" in readable and f"| layout | {layout}, batch norm" in readable
    assert stored["source"]["files"]["model.safetensors"] in readable
    assert stored["written"]["bytes"].keys() == {"config.json", "preprocessor_config.json", "flax_model.safetensors"}
    if layout != "facebook":  # this layout stores neither
        assert loaded.config == model.config
        processor = loading._load_processor(tmp_path / "back", loaded.config)
        assert processor.size == {"shortest_edge": 70}


@pytest.mark.parametrize("layout", slow_except("hf", convert.WRITTEN_LAYOUTS))
def test_pytorch_confirms_each_layout(own, layout, tmp_path):
    for package in ("torch", "transformers", "timm"):
        pytest.importorskip(package)
    proof = run(own, tmp_path / "torch", layout=layout)["proof"]["PyTorch"]
    assert proof["passed"] and proof["relative"] <= proof["limit"] == 1e-5
    peer = {"hf": "transformers", "facebook": "torch"}.get(layout, "timm")
    assert proof["reference"].startswith(peer) and proof["probes"] == 2 and proof["seed"] == 0
    assert list(proof["blocks"])[:2] == ["stem", "stage_0/block_0"] and len(proof["blocks"]) == 8
    assert all(0 < block["relative"] < 1e-5 for block in proof["blocks"].values())
    back = run(tmp_path / "torch", tmp_path / "back", fold=True, merge=True)
    assert back["proof"]["PyTorch"]["passed"] and back["proof"]["surgery"]["passed"]
    assert back["proof"]["surgery"]["relative"] < 1e-5
    readable = (tmp_path / "back" / checkpoint._READABLE_REPORT_FILE).read_text()
    assert "| downsample_1 | " in readable and f"logits differ from {peer}" in readable


def compared(model, layout, config=None):
    """Return the comparison of a conversion from a layout with PyTorch."""
    source = _open_source(convert.to_torch(model, random_variables(model), layout))
    return verification._compare_with_pytorch(source, conversion._convert(source, config=config))


@pytest.mark.parametrize(("layout", "folded"), [("hf", False), ("timm", True), ("timm_conv", False)])
def test_plain_pytorch_replaces_a_missing_library(model, layout, folded, monkeypatch):
    """If the layout's library is not installed, the plain PyTorch model compares as many blocks."""
    pytest.importorskip("torch")
    peer = verification._PEERS[layout]._replace(needs=("torch", "not_a_package"), build=lambda _: pytest.fail("built"))
    monkeypatch.setitem(verification._PEERS, layout, peer)
    assert peer.missing == ["not_a_package"]
    result = compared(model.clone(folded=folded), layout)
    assert result.reference.startswith("torch ") and result.logits.passed
    assert len(result.blocks) == 8 and all(0 < block.relative < 1e-5 for block in result.blocks.values())


@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        ("hf", {"image_size": (64, 48)}),
        pytest.param("hf", {"image_size": 72}, marks=pytest.mark.slow),
        pytest.param("timm_conv", {"mlp_ratio": (2, 0, 2), "key_dim": (8, 4, 8)}, marks=pytest.mark.slow),
    ],
)
def test_plain_pytorch_compares_models_that_the_library_cannot_build(layout, fields):
    for package in ("torch", "transformers", "timm"):
        pytest.importorskip(package)
    config = lf.LevitConfig(**{**SMALL, **fields})
    result = compared(lf.LevitForImageClassification(config), layout, config)
    assert result.reference.startswith("torch ") and result.logits.passed and len(result.blocks) == 8


def test_image_size_that_transformers_cannot_take_is_noted(tmp_path):
    notes = []
    for image_size in (64, 72):
        model = lf.LevitForImageClassification(lf.LevitConfig(**{**SMALL, "image_size": image_size}))
        lf.save_pretrained(tmp_path / f"own{image_size}", model, random_variables(model))
        own, hf = tmp_path / f"own{image_size}", tmp_path / f"hf{image_size}"
        report = workflow._convert_to_directory(str(own), hf, layout="hf", verify=False)
        notes.append(report.summary()["written as"])
    assert notes[0] == "hf" and "expected a square multiple of 16, found 72x72" in notes[1]


@pytest.mark.parametrize("layout", ["hf", "facebook"])
def test_missing_pytorch_is_reported(own, layout, tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "_ORIGINAL", verification._ORIGINAL._replace(needs=("not_a_package",)))
    proof = run(own, tmp_path / "torch", layout=layout)["proof"]["PyTorch"]
    assert proof == {
        "passed": None,
        "outcome": "not compared with PyTorch",
        "because": "not_a_package is not installed",
    }


@pytest.mark.parametrize("layout", slow_except("facebook", ["hf", "timm", "facebook"]))
def test_biases_in_another_order_are_permuted(model, layout, tmp_path):
    """The index table in the file gives the order of its biases; PyTorch gets them in its own order."""
    for package in ("torch", "transformers", "timm"):
        pytest.importorskip(package)
    tensors = convert.to_torch(model, random_variables(model), layout)
    names = _LAYOUTS[layout].tables(_Structure.of(model.config, model.head_names, model.folded))
    tables = {name: _index_table(model.config, path).astype(np.int64) for name, path in names.items()}
    save_file(in_another_order(tensors, tables), tmp_path / "levit.safetensors")
    report = run(tmp_path / "levit.safetensors", tmp_path / "out")
    # Two of the seven belong to a single token, so their biases have only one order.
    assert any("5 tables of attention biases were stored in another order" in n for n in report["checkpoint"]["notes"])
    assert report["proof"]["round trip"]["passed"] and report["proof"]["PyTorch"]["passed"]
    assert report["proof"]["PyTorch"]["reference"].startswith(verification._PEERS[layout].package)
    jax.tree.map(np.testing.assert_array_equal, lf.from_pretrained(tmp_path / "out")[1], random_variables(model))


@pytest.mark.parametrize("layout", slow_except("facebook", ["hf", "timm_conv", "facebook"]))
def test_one_changed_element_is_found(model, layout):
    source = _open_source(convert.to_torch(model, random_variables(model), layout))
    converted = conversion._convert(source)
    assert verification._find_differing_bytes(source, converted) == []
    flat = flatten_dict(converted.variables, sep="/")
    for row in converted.rows:
        changed = np.array(flat[row.flax])
        last = (-1,) * changed.ndim
        changed[last] = changed[last] + 1 if changed.dtype == np.int32 else np.nextafter(changed[last], np.float32(9))
        variables = unflatten_dict({**flat, row.flax: changed}, sep="/")
        differing = verification._find_differing_bytes(source, dataclasses.replace(converted, variables=variables))
        assert differing == [row.torch]


def test_report_has_the_hashes_of_the_files(own, tmp_path):
    for source, out, layout in ((own, tmp_path / "hf", "hf"), (tmp_path / "hf", tmp_path / "back", None)):
        report = run(source, out, layout=layout, verify=False)
        [file] = source.glob("*.safetensors")
        assert report["source"]["files"] == {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}


@pytest.mark.parametrize("layout", slow_except("timm", ["timm", "timm_conv", "facebook"]))
def test_folded_models_are_exported_fused(own, layout, tmp_path):
    run(own, tmp_path / "folded", fold=True, merge=True, verify=False)
    config = json.loads((tmp_path / "folded" / "config.json").read_text())["levit_flax"]
    assert config["folded"] and config["provenance"]["merged_heads"]
    loaded, variables = lf.from_pretrained(tmp_path / "folded")
    assert loaded.folded and type(loaded) is lf.LevitForImageClassification
    report = run(tmp_path / "folded", tmp_path / "fused", layout=layout)
    assert report["proof"]["read back"]["passed"] and report["proof"]["PyTorch"]["passed"] is not False
    back, back_variables = convert.from_torch(tmp_path / "fused")
    assert back.folded
    jax.tree.map(np.testing.assert_array_equal, back_variables, variables)
    with pytest.raises(ValueError, match="transformers has no layout for folded models"):
        run(tmp_path / "folded", tmp_path / "hf", layout="hf")
    assert not (tmp_path / "hf").exists()


def test_transformers_opens_what_is_written(own, tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    run(own, tmp_path / "hf", layout="hf", verify=False)
    opened, loading = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert type(opened).__name__ == "LevitForImageClassificationWithTeacher" and not any(loading.values())
    assert opened.config.id2label[4] == "e"
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    assert processor.crop_size["height"] == 64


def test_failed_proof_writes_nothing(own, tmp_path, monkeypatch):
    run(own, tmp_path / "hf", layout="hf", verify=False)
    monkeypatch.setattr(workflow, "_find_differing_bytes", lambda *_: ["classifier.linear.bias"])
    with pytest.raises(ConversionError, match=r"nothing was written\. round trip: 1 of 225 tensors"):
        run(tmp_path / "hf", tmp_path / "out", verify=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "own"]


def test_wrong_conversion_table_fails_the_proof(own, tmp_path, monkeypatch):
    """PyTorch detects a row that is wrong in both directions, which a round trip cannot."""
    pytest.importorskip("torch")
    from levit_flax.convert.layouts import _LAYOUTS

    # In square MLPs the two layers have the same shape.
    down_ops = [(*op[:4], 1, op.stride) for op in lf.LevitConfig(**SMALL).down_ops]
    model = lf.LevitForImageClassification(lf.LevitConfig(**{**SMALL, "mlp_ratio": (1, 1, 1), "down_ops": down_ops}))
    convert.save_torch(tmp_path / "levit.safetensors", model, random_variables(model), "facebook")
    right = _LAYOUTS["facebook"]
    monkeypatch.setitem(_LAYOUTS, "facebook", right._replace(linears=dict(right.linears, up="2", down="0")))
    with pytest.raises(ConversionError, match=r"Verification failed, so nothing was written\. PyTorch: logits differ"):
        run(tmp_path / "levit.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_narrow_dtypes_are_kept_and_limits_scale(own, tmp_path):
    run(own, tmp_path / "hf", layout="hf", verify=False)
    report = run(tmp_path / "hf", tmp_path / "half", dtype="float16", fold=True)
    assert report["proof"]["PyTorch"]["passed"] is not False
    assert report["model"]["dtype"] == "float16"
    assert report["proof"]["round trip"]["with"] == "the source's values as float16"
    assert 1e-5 < report["proof"]["surgery"]["relative"] < report["proof"]["surgery"]["limit"] < 0.1
    again = run(tmp_path / "own", tmp_path / "bf16", dtype="bfloat16", verify=False)
    assert again["model"]["dtype"] == "bfloat16"
    assert lf.from_pretrained(tmp_path / "bf16", dtype="auto")[0].param_dtype == jax.numpy.bfloat16


def test_processor_follows_the_image_size(own, tmp_path):
    run(own, tmp_path / "hf", layout="hf", verify=False)
    wanted = {None: (70, 64), 64: (70, 64), 60: (66, 60), (56, 60): (66, (56, 60))}  # 70 / 64 of the longer side
    for i, (image_size, (size, crop_size)) in enumerate(wanted.items()):
        run(tmp_path / "hf", tmp_path / f"out{i}", image_size=image_size, verify=False)
        model, _ = lf.from_pretrained(tmp_path / f"out{i}")
        processor = loading._load_processor(tmp_path / f"out{i}", model.config)
        assert vars(processor) == vars(lf.LevitImageProcessor(size=size, crop_size=crop_size))
        assert tuple(processor.crop_size.values()) == model.config.image_height_width
    lf.LevitImageProcessor(size=70, crop_size=48).save_pretrained(tmp_path / "hf", overwrite=True)
    run(tmp_path / "hf", tmp_path / "as it is", verify=False)
    assert lf.LevitImageProcessor.from_pretrained(tmp_path / "as it is").crop_size == {"height": 48, "width": 48}


@pytest.mark.parametrize("kind", ["pytorch", "flax"])
def test_image_size_resizes_the_model(own, tmp_path, kind):
    source = own
    if kind == "pytorch":
        run(own, tmp_path / "hf", layout="hf", verify=False)
        source = tmp_path / "hf"
    run(source, tmp_path / "out", image_size=96, verify=False)
    model, variables = lf.from_pretrained(tmp_path / "out")
    expected, expected_variables = lf.resize_image(*lf.from_pretrained(own), 96)
    assert model.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, variables, expected_variables)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["levit_flax"]["provenance"]["resized from"] == [64, 64]
    assert lf.LevitImageProcessor.from_pretrained(tmp_path / "out").crop_size == {"height": 96, "width": 96}


def test_pytorch_options_for_a_converted_model_are_refused(own, tmp_path):
    for options, name in (
        ({"source_image_size": 96}, r"source_image_size=\.\.\."),
        ({"prefix": "net"}, r"prefix=\.\.\."),
        ({"ema": True}, "ema=True"),
    ):
        with pytest.raises(ValueError, match=rf"is already converted: .* with {name}, found .* Leave out {name}\.$"):
            run(own, tmp_path / "out", **options)


def test_every_hub_option_reaches_the_hub(tmp_path, monkeypatch):
    options = _HubOptions("v2", "hf_token", tmp_path / "cache", local_files_only=True)
    access = {name: value for name, value in dataclasses.asdict(options).items() if name != "subfolder"}
    asked = []

    def resolve(source, **arguments):
        asked.append((source, arguments["options"]))
        raise HubError("no Hub here")

    monkeypatch.setattr(hub_module, "_resolve", resolve)
    with pytest.raises(HubError, match="no Hub here"):
        run("someone/levit", tmp_path / "out", options=options)
    with pytest.raises(HubError, match="no Hub here"):
        convert.from_torch("someone/levit", **access)
    assert asked == [("someone/levit", options)] * 2


def test_overwriting_removes_the_old_report(own, tmp_path):
    out = tmp_path / "out"
    run(own, out, fold=True, verify=False)
    (out / "notes.txt").write_text("mine")
    lf.save_pretrained(out, *lf.from_pretrained(own), overwrite=True)
    assert sorted(os.listdir(out)) == ["config.json", "flax_model.safetensors", "notes.txt"]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on this machine, with an empty cache of downloads."""
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


def hub_files(model, layout):
    """Return the files of a repository of each family."""
    from safetensors.numpy import save

    config = model.config
    weights = save(convert.to_torch(model, random_variables(model), layout), metadata={"format": "pt"})
    if layout == "hf":
        values = json.dumps({**config.to_dict(), "architectures": [type(model).__name__]})
        return {"config.json": values.encode(), "pytorch_model.bin": b"not this one", "model.safetensors": weights}
    values = _write_timm_config(config, model.head_names, lf.LevitImageProcessor(size=63), layout == "timm_conv")
    return {"config.json": values.encode(), "pytorch_model.bin": b"not this one", "model.safetensors": weights}


@pytest.mark.parametrize(
    ("repository", "layout"),
    [
        ("facebook/levit-128S", "hf"),
        ("timm/levit_128s.fb_dist_in1k", "timm"),
        ("timm/levit_conv_128s.fb_dist_in1k", "timm_conv"),
    ],
)
def test_hub_repositories_of_every_family_convert(hub, repository, layout, model, tmp_path, capsys):
    revision = hub.add(repository, hub_files(model, layout))
    assert main(["convert", repository, str(tmp_path / "out"), "--no-verify", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["source"]["source"], report["source"]["revision"]) == (repository, revision)
    assert report["checkpoint"]["layout"] == layout and list(report["source"]["files"]) == ["model.safetensors"]
    loaded, variables = lf.from_pretrained(tmp_path / "out")
    assert loaded.config == model.config
    jax.tree.map(np.testing.assert_array_equal, variables, random_variables(model))
    processor = loading._load_processor(tmp_path / "out", loaded.config)
    assert processor.size == {"shortest_edge": 64 if layout == "hf" else 63}


def test_converted_model_on_the_hub_converts_back(hub, own, model, tmp_path):
    revision = hub.add("someone/levit-flax", {file.name: file.read_bytes() for file in own.iterdir()})
    assert main(["convert", "someone/levit-flax", str(tmp_path / "out"), "--to=hf", "--no-verify"]) == 0
    assert json.loads((tmp_path / "out" / checkpoint._REPORT_FILE).read_text())["source"]["revision"] == revision
    assert convert.from_torch(tmp_path / "out")[0].config == model.config


@pytest.mark.parametrize(
    ("kills", "delay", "config"),
    [
        pytest.param(SHORT_KILLS, 0.05, lf.LevitConfig(**SMALL), id="short"),
        pytest.param(KILLS, 0.0, lf.VARIANTS["levit-128S"], id="long", marks=pytest.mark.slow),
    ],
)
def test_killed_conversion_writes_all_or_nothing(tmp_path, kills, delay, config):
    model = lf.LevitForImageClassificationWithTeacher(config)
    convert.save_torch(tmp_path / "levit.safetensors", model, random_variables(model), "facebook")
    (tmp_path / "outputs").mkdir()
    program = ["-W", "ignore", PROGRAMS / "killed_conversion.py"]
    arguments = [tmp_path / "levit.safetensors", tmp_path / "outputs", str(kills), "0", str(delay)]
    done = subprocess.run([sys.executable, *program, *arguments], check=False)
    assert done.returncode == 0
    whole = {path.name: path.read_bytes() for path in (tmp_path / "outputs" / "whole").iterdir()}
    assert len(whole) == 5
    outcomes = {"absent": 0, "whole": 0}
    for i in range(kills):
        out = tmp_path / "outputs" / f"out{i}"
        if not out.exists():
            outcomes["absent"] += 1
            continue
        outcomes["whole"] += 1
        assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
    print(f"killed {kills} times: {outcomes}")
    assert min(outcomes.values()) >= kills // 10  # few kills may all come at one end on a busy machine


def test_conversion_warnings_are_printed(tmp_path, model, capsys):
    path = tmp_path / "LeViT-128S-96703c44.safetensors"
    convert.save_torch(path, model, random_variables(model), "facebook")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["convert", str(path), str(tmp_path / "out"), "--no-verify"]) == 0
    out, err = capsys.readouterr()
    assert "96703c44" in out and "warning: LeViT-128S-96703c44.safetensors does not match the hash in its name" in err
