"""Nothing that a command line or a config file says is called, imported or unpickled."""

import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.utils import create_config_search_path
from hydra.core.utils import setup_globals
from hydra.types import RunMode

from orpo_lab import config
from orpo_lab.errors import UserError
from orpo_lab.guard import SUBDIR, CheckedLoader
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
        ("+hydra.job.env_set.GIT_DIR=x", "hydra.job.env_set may name programs"),
        ("hydra.output_subdir=.hydra", "hydra.output_subdir would write"),
        ("hydra/job_logging=default", "hydra.job_logging may name classes"),
        ("hydra.sweep.subdir=../x", "may lead out of the sweep's folder"),
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
