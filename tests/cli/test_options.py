"""Options: their help texts, and their choices, which are the library's."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from typer.main import get_command

from levit_flax import choices
from levit_flax.cli import main
from levit_flax.cli.app import app
from levit_flax.convert import WRITTEN_LAYOUTS, layouts
from levit_flax.evaluation import _CROP_RULES
from levit_flax.export import _FORMATS

PROGRAMS = Path(__file__).parents[1] / "programs"

COMMANDS = get_command(app).commands


@pytest.mark.parametrize("command", COMMANDS)
def test_help_texts_are_sentences(command):
    for parameter in COMMANDS[command].params:
        text = parameter.help
        assert text[0].isupper(), (parameter.name, text)
        assert text.endswith("."), (parameter.name, text)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["convert", "a", "b", "--to"], WRITTEN_LAYOUTS),
        (["convert", "a", "b", "--dtype"], get_args(choices._WeightDType)),
        (["evaluate", "a", "--crop"], _CROP_RULES),
        (["finetune", "a", "-o", "b", "--export-torch"], WRITTEN_LAYOUTS),
        (["export", "a", "--format"], _FORMATS),
    ],
)
def test_choices_are_those_of_the_library(capsys, arguments, expected):
    assert main([*arguments, "unknown"]) == 2
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())  # a box on several lines
    assert ", ".join(map(repr, expected)) in message


def test_written_layouts_are_known():
    assert set(WRITTEN_LAYOUTS) < set(layouts._LAYOUTS)


def test_help_lists_the_recipes_of_the_package():
    pytest.importorskip("grain")
    from levit_flax.training.recipe import _recipe_names

    assert tuple(_recipe_names()) == choices._RECIPE_NAMES
    [option] = [option for option in COMMANDS["finetune"].params if option.name == "recipe"]
    assert ", ".join(_recipe_names()) in option.help


def test_help_imports_nothing_heavy():
    done = subprocess.run(
        [sys.executable, PROGRAMS / "command_help.py", *COMMANDS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stderr == "", done
