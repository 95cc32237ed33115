"""The command line: help, and bad input that ends in one line with the next step, never a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dig_scale.errors import RecipeError
from dig_scale.progress import duration
from dig_scale.recipe_files import load_recipe, parse_recipe


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dig_scale.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_help_names_every_command() -> None:
    text = run("--help").stdout
    every = "run simulate import import-weights relabel pack verify train sample serve request evaluate"
    for command in every.split():
        assert f" {command} " in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("describe", "nosuch"), "give a .toml file or one of"),
        (("describe", "tiny", "--set", "train.speed=9"), "train.speed"),
        (("describe", "tiny", "--set", "nonsense"), "expected section.key=value"),
        (("sample", "nowhere", "--out", "x"), "run `dig-scale train` first"),
        (("verify", "nowhere"), "no folder nowhere"),
        (("pack", "tiny", "nowhere", "--out", "x"), "no trajectories"),
        (("evaluate", "nowhere", "--reference", "x", "--out", "y"), "run `dig-scale sample` first"),
    ],
)
def test_bad_input_is_one_clear_line(words: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    done = run(*words)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2
    assert last.startswith("error: ")
    assert expected in last
    assert "Traceback" not in done.stderr


def test_override_changes_one_value_and_nothing_else() -> None:
    changed, plain = load_recipe("tiny", ["train.learning_rate=1e-4"]), load_recipe("tiny")
    assert changed.train is not None
    assert plain.train is not None
    assert changed.train.learning_rate == 1e-4
    assert changed.train.model_copy(update={"learning_rate": plain.train.learning_rate}) == plain.train


def test_unknown_keys_and_contradictions_are_refused_by_name() -> None:
    for content, words in [
        ({"name": "x", "colour": 1}, "colour"),
        ({"name": "x", "model": {"width": 30, "heads": 4}}, "not a multiple of heads"),
        ({"name": "x", "systems": [{"name": "a"}]}, "exactly one of sequence, file, smiles"),
        ({"name": "x", "train": {"zero_stage": 4}}, "train.zero_stage"),
    ]:
        with pytest.raises(RecipeError, match=words):
            parse_recipe(content, "here")


def test_durations_read_like_words() -> None:
    assert [duration(s) for s in (None, 5, 200, 7500)] == ["?", "5 s", "3 min 20 s", "2 h 05 min"]
