"""What the documentation says to type is composed, and what it links to exists."""

import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from orpo_lab import config
from orpo_lab.errors import UserError
from tests.conftest import ROOT, compose_config

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
RECIPES = sorted((ROOT / "conf" / "experiment").glob("*.yaml"))


def commands(file: Path) -> list[list[str]]:
    """Return the overrides of every launch command in a page's code blocks or a recipe's head."""
    text = file.read_text()
    if file.suffix == ".md":
        text = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.DOTALL))
    found = re.findall(
        r"python launch\.py(?: +(.*))?$", text.replace("\\\n", " "), flags=re.MULTILINE
    )
    made = re.findall(r'make run ARGS="(.*?)"', text)
    return [shlex.split(one, comments=True) for one in [*found, *made]]


def jobs(overrides: list[str]) -> list[list[str]]:
    """Return the overrides of every job that a command starts."""
    choices = []
    for override in overrides:
        if override.startswith(("-", "hydra.", "hydra/")):
            continue
        key, _, values = override.partition("=")
        swept = "-m" in overrides and "," in values and "[" not in values
        choices.append([f"{key}={value}" for value in values.split(",")] if swept else [override])
    return [list(one) for one in itertools.product(*choices)]


@pytest.mark.parametrize("file", [*PAGES, *RECIPES], ids=lambda file: file.name)
def test_every_command_composes(file: Path) -> None:
    for command in commands(file):
        if command[:1] == ["--help"]:
            continue
        if "--cfg" in command:
            at = command.index("--cfg")
            del command[at : at + 2]
        for job in jobs(command):
            try:
                config.load(compose_config(*job))
            except UserError as error:
                raise AssertionError(f"{file.name}: {' '.join(command)}: {error}") from error


def test_the_readme_starts_with_its_two_commands_and_shows_more() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.index("make run ") < text.index("make test ") < text.index("launch.py")
    assert len(commands(ROOT / "README.md")) >= 5
    assert all(commands(recipe) for recipe in RECIPES)


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_every_link_leads_somewhere(file: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", file.read_text()):
        if not target.startswith("http"):
            assert (file.parent / target).exists(), f"{file.name} links to {target}"


@pytest.mark.parametrize("optimizer", ["qlora", "galore"])
def test_the_readmes_code_loads_final_and_generates(
    launch: Callable[..., object], tmp_path: Path, optimizer: str
) -> None:
    launch(
        f"optimizer={optimizer}",
        "train.max_steps=2",
        "dataset.num_train=16",
        "dataset.num_eval=4",
        "dataset.num_generations=0",
        "tracker=none",
        "hydra.run.dir=run",
    )
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    if optimizer == "galore":
        code = code.replace("from peft", "from transformers").replace("AutoPeft", "Auto")

    done = subprocess.run(
        [sys.executable, "-c", code, "run"], cwd=tmp_path, capture_output=True, text=True
    )
    assert "which is larger, 31 or 70?" in done.stdout, done.stderr
