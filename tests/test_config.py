"""What every command's config promises: one statement of each option, for flags, files, Python and spine.json."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer.main
import yaml
from pydantic import Field
from typer.testing import CliRunner

from spinecli.app import app
from spinecli.config import Config, Option, make_config, read_config
from spinecli.errors import MissingPathError, OptionError
from spinecli.recipes.recipe import KINDS

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


class Colour(str, Enum):
    red = "red"
    blue = "blue"


class Inner(Config):
    size: Annotated[int, Field(ge=1, le=9), Option("How large.", name="inner-size")] = 3
    word: Annotated[str | None, Option("Which word.", default="none at all")] = None


class Outer(Config):
    model: Annotated[str, Option("What.", argument=True, decides=False)]
    share: Annotated[float, Field(gt=0, lt=1), Option("How much.")]
    colour: Annotated[Colour, Option("Which colour.")] = Colour.red
    loud: Annotated[bool, Option("Whether aloud.")] = False
    texts: Annotated[tuple[str, ...], Option("Which texts.")] = ()
    inner: Annotated[Inner, Option("The inside.", panel="Inside")] = Inner()


GIVEN: dict[str, Any] = {"model": "m", "share": "0.5"}


def test_flags_take_the_place_of_what_a_file_says(tmp_path: Path) -> None:
    file = tmp_path / "asked.yaml"
    file.write_text("model: m\nshare: 0.25\ncolour: blue\ninner: {size: 4, word: x}\n")
    assert read_config(Outer, file, {}) == Outer(
        model="m", share=0.25, colour=Colour.blue, inner=Inner(size=4, word="x")
    )
    found = read_config(Outer, file, {"inner_size": "5", "colour": "red", "loud": True})
    assert (found.inner, found.colour, found.loud) == (Inner(size=5, word="x"), Colour.red, True)


def test_part_of_a_model_inside_leaves_the_rest_of_it() -> None:
    asked = make_config(Outer, "m", {"share": 0.5, "inner": {"size": 4, "word": "x"}})
    assert make_config(Outer, asked, {"inner": {"size": 5}}).inner == Inner(size=5, word="x")


def test_a_printed_config_asks_for_the_same(tmp_path: Path) -> None:
    asked = read_config(Outer, None, {**GIVEN, "inner_size": 9, "texts": ["a", "b"]})
    file = tmp_path / "printed.yaml"
    file.write_text(asked.as_yaml())
    assert read_config(Outer, file, {}) == asked


def test_its_arguments_are_what_differs_from_the_defaults() -> None:
    asked = make_config(Outer, "m", {"share": 0.5, "inner_size": 4, "loud": True, "texts": ("a", "b")})
    words = ["m", "--share", "0.5", "--loud", "--texts", "a", "--texts", "b", "--inner-size", "4"]
    assert asked.arguments() == words


def test_parameters_hold_what_decides_by_the_names_of_the_flags() -> None:
    assert make_config(Outer, "m", {"share": 0.5}).parameters() == {
        "share": 0.5,
        "colour": "red",
        "loud": False,
        "texts": [],
        "inner_size": 3,
        "word": None,
    }


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"share": "1.5"}, "--share must be above 0 and below 1, not 1.5."),
        ({"share": "nan"}, "--share must be above 0 and below 1, not nan."),
        ({"share": "much"}, "--share must be a number, above 0 and below 1, not 'much'."),
        ({"inner_size": "2.5"}, "--inner-size must be a whole number, at least 1 and at most 9, not 2.5."),
        ({"inner_size": "0"}, "--inner-size must be at least 1 and at most 9, not 0."),
        ({"colour": "green"}, "--colour must be one of red, blue, not 'green'."),
        ({"share": None}, "--share must be a number, above 0 and below 1, not None."),
    ],
    ids=str,
)
def test_a_wrong_value_is_told_by_its_flag_and_in_python_by_its_field(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OptionError) as told:
        read_config(Outer, None, {**GIVEN, **change})
    assert str(told.value) == sentence
    with pytest.raises(OptionError) as told:
        make_config(Outer, "m", {"share": 0.5, **change})
    assert str(told.value) == sentence.replace("--inner-size", "inner_size").replace("--", "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("share: 0.5\n", "MODEL is missing: What."),
        ("model: m\nshare: 0.5\ncolor: red\n", "no option color; did you mean colour"),
        ("model: m\nshare: 0.5\ninner: {sice: 3}\n", r"no option inner\.sice; did you mean inner\.size"),
        ("model: m\nshare: 0.5\ninner: large\n", "inner"),
        ("- model\n", "is not a list of options"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "asked.yaml"
    file.write_text(text)
    with pytest.raises(OptionError, match=words):
        read_config(Outer, file, {})


def test_a_wrong_value_is_said_of_the_file_only_if_it_stands_there(tmp_path: Path) -> None:
    file = tmp_path / "asked.yaml"
    file.write_text("model: m\nshare: 2\n")
    with pytest.raises(OptionError, match=r"--share must be above 0 and below 1, not 2\. \(.*asked\.yaml\)"):
        read_config(Outer, file, {})
    with pytest.raises(OptionError, match=r"--share must be above 0 and below 1, not 3\.$"):
        read_config(Outer, file, {"share": "3"})


def test_a_file_may_name_options_as_flags_do(tmp_path: Path) -> None:
    file = tmp_path / "asked.yaml"
    file.write_text("model: m\nshare: 0.5\ninner_size: 7\n")
    assert read_config(Outer, file, {}).inner.size == 7


def test_a_file_that_is_not_there_and_a_name_that_nothing_has() -> None:
    with pytest.raises(MissingPathError, match=r"nowhere\.yaml does not exist"):
        read_config(Outer, Path("nowhere.yaml"), {})
    with pytest.raises(OptionError, match="no option inner_sise; did you mean inner_size"):
        make_config(Outer, "m", {"share": 0.5, "inner_sise": 3})


@pytest.mark.parametrize("command", KINDS)
def test_every_option_of_every_command_says_what_it_is(command: str) -> None:
    fields = KINDS[command].fields()
    assert all(found.option.help.endswith(".") for found in fields)
    assert len({found.name for found in fields}) == len(fields)
    shown = {param.name for param in COMMANDS[command].params}
    assert {found.name for found in fields} <= shown


@pytest.mark.parametrize("command", KINDS)
def test_a_command_prints_what_it_would_run_and_takes_it_back(command: str, tmp_path: Path) -> None:
    needed = {"sparsity": "0.3", "format": "hf", "data": "x.csv", "fleet": "jetson-10"}
    words: list[str] = []
    for found in KINDS[command].fields():
        if found.option.argument:
            words.append("somewhere")
        elif found.required:
            words += [found.flag, needed[found.name]]
    printed = CliRunner().invoke(app, [command, *words, "--print-config"])
    assert printed.exit_code == 0, printed.output
    file = tmp_path / "asked.yaml"
    file.write_text(printed.stdout)
    assert CliRunner().invoke(app, [command, "--config", str(file), "--print-config"]).stdout == printed.stdout
    assert KINDS[command].model_validate(yaml.safe_load(printed.stdout)).arguments() == words


def test_help_names_every_default_once() -> None:
    shown = CliRunner().invoke(app, ["prune", "--help"], env={"COLUMNS": "200"}).stdout
    assert shown.count("Default: 128.") == 1
    assert "Required." in shown
