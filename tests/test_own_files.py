"""Recipes and options of one's own: read as ours are, and refused with file and line."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from hydra._internal.utils import create_config_search_path
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from orpo_lab import config
from orpo_lab.config.command_line import as_typed
from orpo_lab.config.folder import CONF
from orpo_lab.config.guard import CheckedLoader
from orpo_lab.config.own_files import line_of
from orpo_lab.errors import UserError
from tests.conftest import ROOT
from tests.test_docs import jobs

HEAD = "# @package _global_\n# Mine.\n"


def compose_with(folder: Path, *overrides: str) -> DictConfig:
    """Compose as launch.py does with `--config-dir folder`."""
    config.register()
    setup_globals()
    places = create_config_search_path(str(CONF))
    places.prepend("command-line", f"file://{folder}", anchor="schema")
    loader = CheckedLoader(places)
    typed = as_typed(overrides)
    return loader.load_configuration("config", typed, run_mode=RunMode.RUN)


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train:\n  max_stepz: 3\n", r":4: there is no key train.max_stepz .*'train.max_steps'"),
        ("lora_r: 3\n", r":3: there is no key lora_r .*'optimizer.r'"),
        ("optimizer:\n  rank: 3\n", r":4: .* is a key of optimizer=galore"),
        ("beta: 0.1\ntrain:\n  max_steps: lots\n", r":5: train.max_steps: Value 'lots'"),
        ("optimizer: galore\n", r":3: optimizer is a group.*override /optimizer: NAME"),
    ],
    ids=["key", "root", "other option", "type", "group"],
)
def test_an_error_in_a_recipe_names_its_file_and_line(tmp_path: Path, text: str, said: str) -> None:
    file = write(tmp_path, "experiment/mine", HEAD + text)
    with pytest.raises(UserError, match=re.escape(str(file)) + said):
        compose_with(tmp_path, "experiment=mine")


def test_an_error_in_an_option_names_the_line_below_its_group(tmp_path: Path) -> None:
    file = write(tmp_path, "optimizer/mine", "# Mine.\nlr: 1e-4\n")
    with pytest.raises(UserError, match=f"{file}:2: there is no key optimizer.lr "):
        compose_with(tmp_path, "optimizer=mine")


def test_a_recipe_that_lacks_its_first_line_is_told_so(tmp_path: Path) -> None:
    file = write(tmp_path, "experiment/mine", "beta: 0.3\n")
    with pytest.raises(UserError, match=f"{file}:1: .*# @package _global_"):
        compose_with(tmp_path, "experiment=mine")


def test_a_file_that_ours_would_hide_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, "experiment/mistral_qlora", f"{HEAD}beta: 0.3\n")
    assert compose_with(tmp_path, "experiment=phi2").beta == 0.25
    with pytest.raises(UserError, match=f"{file} has the name of an option that comes with"):
        compose_with(tmp_path, "experiment=mistral_qlora")


def test_an_error_of_the_command_line_is_not_put_down_to_a_file(tmp_path: Path) -> None:
    write(tmp_path, "experiment/mine", f"{HEAD}beta: 0.3\n")
    with pytest.raises(HydraException, match=r"Could not override 'train\.max_stepz'"):
        compose_with(tmp_path, "experiment=mine", "train.max_stepz=3")


@pytest.mark.parametrize(
    ("key", "line"), [("a", 1), ("a.b", 3), ("group.d", 4), ("d", 4), ("a.x", 1), ("x", 1)]
)
def test_the_line_of_a_key_is_found(key: str, line: int) -> None:
    assert line_of(key, "a:\n  # comment\n  b: 1\nd: {e: 2}\n") == line


def test_the_recipes_of_the_documentation_do_what_it_says(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    section = page.split("### Recipes of your own")[1].split("\n## ")[0]
    files = re.findall(r"`my/([\w/]+)\.yaml`[^`]*```yaml\n(.*?)```", section, flags=re.DOTALL)
    assert [name for name, _ in files] == ["experiment/mine", "experiment/higher", "model/mine"]
    for name, text in files:
        write(tmp_path, name, text)
    lines = re.findall(r"^python launch\.py --config-dir my (.*)$", section, re.MULTILINE)
    mine, *_ = (compose_with(tmp_path, *jobs(shlex.split(line))[-1]) for line in lines[:3])
    config.load(config.without_hydra(mine))
    assert (mine.beta, mine.hydra.runtime.choices.optimizer) == (0.2, "galore")
    higher, theirs = (
        compose_with(tmp_path, f"experiment={n}") for n in ("higher", "mistral_qlora")
    )
    assert (higher.beta, theirs.beta) == (0.3, 0.1)
    assert higher.train == theirs.train
    assert yaml.safe_load(files[2][1])["path"] == compose_with(tmp_path, "model=mine").model.path
