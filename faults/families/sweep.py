"""What can happen to a sweep: its jobs are to be what they are as runs of their own."""

import json
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from faults.bench import UNTRACKED, Bench, Injection
from faults.inside import exit_where
from faults.judge import Ending, Outcome, refused, silent, state, status, survived
from faults.processes import Done

SWEEP = ("-m", *UNTRACKED, "hydra.sweep.dir=sweep")
BETAS = ("0.1", "0.2", "0.5")
SWEPT = f"beta={','.join(BETAS)}"


def faults(bench: Bench) -> Iterator[Injection]:
    """Return the faults."""
    yield Injection("SIGKILL in the second of three jobs, forked", _killed(fresh=False))
    yield Injection("SIGKILL in the second of three jobs", _killed(fresh=True))
    yield Injection("SIGTERM in the second of three jobs", _stopped(signal.SIGTERM))
    yield Injection("SIGINT in the second of three jobs", _stopped(signal.SIGINT))
    yield Injection("a job that diverges", _one_fails("optimizer.learning_rate=1e-3,1e30", None))
    yield Injection("a job that calls sys.exit(0)", _one_fails("seed=42,3", partial(exit_where, 3)))
    yield Injection("a job of which a file is lost", _lost_file)
    yield Injection("two sweeps that start in the same second", _same_second)
    yield Injection("other code than the sweep was begun with", _other_code)


def _jobs(bench: Bench) -> list[Path]:
    return sorted(path.parent for path in bench.path("sweep").glob("*/status.json"))


def _all_survived(done: Done, bench: Bench) -> Outcome:
    """Judge a sweep over beta, each job against a run of its own."""
    jobs = _jobs(bench)
    if len(jobs) != len(BETAS):
        return silent(f"{len(jobs)} jobs instead of {len(BETAS)}: {done.stderr[-300:]}")
    for job, beta in zip(jobs, BETAS, strict=True):
        outcome = survived(done, job, bench.reference(*UNTRACKED, f"beta={beta}"))
        if outcome.ending != Ending.SURVIVED:
            return outcome
    if not bench.path("sweep/report.html").exists():
        return silent("there is no report")
    return Outcome(Ending.SURVIVED)


def _interrupt(bench: Bench, number: int, *, fresh: bool) -> Done:
    running = bench.start(*SWEEP, SWEPT, fresh=fresh)
    running.wait_for(lambda: list(bench.path("sweep").glob("1-*/metrics.jsonl")))
    running.signal(number)
    return running.wait()


def _killed(*, fresh: bool) -> Callable[[Bench], Outcome]:
    def happen(bench: Bench) -> Outcome:
        done = _interrupt(bench, signal.SIGKILL, fresh=fresh)
        if done.code != -signal.SIGKILL:
            return silent(f"it was not killed: {done.code}")
        return _all_survived(bench.run(*SWEEP, SWEPT, fresh=fresh), bench)

    return happen


def _stopped(number: int) -> Callable[[Bench], Outcome]:
    def happen(bench: Bench) -> Outcome:
        done = _interrupt(bench, number, fresh=True)
        states = [status(job) for job in _jobs(bench)]
        if done.code != 75 or states != ["finished", "stopped"]:
            return silent(f"exit code {done.code}, {states}: {done.stderr[-300:]}")
        return _all_survived(bench.run(*SWEEP, SWEPT), bench)

    return happen


def _one_fails(swept: str, prepare: Callable[[], None] | None) -> Callable[[Bench], Outcome]:
    """Sweep over a good and a bad value: the first job survives, the second is named."""

    def happen(bench: Bench) -> Outcome:
        done = bench.run(*SWEEP, swept, prepare=prepare)
        good, bad = _jobs(bench)
        first = swept.split(",")[0]
        outcome = survived(Done(0, "", ""), good, bench.reference(*UNTRACKED, first))
        if outcome.ending != Ending.SURVIVED:
            return outcome
        if done.code != 1 or "Traceback" in done.stderr or "error: " not in done.stderr:
            return silent(f"exit code {done.code}: {done.stderr[-300:]}")
        if status(bad) != "failed" or (bad / "final").exists() or bad.name not in done.stdout:
            return silent(f"the bad job: {status(bad)}, {done.stdout[-300:]}")
        return Outcome(Ending.REFUSED)

    return happen


def _lost_file(bench: Bench) -> Outcome:
    bench.run(*SWEEP, SWEPT)
    lost = _jobs(bench)[1] / "status.json"
    lost.write_text(lost.read_text()[:20])
    return _all_survived(bench.run(*SWEEP, SWEPT), bench)


def _same_second(bench: Bench) -> Outcome:
    both = [bench.start("-m", *UNTRACKED, "beta=0.2") for _ in range(2)]
    ended = [process.wait() for process in both]
    folders = sorted(path.parent for path in bench.path("multirun").glob("*/*/status.json"))
    if len(folders) != 2:
        return silent(f"{len(folders)} jobs: {[done.stderr[-200:] for done in ended]}")
    reference = bench.reference(*UNTRACKED, "beta=0.2")
    outcomes = [survived(*job, reference) for job in zip(ended, folders, strict=True)]
    return next((outcome for outcome in outcomes if outcome.ending != Ending.SURVIVED), outcomes[0])


def _other_code(bench: Bench) -> Outcome:
    bench.run(*SWEEP, "beta=0.2")
    record = bench.path("sweep/sweep.json")
    record.write_text(json.dumps({**json.loads(record.read_text()), "code": "0" * 64}))
    (job,) = _jobs(bench)
    before = state(job)
    done = bench.run(*SWEEP, "beta=0.2,0.5")
    if state(job) != before or len(_jobs(bench)) != 1:
        return silent("it was gone on with")
    return refused(done, bench.path("no-run"), "made by other code than this")
