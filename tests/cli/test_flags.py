"""Messages of the library name Python parameters; the command line prints its flags instead."""

import warnings

import pytest
from typer.main import get_command

from levit_flax.cli import main
from levit_flax.cli.app import app
from levit_flax.cli.flags import FLAGS, use_flags, with_flags
from levit_flax.convert import workflow

MESSAGE = (
    "OUT exists: pass overwrite=True to replace it, resume=True to continue. Pass image_size=(64, 64) or verify=False."
)


@pytest.fixture(autouse=True)
def _no_command():
    yield
    use_flags([])


def flags_of_commands():
    return {
        name: {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
        for name, command in get_command(app).commands.items()
    }


@pytest.mark.parametrize("flag", FLAGS.values())
def test_every_flag_belongs_to_a_command(flag):
    assert any(flag in flags for flags in flags_of_commands().values())


@pytest.mark.parametrize("parameter", FLAGS)
def test_parameter_is_replaced_if_the_command_has_the_flag(parameter):
    use_flags([FLAGS[parameter]])
    assert with_flags(f"Pass {parameter}, or leave out {parameter}.") == (
        f"Pass {FLAGS[parameter]}, or leave out {FLAGS[parameter]}."
    )
    use_flags([])
    assert with_flags(f"Pass {parameter}.") == f"Pass {parameter}."


@pytest.mark.parametrize("text", ["not_overwrite=True", "overwrite=Truely", "overwrite=False", "image_size=224"])
def test_other_text_is_kept(text):
    use_flags(FLAGS.values())
    assert with_flags(text) == text


def test_errors_and_warnings_name_flags_of_the_command(capsys, monkeypatch, tmp_path):
    def convert(*_, **__):
        warnings.warn("Pass ema=True.", stacklevel=1)
        raise ValueError(MESSAGE)

    monkeypatch.setattr(workflow, "_convert_to_directory", convert)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["convert", "model.pth", str(tmp_path / "out")]) == 1
    warning, error = capsys.readouterr().err.splitlines()
    assert warning == "warning: Pass --ema."
    expected = MESSAGE.replace("overwrite=True", "--force").replace("verify=False", "--no-verify")
    assert error == f"error: {expected}"  # convert has no --resume


def test_flags_of_an_earlier_command_are_forgotten(capsys, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    assert main(["export", str(tmp_path / "out"), "-m", "cifar10"]) == 1
    assert main(["info", str(tmp_path / "nowhere")]) == 2
    assert with_flags("Pass overwrite=True or local_files_only=True.") == "Pass overwrite=True or --offline."
