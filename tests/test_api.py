"""The lab from Python, as a notebook uses it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orpo_lab import api, compose, train
from orpo_lab.config.folder import CONF
from orpo_lab.errors import UserError
from orpo_lab.records.run_folder import RunFolder

SMALL = (
    "tracker=none",
    "optimizer=lora",
    "train.max_steps=2",
    "dataset.num_train=32",
    "dataset.num_eval=8",
    "dataset.num_generations=2",
)


def test_an_experiment_is_what_the_command_line_would_run() -> None:
    experiment = compose("optimizer=galore", "beta=0.2", "train.num_epochs=2", "name=1.10")
    assert experiment.config.beta == 0.2
    assert experiment.config.train.max_steps is None
    assert experiment.config.name == "1.10"
    assert experiment.choices["optimizer"] == "galore"
    assert experiment.choices["quantization"] == "none"
    assert experiment.overrides == [
        "optimizer=galore",
        "beta=0.2",
        "train.num_epochs=2",
        "name=1.10",
    ]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("learning_rate=1e-3", "Did you mean 'optimizer.learning_rate'"),
        ("optimizer=glore", "Did you mean 'galore'"),
        ("beta=-1", "beta=-1"),
        ("train.max_steps=many", "train.max_steps"),
        ("+train.typo=1", "unknown key: train.typo"),
        ("hydra.run.dir=x", "hydra.run.dir=x is for the command line"),
        ("objective=paper", "method=orpo_paper"),
    ],
)
def test_what_the_command_line_refuses_is_refused(override: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        compose(override)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_the_command_line_refuses_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(CONF, tmp_path / "conf")
    text = "# @package _global_\nmodel:\n  revision: 1.10\n"
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(text)
    monkeypatch.setattr(api, "CONF", tmp_path / "conf")
    with pytest.raises(UserError, match=r"/experiment/mine\.yaml: model\.revision is text, and 1"):
        compose("experiment=mine")


def test_recipes_of_ones_own_are_read_from_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "it's my, own"
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "mine.yaml").write_text("# @package _global_\nbeta: 0.7\n")
    experiment = compose("experiment=mine", config_dir=folder)
    assert experiment.config.beta == 0.7
    assert experiment.overrides == [f"--config-dir={folder}", "experiment=mine"]
    with pytest.raises(UserError, match="config_dir=nowhere: there is no such folder"):
        compose(config_dir="nowhere")


def test_a_run_gives_its_result_and_leaves_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = train(compose(*SMALL), folder)
    assert result.folder == folder
    assert not result.missing
    assert result.summary == json.loads((folder / "summary.json").read_text())
    assert result.summary["train"]["steps"] == 2
    choices = (folder / "choices.yaml").read_text()
    assert "optimizer: lora" in choices
    assert "train.max_steps=2" in choices
    assert RunFolder(folder).status()["state"] == "finished"
    with pytest.raises(UserError, match="holds a run already"):
        train(compose(*SMALL), folder)


def test_a_folder_that_another_process_runs_in_is_refused(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run").held() as is_free:
        assert is_free
        with pytest.raises(UserError, match="another process is running in"):
            train(compose(*SMALL), tmp_path / "run")


def test_the_package_imports_nothing_by_itself() -> None:
    code = "import sys, orpo_lab; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "hydra", "orpo_lab.api"} & set(done.stdout.split())
