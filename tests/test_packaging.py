"""What is installed: the packages that are declared, and the wheel in an environment of its own."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import orpo_lab
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Brought by torch's builds for GPUs, which alone need it; known to type checkers alone
UNDECLARED = {"triton", "_typeshed"}
# What benchmarks/galore.py compares with, where it is installed
COMPARED = {"apollo_torch"}
# Declared, and imported by others: TRL and transformers, MLflow's SQLite store, Hydra
FOR_OTHERS = {"accelerate", "alembic", "hydra-joblib-launcher", "hydra-submitit-launcher"}

DOCKERFILE = ROOT / "Dockerfile"
KNOWN_TO_DOCKER = {
    *("FROM", "RUN", "ENV", "ARG", "WORKDIR", "COPY", "USER", "VOLUME", "ENTRYPOINT", "CMD")
}


def requirements(*groups: list[str]) -> dict[str, Requirement]:
    """Return the declared packages of lists in pyproject.toml by their names, less our own."""
    each = [Requirement(text) for group in groups for text in group]
    found = {canonicalize_name(one.name): one for one in each}
    return {name: one for name, one in found.items() if name != PROJECT["name"]}


def modules(folder: Path) -> Iterator[str]:
    """Yield the top-level modules that a folder's files import anywhere, but Python's own."""
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            yield from {name.partition(".")[0] for name in names} - sys.stdlib_module_names


@cache
def imported() -> frozenset[str]:
    """Return the packages that our imports come from."""
    homes = packages_distributions()
    others = {*modules(ROOT / "orpo_lab")} - UNDECLARED - {"orpo_lab"}
    found = {home for module in others for home in homes.get(module, [module])}
    return frozenset(canonicalize_name(home) for home in found)


def test_what_is_imported_is_declared() -> None:
    users = {name: group for name, group in EXTRAS.items() if name != "dev"}
    declared = requirements(PROJECT["dependencies"], *users.values())
    assert len(imported()) > 25
    assert imported() - declared.keys() == set()
    assert declared.keys() - imported() == FOR_OTHERS


def test_who_develops_has_every_extra() -> None:
    (ours,) = (one for one in map(Requirement, EXTRAS["dev"]) if one.name == PROJECT["name"])
    assert ours.extras == EXTRAS.keys() - {"dev"}


def test_a_benchmark_finds_what_it_imports_from_any_folder(tmp_path: Path) -> None:
    found = {*modules(ROOT / "benchmarks")} - UNDECLARED - COMPARED
    assert {"methods", "orpo_lab", "tests"} <= found
    look = "print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))"
    # As for a script, Python's path begins with the script's folder
    script = tmp_path / "script.py"
    script.write_text(
        f"import importlib.util, sys\nsys.path[0] = {str(ROOT / 'benchmarks')!r}\n{look}\n"
    )
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, script, *found],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "\n"


def test_what_is_pinned_is_within_what_is_declared() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line[:1] != "#")
    versions: dict[str, str] = {canonicalize_name(name): pins[name] for name in pins}
    for name, one in requirements(PROJECT["dependencies"], *EXTRAS.values()).items():
        assert one.specifier.contains(versions[name]), name


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions, each with its arguments on one line."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line[:1] != "#"]
    joined = "\n".join(lines).replace("\\\n", " ")
    parts = (line.partition(" ") for line in joined.splitlines() if line)
    return [(name, arguments.strip()) for name, _, arguments in parts]


def copied() -> list[str]:
    """Return what the Dockerfile copies out of the clone."""
    return [each for name, given in instructions() if name == "COPY" for each in given.split()[:-1]]


def test_the_dockerfile_is_of_parts_that_exist() -> None:
    given = dict(instructions())  # of an instruction given twice the last
    assert re.fullmatch(r"nvidia/cuda:[\d.]+-base-ubuntu[\d.]+", given["FROM"])
    assert json.loads(given["ENTRYPOINT"]) == [*PROJECT["scripts"]]
    assert given["USER"] not in ("root", "0")
    assert "-c constraints.txt" in given["RUN"]
    assert given.keys() <= KNOWN_TO_DOCKER
    assert all((ROOT / each).exists() for each in copied())
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line[0] == "!"} == {*copied()}


def environment(folder: Path, wheel: Path) -> Path:
    """Make an environment with the wheel, and return its folder of programs.

    The other packages are those of the running environment, so that nothing is downloaded. Its own
    `.pth` files do not hold there, and with them no clone that is installed for editing.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    programs = folder / "bin"
    pip = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "install", "-q"]
    options = ["--no-deps", "--no-index", "--ignore-installed"]
    subprocess.run([*pip, *options, str(wheel)], check=True)
    return programs


def build(source: Path, folder: Path, *options: str) -> Path:
    """Build a wheel in a folder, with what is installed, and return the wheel."""
    command = [sys.executable, "-m", "build", "--no-isolation", *options]
    command += ["--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = folder.glob("*.whl")
    return found


def files(wheel: Path) -> set[str]:
    """Return the files of the package in a wheel."""
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from the source distribution."""
    return build(ROOT, tmp_path_factory.mktemp("dist"))


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_package_and_of_conf(wheel: Path) -> None:
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "orpo_lab", "conf"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    expected = {f"orpo_lab/{file}" if file.startswith("conf/") else file for file in tracked}
    assert files(wheel) == expected


@pytest.mark.slow
def test_what_the_dockerfile_copies_makes_the_wheel(tmp_path: Path, wheel: Path) -> None:
    for name in copied():
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, tmp_path / name)
    assert files(build(tmp_path, tmp_path / "dist", "--wheel")) == files(wheel)


# Steps and rows of a run of seconds
SHORT = (
    "train.max_steps=2",
    "dataset.num_train=16",
    "dataset.num_eval=8",
    "dataset.num_generations=1",
    "tracker=none",
)

# As in a notebook; says the commit of the result, and from where the package and conf/ come
FROM_PYTHON = """
import os, sys
from orpo_lab import api, compose, train
result = train(compose(*sys.argv[1:]), "outputs/from_python")
files = [module.__file__ for name, module in sys.modules.items() if name.startswith("orpo_lab.")]
homes = {os.path.commonpath(files), str(api.CONF.parent)}
print(result.summary["git_commit"], sorted(homes))
"""


@pytest.mark.slow
def test_the_installed_lab_needs_no_clone(tmp_path: Path, wheel: Path) -> None:
    programs = environment(tmp_path / "environment", wheel)
    (packages,) = (tmp_path / "environment").glob("lib/python*/site-packages")
    work = tmp_path / "work"
    (work / "conf" / "beta_schedule").mkdir(parents=True)  # of another program: no options of ours
    (work / "conf" / "config.yaml").write_text("beta: 7\n")
    (work / "conf" / "beta_schedule" / "constant.yaml").write_text("other: true\n")
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def lab(*arguments: str) -> str:
        done = subprocess.run(
            [str(programs / "orpo-lab"), *arguments],
            cwd=work,
            env=variables,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert lab("--version") == f"orpo-lab {orpo_lab.__version__}\n"
    lab("train", "hydra.run.dir=outputs/one", *SHORT)
    lab("sweep", "beta=0.1,0.5", "hydra.sweep.dir=multirun/two", *SHORT)
    lab("compare", "multirun/two", "--out", "compared")
    lab("export", "outputs/one", "--merge", "--to", "exported")
    assert (work / "outputs" / "one" / "final").is_dir()
    assert len(list((work / "multirun" / "two").glob("*/summary.json"))) == 2
    assert (work / "exported" / "model.safetensors").is_file()
    assert "orpo-lab train beta=" in (work / "compared" / "report.html").read_text()
    python = [str(programs / "python"), "-c", FROM_PYTHON, *SHORT]
    done = subprocess.run(python, cwd=work, env=variables, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == [f"None ['{packages}/orpo_lab']"], done.stderr
