"""The command line in unusual environments."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import levit_flax as lf
from configs import unusual_config
from levit_flax.cli import main
from levit_flax.cli.info import _count_parameters
from levit_flax.modeling_variables import _abstract_variables

COMMAND = [sys.executable, "-m", "levit_flax"]


def run(arguments, **environment):
    settings = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=settings, check=False)


def test_cache_that_cannot_be_created_is_skipped(tmp_path):
    (tmp_path / "file").touch()
    done = run(["--version"], XDG_CACHE_HOME=str(tmp_path / "file"), JAX_COMPILATION_CACHE_DIR=None)
    assert (done.returncode, done.stderr) == (0, "") and "levit-flax" in done.stdout


def test_version_is_printed():
    done = run(["--version"])
    assert done.returncode == 0 and done.stdout.startswith("levit-flax 0.")


@pytest.mark.parametrize("platforms", ["cuda", "nothing"])
def test_missing_platform_is_one_sentence(tmp_path, platforms):
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    done = run(["classify", "-m", "cifar10", tmp_path / "image.png"], JAX_PLATFORMS=platforms)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: JAX cannot compute on JAX_PLATFORMS={platforms}: ")


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="needs POSIX signals")
def test_closed_stdout_ends_the_command_quietly():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = subprocess.run([*COMMAND, "--help"], stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("arguments", ["--help", "info", "info cifar10", "classify image.png -m cifar10"])
def test_user_without_home_and_name(tmp_path, arguments):
    """As in a container that runs with `docker run --user 1234`."""
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    program = (
        "import pwd, sys\n"
        "def missing(user): raise KeyError(user)\n"
        "pwd.getpwuid = missing\n"
        "from levit_flax.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    kept = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME", "HF_HOME")}
    kept.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, "-c", program, *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=kept, cwd=tmp_path, check=False)
    assert done.returncode == 0 and done.stdout, done.stderr
    assert len(done.stderr.splitlines()) <= 1


def test_info_does_not_import_jax():
    program = (
        "import sys; from levit_flax.cli import main\n"
        "assert main(['info', '--json']) == 0 and 'jax' not in sys.modules and 'huggingface_hub' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["levit-384"]["parameters"] == 39128836


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "levit-128s"], "There is no model levit-128s. Did you mean levit-128S?"),
        (["classify", "{image}", "-m", "Cifar10"], "There is no model Cifar10. Did you mean cifar10?"),
        (["info", "nowhere/model/here"], "The model nowhere/model/here does not exist"),
        (["finetune", "data", "-o", "run", "--set", "epoch=3"], "has the unknown key epoch"),
        (["finetune", "data", "-o", "run", "--recipe", "finetun"], "Did you mean finetune?"),
        (["clasify"], "Did you mean 'classify'?"),
        (["info", "--jsn"], "No such option: --jsn"),
    ],
)
def test_mistyped_names_are_wrong_calls_with_suggestions(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    assert main([argument.format(image=tmp_path / "image.png") for argument in arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.replace("\u2502", " ").split())


def test_counted_parameters_equal_those_of_the_models():
    for name, config in {**lf.VARIANTS, "unusual": unusual_config("stage without MLP")}.items():
        leaves = _abstract_variables(lf.LevitForImageClassificationWithTeacher(config))
        expected = sum(math.prod(leaf.shape) for path, leaf in leaves.items() if path.startswith("params/"))
        assert _count_parameters(config) == expected, name


def test_large_images_are_accepted_on_request(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    arguments = ["classify", str(tmp_path / "image.png"), "-m", "cifar10", "--json"]
    assert main(arguments) == 1
    assert (
        "expected at most 1,000 pixels, found 4,096. If you trust the file, raise --max-image-pixels"
        in capsys.readouterr().err
    )
    assert main([*arguments, "--max-image-pixels", "100000"]) == 0


@pytest.mark.parametrize("command", [["explain", "photo.png", "-o", "a.png"], ["evaluate", "data", "--output", "out"]])
def test_missing_matplotlib_is_found_before_the_work(command, tmp_path, monkeypatch, capsys):
    """Before the model is even looked for, which would raise another error."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("photo.png")
    Path("data", "cat").mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*command, "--model", "./nowhere"]) == 1
    assert capsys.readouterr().err == (
        "error: Drawing requires matplotlib, which is not installed. Run: pip install 'levit-flax[visualize]'\n"
    )
    assert sorted(os.listdir()) == ["data", "photo.png"]
