"""Forks: jobs that agree up to a step train that part once, and end as whole runs do."""

import errno
import json
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from faults import processes
from orpo_lab import config
from orpo_lab.config.identity import identity
from orpo_lab.errors import UserError
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.stop import Stop, Stopped
from orpo_lab.sweep import forks
from orpo_lab.sweep.folder import Sweep
from orpo_lab.sweep.forks import Forks, Job, num_shared
from orpo_lab.training import checkpoint
from tests.conftest import compose_job, ours
from tests.test_checkpoint import GALORE, assert_same, begun, flip, sealed
from tests.test_tracker import inspect

Launch = Callable[..., subprocess.CompletedProcess[str]]
Load = Callable[..., config.Config]

HOLD = "beta_schedule=hold_then_anneal"
SHORT = (
    "train.max_steps=10",
    "train.batch_size=4",
    "train.logging_steps=3",
    "dataset.num_train=64",
    "dataset.num_eval=16",
    "dataset.num_generations=2",
    "dataset.max_new_tokens=4",
    "tracker=none",
    "beta=0.5",
    "beta_end=0.1",
)
# The betas of a constant run and of one with a jump differ from step 5 of 10 on, those of one that
# anneals from step 6 on, or with ANNEALED from step 7 on
SWEEP_FOLDER = "hydra.sweep.dir=sweep"
SWEEP = ("-m", "beta_schedule=constant,step,hold_then_anneal")
ANNEALED = "beta_schedule.anneal_fraction=0.3"


def job(load: Load, *overrides: str) -> Job:
    return Job.of(load("beta=0.5", "beta_end=0.1", *overrides))


# What jobs share


@pytest.mark.parametrize(
    ("overrides", "shared"),
    [
        (["beta_end=0.3"], 100),  # the same run: a constant schedule does not read the key
        (["beta_schedule=linear"], 1),
        (["beta_schedule=cosine"], 1),
        (["beta_schedule=step"], 50),
        (["beta_schedule=step", "beta_schedule.milestones=[0.25]"], 25),
        ([HOLD, "beta_schedule.anneal_fraction=0.2"], 80),
        ([HOLD, "beta_schedule.anneal_fraction=0.4"], 60),
        ([HOLD, "beta_end=0.5"], 100),
        (["beta=0.4"], 0),
        (["beta=0.4", "beta_end=0.5", "beta_schedule=linear"], 0),
        (["seed=7"], 0),
        (["optimizer.learning_rate=1"], 0),
        (["dataset.num_train=8"], 0),
        (["method=cpo"], 0),
    ],
)
def test_jobs_share_the_steps_before_their_betas_differ(
    load: Load, overrides: list[str], shared: int
) -> None:
    one, other = job(load), job(load, *overrides)
    assert num_shared(one, other, 100) == num_shared(other, one, 100)
    # The float of a step at a milestone may be on either side
    assert abs(num_shared(one, other, 100) - shared) <= 1
    assert num_shared(one, one, 100) == 100


def test_two_that_anneal_share_more_with_each_other_than_with_a_third(load: Load) -> None:
    late, later = (job(load, HOLD, f"beta_schedule.anneal_fraction={f}") for f in (0.4, 0.2))
    ends_elsewhere = job(load, HOLD, "beta_schedule.anneal_fraction=0.4", "beta_end=0.3")
    assert num_shared(late, ends_elsewhere, 101) == 61
    assert num_shared(late, later, 101) == 61
    assert num_shared(later, job(load), 101) == 81


# The record and the folders, without training

TRUNK, STEP, ANNEALS = (["beta_schedule=constant"], ["beta_schedule=step"], [HOLD, ANNEALED])


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    made = Sweep(tmp_path / "sweep")
    made.begin(accept_changes=False)
    return made


def planned(sweep: Sweep, *jobs: list[str]) -> list[config.Config]:
    """Record jobs of ten steps; return their configurations."""
    composed = [compose_job("beta=0.5", "beta_end=0.1", *overrides) for overrides in jobs]
    forks.plan(sweep, composed)
    loaded = [config.load(ours(each)) for each in composed]
    with Forks(sweep).locked() as record:
        record["num_steps"] = {Job.of(each).family: 10 for each in loaded}
    return loaded


def run_of(sweep: Sweep, loaded: config.Config, name: str, state: str) -> RunFolder:
    """The folder of a job's run in a state."""
    (sweep.folder / name).mkdir()
    place = begun(sweep.folder / name, identity(loaded))
    place.set_status(state, config_hash=identity(loaded))
    return place


def begin(sweep: Sweep, loaded: config.Config, place: RunFolder) -> checkpoint.Checkpoint | None:
    made = checkpoint.Made(identity(loaded), "", "")
    own = checkpoint.newest_valid(place, identity(loaded))
    # The time is up as soon as a job waits
    return Forks(sweep).begin(loaded, place, made, own, 10, Stop(max_hours=1e-9))


def test_a_fork_is_left_where_a_job_that_has_still_to_begin_parts(sweep: Sweep) -> None:
    trunk, step, anneals, *_ = planned(
        sweep, TRUNK, STEP, ANNEALS, ["seed=7"], ["train.forks=false"]
    )
    found = Forks(sweep)
    assert found.steps(trunk) == {5, 7}
    assert found.steps(anneals) == {5, 7}
    assert found.steps(step) == {5}
    run_of(sweep, anneals, "2", "finished")
    assert found.steps(trunk) == {5}
    sealed(run_of(sweep, step, "1", "running"), "checkpoint-6", identity(step))
    assert found.steps(trunk) == frozenset()


def test_jobs_that_shall_not_share_and_short_parts_make_no_fork(sweep: Sweep) -> None:
    alone, other = planned(sweep, [*TRUNK, "train.forks=false"], [*STEP, "train.forks=false"])
    assert Forks(sweep).steps(alone) == Forks(sweep).steps(other) == frozenset()
    place = run_of(sweep, alone, "0", "running")
    assert begin(sweep, alone, place) is None
    planned(sweep, ["beta_schedule=adaptive"])
    with Forks(sweep).locked() as record:
        assert record["jobs"] == {}
    linear, _ = planned(sweep, ["beta_schedule=linear"], TRUNK)
    with Forks(sweep).locked() as record:
        record["num_steps"] = dict.fromkeys(record["num_steps"], 11)
    assert Forks(sweep).steps(linear) == frozenset(), "one step of eleven"


def test_a_job_begins_from_the_latest_valid_fork_and_has_all_of_it(
    sweep: Sweep, caplog: pytest.LogCaptureFixture
) -> None:
    trunk, anneals = planned(sweep, TRUNK, ANNEALS)
    source = run_of(sweep, trunk, "0", "failed")
    for step in (2, 5, 7, 8):
        sealed(
            source,
            f"fork-{step}",
            identity(trunk),
            wall_seconds=9,
            reference_seconds=4,
            num_skipped=1,
        )
    flip(source.path / "checkpoints" / "fork-7" / "weights")
    place = run_of(sweep, anneals, "1", "running")
    place.file("metrics.jsonl").unlink()
    start = begin(sweep, anneals, place)
    assert start is not None
    assert start.path == place.path / "checkpoints" / "fork-5"
    assert "fork-7 of 0 rejected: weights is damaged" in caplog.text
    assert place.metrics() == source.metrics()
    # The run would go on from there after a kill, and is known by its own identity
    again = checkpoint.newest_valid(place, identity(anneals))
    assert again == start
    assert again.made.config_hash == identity(anneals)
    spent = checkpoint.Spent(num_skipped=1, num_shared=5, reference_seconds=4)
    assert again.spent == spent, "seconds of shared steps count where they were spent"


@pytest.mark.parametrize(("own", "begun_from"), [(3, "fork-7"), (8, "checkpoint-8")])
def test_a_job_that_goes_on_takes_a_fork_only_if_it_is_later_than_its_own_checkpoint(
    sweep: Sweep, own: int, begun_from: str
) -> None:
    trunk, anneals = planned(sweep, TRUNK, ANNEALS)
    sealed(run_of(sweep, trunk, "0", "finished"), "fork-7", identity(trunk))
    place = run_of(sweep, anneals, "1", "running")
    sealed(place, f"checkpoint-{own}", identity(anneals))
    start = begin(sweep, anneals, place)
    assert start is not None
    assert start.path == place.path / "checkpoints" / begun_from


def test_a_fork_made_from_other_data_is_not_taken(sweep: Sweep) -> None:
    trunk, anneals = planned(sweep, TRUNK, ANNEALS)
    sealed(run_of(sweep, trunk, "0", "finished"), "fork-7", identity(trunk))
    place = run_of(sweep, anneals, "1", "running")
    made = checkpoint.Made(identity(anneals), "other pairs", "")
    assert Forks(sweep).begin(anneals, place, made, None, 10, Stop()) is None
    assert checkpoint.forks(place) == []


def test_a_full_disk_ends_a_job_that_begins_from_a_fork_and_rejects_no_fork(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trunk, anneals = planned(sweep, TRUNK, ANNEALS)
    sealed(run_of(sweep, trunk, "0", "finished"), "fork-7", identity(trunk))
    place = run_of(sweep, anneals, "1", "running")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "make_link", full)
    with pytest.raises(UserError, match=r"cannot be written .*make room"):
        begin(sweep, anneals, place)
    assert "rejected" not in caplog.text
    assert checkpoint.forks(place) == []


def test_a_fork_stays_while_another_job_is_still_copying_it(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk, anneals = planned(sweep, TRUNK, ANNEALS)
    sealed(run_of(sweep, trunk, "0", "finished"), "fork-7", identity(trunk))
    place = run_of(sweep, anneals, "1", "running")

    def slow(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes())
        Forks(sweep).release()  # what another job does at its end

    monkeypatch.setattr(checkpoint, "make_link", slow)
    assert begin(sweep, anneals, place) is not None


def test_a_fork_stays_until_its_run_is_complete_and_nobody_has_still_to_begin(sweep: Sweep) -> None:
    trunk, step, anneals = planned(sweep, TRUNK, STEP, ANNEALS)
    source = run_of(sweep, trunk, "0", "running")
    for name in ("fork-5", "fork-7"):
        sealed(source, name, identity(trunk))

    def kept() -> list[int]:
        Forks(sweep).release()
        return [checkpoint.step_of(path) for path in checkpoint.forks(source)]

    assert kept() == [5, 7]
    begin(sweep, anneals, late := run_of(sweep, anneals, "2", "running"))
    assert kept() == [5, 7], "a killed run would begin from them"
    source.set_status("finished")
    assert kept() == [5]
    assert [path.name for path in checkpoint.forks(late)] == ["fork-7"]
    run_of(sweep, step, "1", "failed")
    assert kept() == [5]
    RunFolder(sweep.folder / "1").set_status("finished")
    assert kept() == []
    late.set_status("finished")
    Forks(sweep).release()
    assert checkpoint.forks(late) == []


def test_a_job_waits_for_one_that_trains_what_both_share(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("its time is up"))
    trunk, anneals = planned(sweep, TRUNK, ANNEALS)
    source, place = run_of(sweep, trunk, "0", "running"), run_of(sweep, anneals, "1", "running")
    with source.held():
        assert begin(sweep, trunk, source) is None
        (source.path / "checkpoints" / "fork-7").mkdir(parents=True)  # its files are being written
        with pytest.raises(Stopped):
            begin(sweep, anneals, place)
        sealed(source, "fork-7", identity(trunk))
        start = begin(sweep, anneals, place)
        assert start is not None
        assert start.step == 7


def test_a_job_does_not_wait_for_one_that_was_killed(sweep: Sweep) -> None:
    trunk, anneals = planned(sweep, TRUNK, ANNEALS)
    assert begin(sweep, trunk, run_of(sweep, trunk, "0", "running")) is None
    assert begin(sweep, anneals, run_of(sweep, anneals, "1", "running")) is None


# Real sweeps


def runs(folder: Path) -> dict[str, Path]:
    """The run folders of a sweep by their schedules."""
    found = (job.path for job in Sweep(folder).jobs())
    return {path.name.rpartition("=")[2]: path for path in found}


def shared_steps(folder: Path) -> dict[str, int]:
    read = {
        name: json.loads((path / "summary.json").read_text()) for name, path in runs(folder).items()
    }
    return {name: summary["train"]["shared_steps"] for name, summary in read.items()}


def assert_same_sweeps(folder: Path, other: Path) -> None:
    for name, path in runs(folder).items():
        assert_same(path, runs(other)[name])
        assert not list((path / "checkpoints").glob("*"))


def has_taken(step: int, name: str, folder: Path) -> bool:
    files = list(folder.glob(f"*={name}/metrics.jsonl"))
    return any(f'{{"step": {step},' in file.read_text() for file in files)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["optimizer=qlora optimizer.dropout=0.1", GALORE])
def test_forked_runs_equal_whole_runs_bit_for_bit_and_when_killed_in_trunk_and_branch(
    launch: Launch, tmp_path: Path, optimizer: str
) -> None:
    jobs = (*SWEEP, *optimizer.split(), *SHORT)
    launch(*jobs, "hydra.sweep.dir=whole", "train.forks=false")
    whole = tmp_path / "whole"
    assert set(shared_steps(whole).values()) == {0}

    launch(*jobs, "hydra.sweep.dir=forked")
    forked = tmp_path / "forked"
    expected = {"constant": 0, "step": 5, "hold_then_anneal": 6}
    assert shared_steps(forked) == expected
    assert_same_sweeps(forked, whole)

    for name, step in (("constant", 6), ("hold_then_anneal", 9)):
        said = tmp_path / f"said-{name}"
        running = processes.start(said, [*jobs, "hydra.sweep.dir=killed"], at=tmp_path)
        running.wait_for(partial(has_taken, step, name, tmp_path / "killed"))
        running.signal(signal.SIGKILL)
        assert running.wait().code == -signal.SIGKILL
    launch(*jobs, "hydra.sweep.dir=killed")
    killed = tmp_path / "killed"
    assert shared_steps(killed) == expected
    assert_same_sweeps(killed, whole)


@pytest.mark.slow
@pytest.mark.long
def test_jobs_in_processes_of_their_own_share_their_steps(launch: Launch, tmp_path: Path) -> None:
    jobs = (*SWEEP, "optimizer=lora", *SHORT)
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    launch(*jobs, *launcher, SWEEP_FOLDER, fresh=True)
    assert sum(shared_steps(tmp_path / "sweep").values()) == 11
    launch(*jobs, "hydra.sweep.dir=whole", "train.forks=false")
    assert_same_sweeps(tmp_path / "sweep", tmp_path / "whole")


@pytest.mark.slow
def test_wandb_shows_a_branch_whole(launch: Launch, tmp_path: Path) -> None:
    tracked = [text for text in SHORT if text != "tracker=none"]
    schedules = "beta_schedule=constant,hold_then_anneal"
    launch("-m", schedules, "optimizer=lora", *tracked, "tracker.mode=offline", SWEEP_FOLDER)
    found = runs(tmp_path / "sweep")
    for name, steps in (("constant", 0), ("hold_then_anneal", 6)):
        assert shared_steps(tmp_path / "sweep")[name] == steps
        records = map(json.loads, inspect(found[name], "--json").splitlines())
        lines = [record["history"]["item"] for record in records if "history" in record]
        logged = [line["_step"] for line in lines if "loss" in line]
        assert logged == [1, 3, 6, 9, 10]
