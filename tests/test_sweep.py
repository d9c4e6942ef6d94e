"""Sweeps on the real command line: what runs, what does not run again, how failures are told."""

import gc
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from faults import processes
from orpo_lab import config
from orpo_lab.config.identity import identity
from orpo_lab.config.tracker import NoTracker
from orpo_lab.errors import UserError
from orpo_lab.records.run_folder import LOCK, RunFolder
from orpo_lab.sweep.folder import CACHE, Sweep, fresh_folder
from orpo_lab.sweep.jobs import Jobs
from orpo_lab.training import checkpoint
from tests.conftest import ROOT, each_launcher

Launch = Callable[..., subprocess.CompletedProcess[str]]
Load = Callable[..., config.Config]
SHORT = ("train.max_steps=2", "dataset.num_eval=16", "dataset.num_generations=4", "tracker=none")
SWEEP = "hydra.sweep.dir=sweep"


def states(folder: Path) -> dict[str, str]:
    return {job.path.name: job.status()["state"] for job in Sweep(folder).jobs()}


def checksums(folder: Path) -> dict[str, str]:
    # W&B's service, a process of its own, notes in its log that the killed one is gone
    found = (path for path in sorted(folder.rglob("*")) if path.name != "debug-core.log")
    files = (path for path in found if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# The folder


def test_two_starts_in_the_same_second_have_two_folders(tmp_path: Path) -> None:
    folders = [fresh_folder(tmp_path / "multirun" / "now") for _ in range(3)]
    assert [folder.name for folder in folders] == ["now", "now-2", "now-3"]


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    made = Sweep(tmp_path / "sweep")
    made.begin(accept_changes=False)
    return made


def test_a_job_whose_configuration_is_there_already_has_nothing_to_run(
    load: Load, sweep: Sweep
) -> None:
    for number, expected in ((0, "0"), (1, None)):
        folder = sweep.folder / str(number)
        folder.mkdir()
        with sweep.claim(load(), folder) as place:
            assert (place and place.path.name) == expected
            if place:
                place.set_status("finished", exit_code=0)
        assert folder.exists() == (expected is not None)


def test_another_configuration_of_the_same_name_gets_a_folder_of_its_own(
    load: Load, sweep: Sweep
) -> None:
    folder = sweep.folder / "0-beta=0.1"
    folder.mkdir()
    for steps, name in ((10, "0-beta=0.1"), (20, "0-beta=0.1-2")):
        with sweep.claim(load(f"train.max_steps={steps}"), folder) as place:
            assert place is not None
            assert place.path.name == name
            place.write("made.txt", str(steps))
            place.set_status("finished" if steps == 20 else "failed")
    assert (folder / "made.txt").read_text() == "10"


def test_a_job_leaves_a_folder_with_a_users_files_alone(load: Load, sweep: Sweep) -> None:
    folder = sweep.folder / "0-beta=0.1"
    folder.mkdir()
    (folder / "thesis.tex").write_text("a user's")
    with sweep.claim(load(), folder) as place:
        assert place is not None
        assert place.path.name == "0-beta=0.1-2"
    assert [file.name for file in folder.iterdir()] == ["thesis.tex"]


def test_a_job_that_runs_elsewhere_is_not_run_beside_it(load: Load, sweep: Sweep) -> None:
    for number in (0, 1):
        (sweep.folder / str(number)).mkdir()
    with sweep.claim(load(), sweep.folder / "0") as place:
        assert place is not None
        with sweep.claim(load(), sweep.folder / "1") as other:
            assert other is None


def test_a_failed_job_runs_again_when_the_sweep_is_started_again_and_only_then(
    load: Load, sweep: Sweep
) -> None:
    folder = sweep.folder / "0"
    folder.mkdir()

    def try_again() -> bool:
        with sweep.claim(load(), folder) as place:
            if place is not None:
                place.write("half.txt", "a half of a run")
                place.set_status("failed", "no luck", exit_code=1)
            return place is not None

    assert try_again()
    assert not try_again()
    # Whatever a file's time says: another machine's clock, a copy
    os.utime(folder / "status.json", (2**31, 2**31))
    sweep.begin(accept_changes=False)
    assert try_again()
    os.utime(folder / "status.json", (0, 0))
    assert not try_again()


def test_a_run_that_slurm_has_stopped_goes_on_when_slurm_starts_its_job_again(
    load: Load, sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = RunFolder(sweep.folder / "0")
    for state, restarts, expected in (
        ("stopped", None, False),
        ("stopped", "0", False),
        ("stopped", "1", True),
        ("failed", "1", False),
    ):
        config_hash = identity(load())
        place.set_status(state, config_hash=config_hash, sweep_start=1, exit_code=75)
        if restarts:
            monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        with sweep.claim(load(), place.path) as found:
            assert (found is not None) == expected, (state, restarts)


def test_a_job_that_was_killed_runs_again_and_so_does_one_without_all_its_results(
    load: Load, sweep: Sweep
) -> None:
    folder = sweep.folder / "0"
    folder.mkdir()
    with sweep.claim(load(), folder) as place:
        assert place is not None
        assert place.status()["state"] == "running", "as a process leaves it that is killed"
    for is_tried in (True, False):
        with sweep.claim(load(), folder) as place:
            assert (place is not None) == is_tried
            if place is not None:
                place.set_status("finished", exit_code=0, missing={"samples.md": "no room"})
    sweep.begin(accept_changes=False)
    with sweep.claim(load(), folder) as place:
        assert place is not None


def test_a_sweep_begins_without_what_a_killed_one_has_shared_and_keeps_its_start(
    sweep: Sweep,
) -> None:
    before = json.loads((sweep.folder / "sweep.json").read_text())
    started = "2024-02-29T12:00:00+00:00"
    (sweep.folder / "sweep.json").write_text(json.dumps(before | {"started": started}))
    (sweep.folder / CACHE).mkdir(exist_ok=True)
    (sweep.folder / CACHE / "data-1").write_text("half")
    sweep.begin(accept_changes=False)
    assert not (sweep.folder / CACHE).exists()
    assert sweep.started() == started
    assert json.loads((sweep.folder / "sweep.json").read_text())["starts"] == 2


def test_every_job_that_has_not_finished_fails_the_sweep(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("finished", "failed", "stopped", "running"):
        place = RunFolder(sweep.folder / name)
        place.set_status(name, "" if name == "finished" else f"why it has {name}")
    figures = {"preference_accuracy": 0.75, "chosen_nll": 1.5}
    before = dict.fromkeys(figures, 0.0)
    summary = {"before": before, "after": figures}
    RunFolder(sweep.folder / "finished").write_json("summary.json", summary)
    assert sorted(sweep.close(NoTracker())) == ["failed", "running", "stopped"]
    said = capsys.readouterr().out
    assert "finished  finished  preference_accuracy 0.750  chosen_nll 1.500\n" in said
    assert "stopped   stopped   why it has stopped\n" in said


def test_a_job_that_came_to_no_folder_fails_the_sweep(sweep: Sweep) -> None:
    jobs = Jobs(sweep=sweep, tracker=NoTracker())
    assert jobs.close() == 0
    jobs.fail("error: job 1: its machine is gone")
    assert jobs.close() == 1


@pytest.mark.parametrize("name", [".cache/pip/wheel", "report.html", "sweep.json"])
def test_a_folder_that_holds_files_and_no_sweep_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text('{"of": "mine"}')
    before = checksums(tmp_path)
    with pytest.raises(UserError, match="is not empty and holds no sweep"):
        Sweep(tmp_path).begin(accept_changes=True)
    assert checksums(tmp_path) == before


def test_a_job_that_fails_before_it_is_a_run_has_failed(load: Load, sweep: Sweep) -> None:
    folder = sweep.folder / "0"
    folder.mkdir()
    with pytest.raises(ImportError), sweep.claim(load(), folder):
        raise ImportError("no torch")
    assert RunFolder(folder).status()["state"] == "failed"
    assert not (folder / LOCK).exists()


def test_a_folder_made_by_other_code_or_data_is_refused_unless_told(sweep: Sweep) -> None:
    record = json.loads((sweep.folder / "sweep.json").read_text())
    sweep.check_data("data", {"train": "a"}, accept_changes=False)
    sweep.check_data("data", {"train": "a"}, accept_changes=False)
    with pytest.raises(UserError, match=r"the data are not those .* accept_changes=true"):
        sweep.check_data("data", {"train": "b"}, accept_changes=False)
    sweep.check_data("data", {"train": "b"}, accept_changes=True)
    (sweep.folder / "sweep.json").write_text(json.dumps({**record, "code": "other"}))
    with pytest.raises(UserError, match=r"made by other code .* accept_changes=true"):
        sweep.begin(accept_changes=False)
    sweep.begin(accept_changes=True)
    sweep.begin(accept_changes=False)


def test_a_sweep_that_other_code_made_is_refused_before_any_job(
    launch: Launch, tmp_path: Path
) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text('{"code": "other", "data": {}}')
    done = launch("-m", "beta=0.1,0.2", SWEEP, *SHORT, expect=1)
    assert re.fullmatch("error: sweep was made by other code.*\n", done.stderr)
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["sweep.json"]


NO_JOB = {"seed=range(0)": "this sweep has no job", "optimizer.rank=1,2": "optimizer.rank is a key"}


@pytest.mark.parametrize(("swept", "message"), NO_JOB.items())
def test_a_sweep_without_a_job_leaves_no_folder_and_an_earlier_sweep_as_it_was(
    launch: Launch, tmp_path: Path, swept: str, message: str
) -> None:
    assert message in launch("-m", swept, SWEEP, *SHORT, expect=1).stderr
    assert not (tmp_path / "sweep").exists()
    Sweep(tmp_path / "sweep").begin(accept_changes=False)
    launch("-m", swept, SWEEP, *SHORT, expect=1)
    assert (tmp_path / "sweep" / "sweep.json").exists()


def test_a_sweep_for_slurm_is_refused_where_there_is_none(launch: Launch, tmp_path: Path) -> None:
    done = launch("-m", "beta=0.1,0.2", "hydra/launcher=submitit_slurm", SWEEP, *SHORT, expect=1)
    assert re.fullmatch(r"error: .*needs Slurm's srun.*submitit_local\n", done.stderr)
    assert not (tmp_path / "sweep").exists()


def test_jobs_folders_below_one_another_are_refused_before_any_job(
    launch: Launch, tmp_path: Path
) -> None:
    subdir = "hydra.sweep.subdir=group/${hydra.job.num}"
    done = launch("-m", "beta=0.1,0.2", SWEEP, subdir, *SHORT, expect=1)
    assert re.fullmatch(r"error: hydra\.sweep\.subdir=group/.* without a slash.*\n", done.stderr)
    assert not (tmp_path / "sweep").exists()


def test_what_jobs_share_is_made_once(sweep: Sweep) -> None:
    made = []

    def make() -> str:
        made.append(1)
        return "expensive"

    def save(value: str, file: Path) -> None:
        file.write_text(value)

    for _ in range(2):
        assert sweep.once("name", make, save, Path.read_text) == "expensive"
    assert len(made) == 1


# The command line


@pytest.mark.slow
def test_jobs_share_data_and_the_untrained_models_evaluation_and_the_same_runs_once(
    launch: Launch, tmp_path: Path
) -> None:
    done = launch("-m", "beta=0.1,0.5", "beta_end=0,0.05", "seed=1,2", SWEEP, *SHORT)
    folder = tmp_path / "sweep"
    assert list(states(folder).values()) == ["finished"] * 4
    assert "0-beta=0.1,beta_end=0,seed=1" in states(folder), "named by what is swept"
    assert done.stdout.count("finished already, not run again") == 4
    assert done.stdout.count("train: 1920 pairs") == 1
    befores = {
        json.dumps(json.loads((job.path / "summary.json").read_text())["before"])
        for job in Sweep(folder).jobs()
    }
    assert len(befores) == 1
    names = {path.name for path in folder.iterdir() if path.is_file()}
    assert names >= {"report.html", "report.md"}
    assert not (folder / CACHE).exists()
    alone = launch("beta=0.5", "seed=2", "hydra.run.dir=alone", *SHORT)
    assert "train: 1920 pairs" in alone.stdout
    (same,) = (
        job
        for job in Sweep(folder).jobs()
        if job.status()["config_hash"] == _identity(tmp_path / "alone")
    )
    for name in ("before", "after"):
        ours, theirs = (
            json.loads((path / "summary.json").read_text())[name]
            for path in (same.path, tmp_path / "alone")
        )
        assert ours == theirs


def _identity(folder: Path) -> str:
    return RunFolder(folder).status()["config_hash"]


@pytest.mark.slow
def test_a_sweep_killed_in_a_job_goes_on_where_it_was(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launch.py"), "-m", "beta=0.1,0.2,0.5", "seed=1,2", SWEEP]
    command += [text for text in SHORT if text != "tracker=none"] + ["tracker.mode=offline"]
    folder = tmp_path / "sweep"
    first = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(folder.glob("2-*/metrics.jsonl")):
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert list(states(folder).values()) == ["finished", "finished", "running"]
    finished = sorted(folder.glob("[01]-*"))
    before = [checksums(path) for path in finished]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=600)
    assert list(states(folder).values()) == ["finished"] * 6
    assert [checksums(path) for path in finished] == before
    seen = [yaml.safe_load((job.path / "config.yaml").read_text()) for job in Sweep(folder).jobs()]
    assert len({(values["beta"], values["seed"]) for values in seen}) == 6
    runs = [path.name.rsplit("-", 1)[1] for path in folder.glob("*/wandb/offline-run-*")]
    assert len(set(runs)) == 6  # two segments of the one that was killed
    page = (folder / "report.html").read_text()
    for job in Sweep(folder).jobs():
        assert job.path.name in page


ONE_AT_A_TIME = {
    "submitit_local": ["hydra.sweeper.max_batch_size=1", "hydra.launcher.timeout_min=10"],
    "ray": [f"hydra.launcher.num_cpus_per_job={os.cpu_count()}"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", ["submitit_local", pytest.param("ray", marks=pytest.mark.long)]
)
def test_a_sweep_whose_driver_is_killed_goes_on_and_runs_each_configuration_once(
    tmp_path: Path, launcher: str
) -> None:
    command = ["-m", f"hydra/launcher={launcher}", *ONE_AT_A_TIME[launcher], "beta=0.1,0.2,0.5"]
    command += [*SHORT[1:], "train.max_steps=40", "train.save_steps=4", SWEEP]
    said, folder = tmp_path / "said", tmp_path / "sweep"
    first = processes.start(said, command, at=tmp_path, fresh=True)
    first.wait_for(lambda: list(folder.glob("1-*/checkpoints/checkpoint-8/manifest.json")))
    first.signal(signal.SIGKILL)
    assert first.wait().code == -signal.SIGKILL
    finished, killed = (RunFolder(*folder.glob(f"{number}-*")) for number in (0, 1))
    assert finished.status()["state"] == "finished"
    deadline = time.monotonic() + 60
    is_held = True
    while is_held:
        assert time.monotonic() < deadline, "the job goes on without its sweep"
        with killed.held() as is_free:
            is_held = not is_free
        time.sleep(0.1)
    assert list(folder.glob("*/summary.json")) == [finished.file("summary.json")]
    before, saved = checksums(folder), checkpoint.last_step(killed)
    time.sleep(3)
    assert checksums(folder) == before, "what nobody holds is written to"
    done = processes.start(said, command, at=tmp_path, fresh=True).wait()
    assert done.code == 0, done.stderr
    assert list(states(folder).values()) == ["finished"] * 3
    assert {name: hashed for name, hashed in before.items() if finished.path.name in name} == (
        checksums(finished.path)
    )
    assert 8 <= saved < 40
    assert f"resuming from step {saved}" in killed.file("run.log").read_text()
    starts = [len(job.segments()) for job in Sweep(folder).jobs()]
    assert starts == [1, 2, 1]


@pytest.mark.slow
def test_a_job_that_diverges_and_one_that_exits_are_named_and_the_others_finish(
    tmp_path: Path,
) -> None:
    script = tmp_path / "exits.py"
    script.write_text(
        "import runpy, sys\n"
        "from orpo_lab import run\n"
        "train = run._train\n"
        "def exits(config, *rest):\n"
        "    sys.exit(3) if config.beta == 0.3 else None\n"
        "    return train(config, *rest)\n"
        "run._train = exits\n"
        f"runpy.run_path({str(ROOT / 'launch.py')!r}, run_name='__main__')\n"
    )
    rates = "optimizer.learning_rate=1e-3,1e30"
    done = subprocess.run(
        [sys.executable, str(script), "-m", "beta=0.1,0.3", rates, SWEEP, *SHORT],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1, done.stderr
    found = states(tmp_path / "sweep")
    assert list(found.values()) == ["finished", "failed", "failed", "failed"]
    table = done.stdout
    assert re.search(
        r"1-beta=0.1\S*1e\+30\S*\s+failed +NonFiniteError: after training, 16", table
    ), table
    assert re.search(r"2-beta=0.3\S*\s+failed +SystemExit: 3", table), table


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_sweep_after_recording(tmp_path: Path, number: int) -> None:
    command = [sys.executable, str(ROOT / "launch.py"), "-m", "beta=0.1,0.2", SWEEP, *SHORT]
    command[command.index("train.max_steps=2")] = "train.max_steps=5000"
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        # Where the tests run in the background a shell has had SIGINT ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 300
        while not list((tmp_path / "sweep").glob("0-*/metrics.jsonl")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75
    assert list(states(tmp_path / "sweep").values()) == ["stopped"]
    assert re.search(r"0-beta=0.1\S*\s+stopped", out)


@pytest.mark.slow
@each_launcher(long=("joblib", "ray"))
def test_jobs_in_processes_of_their_own_run_once_and_are_told_at_the_end(
    launch: Launch, tmp_path: Path, launcher: list[str]
) -> None:
    rates = "optimizer.learning_rate=1e-3,1e30"
    sweep = ("-m", *launcher, "beta=0.1,0.1,0.5", rates, SWEEP)
    done = launch(*sweep, *SHORT, expect=1, fresh=True)
    found = states(tmp_path / "sweep")
    assert sorted(found.values()) == ["failed", "failed", "finished", "finished"]
    assert done.stdout.count("NonFiniteError: after training") >= 2
    assert (tmp_path / "sweep" / "report.html").exists()
    assert not list((tmp_path / "sweep").rglob("*.pkl"))


def count_configurations() -> None:
    """Have every job say how many configurations there are instead of running."""
    from orpo_lab import run

    def count(*arguments: Any, **named: Any) -> None:
        gc.collect()
        kinds = Counter(type(item).__name__ for item in gc.get_objects())
        print("held", kinds["DictConfig"], kinds["JobReturn"])

    setattr(run, "train", count)  # noqa: B010  (of another type)


@pytest.mark.slow
def test_configurations_of_jobs_that_are_done_are_let_go(launch: Launch) -> None:
    done = launch("-m", "seed=range(8)", SWEEP, prepare=count_configurations, expect=1)
    held = re.findall(r"^held (\d+) (\d+)$", done.stdout, flags=re.MULTILINE)
    assert [int(jobs) for _, jobs in held] == list(range(1, 9)), done.stderr
    assert int(held[-1][0]) <= int(held[3][0]) + 10, "Hydra keeps 34 of each job"
