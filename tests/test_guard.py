"""Nothing that a command line or a config file says is called, imported or unpickled."""

import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra._internal.utils import create_config_search_path
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from orpo_lab import config
from orpo_lab.config import guard
from orpo_lab.config.guard import SUBDIR, CheckedLoader
from orpo_lab.errors import UserError
from tests.conftest import ROOT
from tests.test_launch import refused

Launch = Callable[..., subprocess.CompletedProcess[str]]


class Bomb:
    """What a pickle can do: leave a file where it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.marker), "w"))


CALLS = "{_target_: shutil.copy, src: conf/a.txt, dst: marker}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([f"+hydra.callbacks.x={CALLS}"], "hydra.callbacks names shutil.copy"),
        (["--config-dir", "conf", "experiment=callback"], "hydra.callbacks names shutil.copy"),
        (
            ["-m", "--config-dir", "conf", "experiment=null_, callback"],
            "hydra.callbacks names shutil.copy",
        ),
        (
            [
                "-m",
                "hydra/launcher=submitit_slurm",
                f"+hydra.launcher.additional_parameters.x={CALLS}",
            ],
            "hydra.launcher names shutil.copy",
        ),
        (["-m", "hydra.sweeper.max_batch_size=0"], "hydra.sweeper.max_batch_size=0 must be"),
        (["--config-dir", "conf", "experiment=logging"], "hydra.hydra_logging may name classes"),
        (["--config-dir", "conf", "experiment=tag"], "could not determine a constructor"),
        (["--config-dir", "conf", "--config-name", "other"], "does not begin with the lab's"),
        (["hydra.searchpath=[pkg://package]"], "imports a Python package"),
        (["--config-path", "pkg://package"], "imports a Python package"),
        (["--experimental-rerun", "conf/run.pickle"], "loads a pickle"),
    ],
    ids=lambda value: value[-1].split("=")[0] if isinstance(value, list) else "",
)
def test_what_a_command_line_or_a_file_names_is_not_called(
    launch: Launch, tmp_path: Path, arguments: list[str], message: str
) -> None:
    experiments = tmp_path / "conf" / "experiment"
    experiments.mkdir(parents=True)
    (tmp_path / "conf" / "a.txt").write_text("a")
    (tmp_path / "conf" / "other.yaml").write_text(
        f"beta: 0.2\nhydra: {{callbacks: {{x: {CALLS}}}}}\n"
    )
    head = "# @package _global_\n"
    (experiments / "null_.yaml").write_text(f"{head}beta: 0.2\n")
    (experiments / "callback.yaml").write_text(f"{head}hydra: {{callbacks: {{x: {CALLS}}}}}\n")
    (experiments / "logging.yaml").write_text(
        f"{head}hydra: {{hydra_logging: {{version: 1, root: {{handlers: [x]}}, handlers: "
        "{x: {class: logging.FileHandler, filename: marker}}}}\n"
    )
    (experiments / "tag.yaml").write_text(
        f'{head}name: !!python/object/apply:os.system ["touch marker"]\n'
    )
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("open('marker', 'w')\n")
    (tmp_path / "conf" / "run.pickle").write_bytes(pickle.dumps(Bomb(tmp_path / "marker")))
    path = {"PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}{os.pathsep}{tmp_path}"}
    assert message in refused(launch(*arguments, expect=1, env=path, fresh=True))
    assert not (tmp_path / "marker").exists()


def compose(*overrides: str) -> None:
    """Compose as launch.py does, Hydra's own settings included."""
    config.register()
    setup_globals()
    loader = CheckedLoader(create_config_search_path(str(ROOT / "conf")))
    loader.load_configuration("config", list(overrides), RunMode.MULTIRUN)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("experiment=../experiment/phi2", "leads out of the folder of options"),
        ("tracker=[wandb,../tracker/mlflow]", "leads out of the folder of options"),
        ("+hydra.job.env_set.GIT_DIR=x", "hydra.job.env_set may name programs"),
        ("hydra.output_subdir=.hydra", "hydra.output_subdir would write"),
        ("hydra/job_logging=default", "hydra.job_logging may name classes"),
        ("hydra.job.chdir=true", "hydra.job.chdir=true would look for every path"),
        ("dataset=faults/../embedded", "leads out of the folder of options"),
        ("+hydra.callbacks.x=[{_target_: subprocess.run}]", "hydra.callbacks names subprocess.run"),
        ("hydra.launcher._target_=orpo_lab.sweep.start.Start", "hydra.launcher names orpo_lab"),
        ("hydra.sweep.subdir=../x", "may lead out of the sweep's folder"),
        ("hydra.sweep.subdir=job-1/../../x", "may lead out of the sweep's folder"),
        ("hydra.sweep.subdir=${model.path}", "may lead out of the sweep's folder"),
        ("hydra.sweeper._target_=subprocess.run", "hydra.sweeper names subprocess.run"),
        (
            "+hydra.callbacks.x='${oc.decode:${oc.env:PLANTED}}'",
            "hydra.callbacks names subprocess.run",
        ),
    ],
)
def test_settings_of_hydra_that_lead_elsewhere_are_refused(
    monkeypatch: pytest.MonkeyPatch, override: str, message: str
) -> None:
    monkeypatch.setenv("PLANTED", "{_target_: subprocess.run}")
    with pytest.raises(UserError, match=message):
        compose(override)


@pytest.mark.parametrize(
    "override",
    [
        "hydra.job.env_copy=[PATH]",
        "hydra/launcher=joblib",
        "hydra/launcher=submitit_local",
        "hydra/launcher=submitit_slurm",
        "hydra/launcher=ray",
        "hydra.sweep.subdir=job-${hydra.job.num}",
        "hydra.sweep.subdir='${slug:${hydra.job.num}-${name}}'",
        "experiment=phi2",
    ],
)
def test_what_users_need_of_hydra_is_taken(override: str) -> None:
    compose(override)


@pytest.mark.parametrize("subdir", ["..", ".", "", "a/b", "${slug:a}/../${slug:b}", "${slug:a}/.."])
def test_a_jobs_folder_is_one_name(subdir: str) -> None:
    assert not SUBDIR.fullmatch(subdir)


def test_hydras_own_help_needs_no_configuration_of_ours() -> None:
    setup_globals()
    loader = CheckedLoader(create_config_search_path(str(ROOT / "conf")))
    assert loader.load_configuration(None, [], RunMode.RUN).hydra


def test_the_file_that_a_run_begins_with_may_not_import_a_package_either(tmp_path: Path) -> None:
    setup_globals()
    (tmp_path / "own.yaml").write_text("hydra: {searchpath: ['file://here', 'pkg://package']}\n")
    loader = CheckedLoader(create_config_search_path(str(tmp_path)))
    with pytest.raises(UserError, match=r"hydra\.searchpath=.* imports a Python package"):
        loader.load_configuration("own", [], RunMode.RUN)


@pytest.mark.parametrize(
    ("loaded", "value"),
    [
        ({"model": {"revision": 1.1}}, "1.1"),
        ({"dataset": {"languages": ["de", False]}}, "False"),
        ({"tracker": {"tags": ["a", 7]}}, "7"),
    ],
)
def test_what_yaml_took_for_a_number_or_a_truth_is_no_text(
    loaded: dict[str, Any], value: str
) -> None:
    with pytest.raises(UserError, match=f"is text, and {value} without quotes"):
        guard._check_texts("own.yaml", OmegaConf.create(loaded))
    fine = {"model": {"revision": "1.1"}, "train": {"max_steps": 3}, "tracker": {"tags": ["7"]}}
    guard._check_texts("own.yaml", OmegaConf.create(fine))


TOKEN = "hf_" + "aB3" * 11


def test_a_sweep_saves_no_secret(tmp_path: Path) -> None:
    typed = OmegaConf.create({"overrides": [f"name={TOKEN}", "beta=0.1"]})
    guard.RedactingOmegaConf.save(typed, tmp_path / "multirun.yaml")
    assert (tmp_path / "multirun.yaml").read_text() == "overrides:\n- name=***\n- beta=0.1\n"


def test_combinations_that_cannot_be_are_left_out_and_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config.register()
    setup_globals()
    loader = CheckedLoader(create_config_search_path(str(ROOT / "conf")))
    composed = loader.load_configuration("config", [], RunMode.MULTIRUN)
    sweeper = SimpleNamespace(config=composed, hydra_context=SimpleNamespace(config_loader=loader))
    fits = ["optimizer=qlora", "optimizer.r=8", "beta=0.1"]
    # What all jobs have does not tell one from another
    not_this = ["optimizer=galore", f"name={TOKEN}", "optimizer.r=8", "beta=0.1"]
    batch = [[*fits], [*not_this]]
    composed_jobs, left_out = guard.leave_out_what_cannot_be(sweeper, batch)
    assert batch == [fits]
    assert [job.beta for job in composed_jobs] == [0.1]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: optimizer=galore name=***: ")
    assert left_out == [line]
    with pytest.raises(HydraException):
        guard.leave_out_what_cannot_be(sweeper, [not_this])
    with pytest.raises(UserError, match="this sweep has no job"):
        guard.leave_out_what_cannot_be(sweeper, [])
