"""Signals and budgets: what ends a run, and when it does not wait."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orpo_lab.records.run_folder import RunFolder
from orpo_lab.stop import BUDGET, SIGNALS, SWEEP_PROCESS, Stop, Stopped
from orpo_lab.sweep.folder import Sweep
from tests.conftest import ROOT, each_launcher


@pytest.fixture(autouse=True)
def _long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    """No signal of another test counts."""
    monkeypatch.setattr(Stop, "asked_at", -math.inf)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_every_signal_ends_a_run_with_the_code_to_requeue_it(number: signal.Signals) -> None:
    stop = Stop()
    with stop.listening(), pytest.raises(Stopped) as stopped:
        send(number)
    assert (stopped.value.reason, stopped.value.exit_code) == (number.name, 75)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_step_is_ended_first(number: signal.Signals) -> None:
    stop = Stop()
    stop.waits = True
    with stop.listening():
        send(number)
    assert stop.reason() == number.name


def test_a_second_signal_in_a_moment_is_the_same_request_and_a_later_one_does_not_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sweep, run = Stop(), Stop()
    with sweep.listening():
        with pytest.raises(Stopped, match=r"^SIGTERM$"), run.listening():
            send(signal.SIGTERM)
        send(signal.SIGTERM)  # what was sent to the process group
        assert sweep.signal == "SIGTERM", "no further job begins"
        monkeypatch.setattr(Stop, "asked_at", time.monotonic() - 2)
        with pytest.raises(Stopped, match=r"^SIGTERM, then SIGINT$") as stopped:
            send(signal.SIGINT)
    assert stopped.value.exit_code == 130


def test_a_budget_is_in_hours_and_a_signal_goes_before_it() -> None:
    assert Stop(2.0).deadline - time.monotonic() == pytest.approx(7200, abs=10)
    assert Stop(2.0).reason() == ""
    spent = Stop(0.0)
    assert spent.reason() == BUDGET
    spent.waits = True
    with spent.listening():
        send(signal.SIGTERM)
        send(signal.SIGINT)  # in the same moment
    assert spent.reason() == "SIGTERM"


def test_under_nohup_a_closed_terminal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = Stop()
        with stop.listening():
            send(signal.SIGHUP)
        assert stop.signal == ""
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


JOB = """
import time
from orpo_lab.stop import PROCESS

PROCESS.work_for_another()
with PROCESS.at_work:
    print("at work", flush=True)
    while not PROCESS.signal:
        time.sleep(0.01)
    time.sleep(0.1)
    print("saved", flush=True)
time.sleep(60)
"""


def test_a_job_saves_and_its_process_ends_when_the_sweeps_process_is_killed() -> None:
    with subprocess.Popen(["sleep", "60"]) as sweep:
        env = {**os.environ, "PYTHONPATH": str(ROOT), SWEEP_PROCESS: str(sweep.pid)}
        command = [sys.executable, "-c", JOB]
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as job:
            assert job.stdout is not None
            assert job.stdout.readline() == "at work\n"
            sweep.kill()  # nobody has asked for its exit code yet
            try:
                assert job.communicate(timeout=10)[0] == "saved\n"
            finally:
                job.kill()
    assert job.returncode == 75


@pytest.mark.slow
@each_launcher(long=("submitit",))
def test_a_signal_reaches_the_jobs_of_a_launcher_and_all_of_them_are_saved(
    tmp_path: Path, launcher: list[str]
) -> None:
    command = [sys.executable, str(ROOT / "launch.py"), "-m", *launcher, "beta=0.1,0.2"]
    command += ["tracker=none", "train.max_steps=5000", "dataset.num_eval=8"]
    command += ["dataset.num_generations=0", "hydra.sweep.dir=sweep"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 300
        while len(list(tmp_path.glob("sweep/*/metrics.jsonl"))) < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        os.killpg(process.pid, signal.SIGTERM)  # as `timeout` does
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, err) == (75, "stopped by SIGTERM\n")
    jobs = Sweep(tmp_path / "sweep").jobs()
    assert [job.status()["exit_code"] for job in jobs] == [75, 75]
    # Ray can interrupt a job on another machine, and send it no other signal
    reason = "SIGINT" if "hydra/launcher=ray" in launcher else "SIGTERM"
    assert [RunFolder(job.path).status()["reason"] for job in jobs] == [reason] * 2
    for job in jobs:
        assert list(job.path.glob("checkpoints/*/manifest.json"))
