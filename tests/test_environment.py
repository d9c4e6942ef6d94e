"""Variables that would make another run, and one GPU for each process."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from orpo_lab import config, environment, run
from orpo_lab.errors import UserError

Load = Callable[..., config.Config]
Launch = Callable[..., subprocess.CompletedProcess[str]]
# What torchrun tells every process alike
TORCHRUN = {"WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(environment, "_claims", [])


@pytest.mark.parametrize(
    "variable",
    [
        "ACCELERATE_MIXED_PRECISION=bf16",
        "ACCELERATE_USE_FSDP=true",
        "NVIDIA_TF32_OVERRIDE=1",
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1",
        "ONEDNN_DEFAULT_FPMATH_MODE=BF16",
        "USE_HUB_KERNELS=YES",
    ],
)
def test_a_variable_that_changes_a_run_is_taken_away_and_said(variable: str) -> None:
    name, value = variable.split("=")
    os.environ[name] = value
    (said,) = environment.settle()
    assert said.startswith(f"{variable} is not read: it would change ")
    assert os.environ.get(name) == environment.FIXED.get(name)
    assert environment.settle() == [], "said once"


def test_what_accelerate_writes_unasked_is_taken_away_without_a_word() -> None:
    os.environ.update(
        ACCELERATE_MIXED_PRECISION="no",
        ACCELERATE_DYNAMO_USE_DYNAMIC="False",
        ACCELERATE_DYNAMO_MODE="default",
    )
    assert environment.settle() == []
    assert not [name for name in os.environ if name.startswith("ACCELERATE_")]


def test_what_says_where_things_are_stays() -> None:
    os.environ.update(HF_HOME="/there", HF_HUB_OFFLINE="1", PYTORCH_ALLOC_CONF="backend:native")
    before = dict(os.environ)
    assert environment.settle() == []
    assert before.items() <= os.environ.items()


@pytest.mark.parametrize("variable", ["WORLD_SIZE=", "WORLD_SIZE=1", "LOCAL_RANK=0", "RANK=0"])
def test_one_process_of_a_launcher_is_a_run(variable: str) -> None:
    name, value = variable.split("=")
    os.environ[name] = value
    assert environment.settle() == []
    assert name not in os.environ


def test_a_process_knows_which_of_several_it_is_until_they_have_met() -> None:
    os.environ.update(TORCHRUN, RANK="3", LOCAL_RANK="1")
    assert environment.settle() == []
    assert environment.process() == environment.Process(index=3, num=4, on_machine=1)
    environment.forget_processes()
    assert environment.process() == environment.Process()
    assert not {"RANK", "LOCAL_RANK", *TORCHRUN} & os.environ.keys()


@pytest.mark.parametrize(
    ("name", "value"),
    [("WORLD_SIZE", "two"), ("RANK", ""), ("RANK", "4"), ("LOCAL_RANK", "x"), ("MASTER_ADDR", "")],
)
def test_half_of_what_torchrun_says_is_refused(name: str, value: str) -> None:
    os.environ.update(TORCHRUN, RANK="3", LOCAL_RANK="1")
    os.environ[name] = value
    size = os.environ["WORLD_SIZE"]
    with pytest.raises(UserError, match=f"WORLD_SIZE={size} asks for several .* unset WORLD_SIZE"):
        environment.settle()


def test_a_number_of_processes_that_shells_leave_behind_is_refused(launch: Launch) -> None:
    done = launch("hydra.run.dir=run", env={"WORLD_SIZE": "2"}, expect=1)
    assert "start the run by torchrun, or unset WORLD_SIZE" in done.stderr


def test_a_sweep_is_not_started_by_torchrun(launch: Launch) -> None:
    done = launch("-m", "seed=1,2", env={**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0"}, expect=1)
    assert "start it with python launch.py -m, not with torchrun" in done.stderr


def test_processes_of_a_machine_take_one_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    os.environ.update(TORCHRUN, RANK="3", LOCAL_RANK="1")
    for visible, taken in (("4,6", "6"), (None, "1")):
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        environment.use_one_device(None)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == taken
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    with pytest.raises(UserError, match="process 2 of its machine, and CUDA_VISIBLE_DEVICES names"):
        environment.use_one_device(None)


def test_processes_side_by_side_claim_one_gpu_each(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    claimed = []
    kept = []
    for _ in range(5):  # a process each: its claims are not the others'
        monkeypatch.setattr(environment, "_claims", [])
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
        environment.use_one_device(tmp_path)
        kept.append(environment._claims)
        environment.use_one_device(tmp_path)  # its next job
        claimed.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert claimed == ["4", "5", "6", "4", "5"]
    kept[1][0].release()
    monkeypatch.setattr(environment, "_claims", [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    environment.use_one_device(tmp_path)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5", "of a process that has ended"


def test_a_single_run_takes_the_first_gpu_and_none_stays_none() -> None:
    for visible, seen in (("4,5", "4"), ("", "")):
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
        environment.use_one_device(None)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


@pytest.mark.slow
def test_a_run_is_what_its_configuration_says_whatever_accelerate_is_told(
    load: Load, tmp_path: Path
) -> None:
    small = ["optimizer=adamw", "tracker=none", "dataset.num_train=16", "dataset.num_eval=4"]
    small += ["dataset.num_generations=0", "train.batch_size=8", "train.max_steps=2"]
    ends = []
    for precision in (None, "bf16"):
        if precision:
            os.environ["ACCELERATE_MIXED_PRECISION"] = precision
        folder = tmp_path / str(precision)
        run.train(load(*small), folder, choices={}, overrides=[])
        ends.append((folder / "final" / "model.safetensors").read_bytes())
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    ("told", "busy_percent", "expected"),
    [
        ({}, 100.0, "1000"),
        ({}, 60.0, "1000"),
        ({}, 20.0, None),
        ({"GOMP_SPINCOUNT": "7"}, 100.0, "7"),
        ({"OMP_WAIT_POLICY": "passive"}, 100.0, None),
    ],
)
def test_threads_wait_shortly_for_each_other_where_cores_are_busy_unless_told_otherwise(
    told: dict[str, str], busy_percent: float, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "cpu_percent", lambda seconds: busy_percent)
    monkeypatch.setattr(psutil, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        os.environ.pop(name, None)
    os.environ.update(told)
    # With torch libgomp is loaded, which looks at its variables once
    environment.settle()
    assert os.environ.get("GOMP_SPINCOUNT") == told.get("GOMP_SPINCOUNT")
    monkeypatch.delitem(sys.modules, "torch")
    assert environment.settle() == []
    assert os.environ.get("GOMP_SPINCOUNT") == expected
