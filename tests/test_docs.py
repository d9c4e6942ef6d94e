"""What the documentation says to type is composed, and what it links to exists."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orpo_lab import config, run
from orpo_lab.errors import UserError
from tests.conftest import ROOT, compose_config

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
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
    return [shlex.split(command, comments=True) for command in [*found, *made]]


def jobs(overrides: list[str]) -> list[list[str]]:
    """Return overrides of jobs that a command starts, so many that every value is in one.

    A sweep over two lists starts the product of them; what a value needs does not depend on the
    other list.
    """
    choices = []
    for override in overrides:
        if override.startswith(("-", "hydra.", "hydra/")):
            continue
        key, _, values = override.partition("=")
        swept = "-m" in overrides and "," in values and "[" not in values
        choices.append([f"{key}={value}" for value in values.split(",")] if swept else [override])
    num = max(map(len, choices), default=1)
    return [[values[i % len(values)] for values in choices] for i in range(num)]


@pytest.mark.parametrize(
    "file",
    [
        ROOT / "README.md",
        *(pytest.param(page, marks=pytest.mark.slow) for page in PAGES if page.name != "README.md"),
        *RECIPES,
    ],
    ids=lambda file: file.name,
)
def test_every_command_composes(file: Path) -> None:
    for command in commands(file):
        # tests/test_own_files.py runs what has a folder of one's own
        if command[:1] == ["--help"] or "--config-dir" in command:
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


def test_the_worked_example_of_extending_is_all_that_it_takes(tmp_path: Path) -> None:
    for name in ("orpo_lab", "conf", "tests", "faults", "launch.py"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, tmp_path / name)
    example = (ROOT / "docs" / "extending.md").read_text().split("## Worked example")[1]
    schema, share, option, test = re.findall(r"```(?:python|yaml)\n(.*?)```", example, re.DOTALL)

    def insert(name: str, text: str, before: str) -> None:
        file = tmp_path / name
        assert file.read_text().count(before) == 1
        file.write_text(file.read_text().replace(before, f"{text}{before}"))

    last = "@dataclass(kw_only=True)\nclass HoldThenAnneal"
    insert("orpo_lab/config/beta_schedule.py", f"{schema}\n\n", last)
    insert("orpo_lab/config/__init__.py", "    Exponential,\n", "    HoldThenAnneal,\n    Linear")
    insert("orpo_lab/config/__init__.py", '"exponential": Exponential, ', '"constant": Constant,')
    insert("orpo_lab/beta_schedule.py", share, "    raise TypeError(f")
    insert("orpo_lab/beta_schedule.py", "    Exponential,\n", "    HoldThenAnneal,\n    Linear")
    (tmp_path / "conf" / "beta_schedule" / "exponential.yaml").write_text(option)
    insert(
        "tests/test_beta_schedule.py",
        "from orpo_lab.config.beta_schedule import Exponential\n",
        "ANNEALING =",
    )
    with (tmp_path / "tests" / "test_beta_schedule.py").open("a") as file:
        file.write(test)
    policies = "test_identity.py::test_every_key_of_every_schema_has_a_policy"
    command = ["-p", "no:cacheprovider", "tests/test_beta_schedule.py", f"tests/{policies}"]
    for arguments in (
        ["-m", "pytest", "-c", str(ROOT / "pyproject.toml"), f"--rootdir={tmp_path}", *command],
        ["launch.py", "beta_schedule=exponential", "--cfg", "job"],
    ):
        env = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "rate: 5.0" in done.stdout


def train(folder: Path, *overrides: str) -> None:
    """Run an experiment in this process."""
    composed = compose_config("tracker=none", "dataset.num_generations=0", *overrides)
    run.train(config.load(composed), folder, choices={}, overrides=[])


def run_readmes_code(final: Path, *, adapted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    if not adapted:
        code = code.replace("from peft", "from transformers").replace("AutoPeft", "Auto")
    monkeypatch.setattr(sys, "argv", ["-", str(final)])
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("optimizer", ["qlora", pytest.param("galore", marks=pytest.mark.slow)])
def test_the_readmes_code_loads_final_and_prints_an_answer_alone(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
) -> None:
    sizes = ("train.max_steps=2", "dataset.num_train=16", "dataset.num_eval=4")
    train(tmp_path / "run", f"optimizer={optimizer}", *sizes)
    capsys.readouterr()
    final = tmp_path / "run" / "final"
    run_readmes_code(final, adapted=optimizer == "qlora", monkeypatch=monkeypatch)
    # Hardly trained, it may answer wrongly; the base model knows one wrong answer
    assert capsys.readouterr().out in ("38\n", "39\n")


@pytest.mark.slow
@pytest.mark.long
def test_the_readmes_code_prints_the_right_answer_after_the_default_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "run")
    capsys.readouterr()
    run_readmes_code(tmp_path / "run" / "final", adapted=True, monkeypatch=monkeypatch)
    assert capsys.readouterr().out == "38\n"
    assert "it prints `38`" in (ROOT / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.long
def test_the_notebook_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nbformat
    from nbclient import NotebookClient

    # The notebook is executed by a kernel of its own, as in a browser
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    nbformat.write(notebook, tmp_path / "executed.ipynb")  # to look at
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    said = "".join(output.get("text", "") for output in shown)
    pictures = [output for output in shown if "image/png" in output.get("data", {})]
    assert len(pictures) > 2
    assert "after  preference 0.9" in said
    assert "4 of 4 jobs ended" in said
    assert (tmp_path / "outputs" / "notebook" / "model" / "model.safetensors").is_file()
    assert said.rstrip().endswith("\n38")
    assert "The evidence does not separate" in said.split("report  ")[1]
