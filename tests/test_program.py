"""How the lab is called, in usage lines and in the commands that messages propose."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orpo_lab import program
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("started", "is_clone", "train", "compare"),
    [
        ("/usr/bin/orpo-lab", True, "orpo-lab train", "orpo-lab compare"),
        ("orpo-lab.exe", False, "orpo-lab train", "orpo-lab compare"),
        ("orpo_lab/__main__.py", False, "python -m orpo_lab train", "python -m orpo_lab compare"),
        ("launch.py", True, "python launch.py", "python -m orpo_lab compare"),
        ("ipykernel_launcher.py", True, "python launch.py", "python -m orpo_lab compare"),
        ("ipykernel_launcher.py", False, "orpo-lab train", "orpo-lab compare"),
    ],
)
def test_a_command_is_proposed_as_the_user_calls_the_lab(
    started: str, is_clone: bool, train: str, compare: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(ROOT / started), "compare", "x"])
    monkeypatch.setattr(program, "IS_CLONE", is_clone)
    assert (program.command("train"), program.command("compare")) == (train, compare)


@pytest.mark.parametrize(
    ("is_clone", "how"),
    [(True, 'pip install -e ".[search]"'), (False, 'pip install "orpo-lab[search]"')],
)
def test_an_extra_is_installed_as_the_lab_was(
    is_clone: bool, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "IS_CLONE", is_clone)
    assert program.install("search") == how


def said(node: ast.AST) -> Iterator[str]:
    """Yield every text in code that is no docstring."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue
        if isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield child.value
        yield from said(child)


def test_only_one_module_says_how_the_lab_is_called() -> None:
    door = re.compile(r"launch\.py|-m orpo_lab\b(?!\.)|orpo-lab (train|sweep)|pip install")
    files = sorted((ROOT / "orpo_lab").rglob("*.py"))
    found = [
        f"{file.relative_to(ROOT)}: {text}"
        for file in files
        for text in said(ast.parse(file.read_text()))
        if door.search(text) and file.name != "program.py"
    ]
    assert len(files) > 60
    assert found == []
    assert any(map(door.search, said(ast.parse(Path(program.__file__).read_text()))))
