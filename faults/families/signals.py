"""SIGTERM, SIGINT, the time budget: a run ends as documented, and goes on to the same bits."""

import signal
import time
from collections.abc import Callable, Iterator
from functools import partial

from faults import events, inside
from faults.bench import UNTRACKED, Bench, Injection
from faults.judge import Ending, Outcome, newest_sealed, refused, silent, status, survived
from faults.processes import Done

RUN = "hydra.run.dir=run"
KEPT = (*UNTRACKED, "train.num_checkpoints=9")
SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Signals in one moment, which are one request, and the exit code
ASKED = {
    (signal.SIGTERM,): 75,
    (signal.SIGINT,): 75,
    (signal.SIGHUP,): 75,
    (signal.SIGUSR1,): 75,
    (signal.SIGUSR2,): 75,
    (signal.SIGTERM, signal.SIGTERM): 75,
    (signal.SIGINT, signal.SIGINT): 75,
    (signal.SIGTERM, signal.SIGINT): 75,
}
# Seconds after a run's folder is there: torch is imported, then data and model are read
DELAYS = (0.0, 1.0, 2.0, 3.0, 4.0)


def faults(bench: Bench) -> Iterator[Injection]:
    """Return the faults."""
    for signals, code in ASKED.items():
        name = ", ".join(number.name for number in signals)
        yield Injection(f"{name} in step 3", _in_step_3(signals, code))
        yield Injection(f"{name} while checkpoint 4 is saved", _while_saving(signals, code))
    for number in SIGNALS:
        for where, module, function, calls in (
            ("data are read", "orpo_lab.data", "load", 1),
            ("the model is loaded", "orpo_lab.model.weights", "load_model", 1),
            ("the base is scored", "orpo_lab.evaluate", "score", 1),
            ("the base answers", "orpo_lab.evaluate", "generate", 1),
            ("the trained model is scored", "orpo_lab.evaluate", "score", 2),
            ("the trained model answers", "orpo_lab.evaluate", "generate", 2),
        ):
            act = partial(inside.send, number)
            prepare = partial(inside.at_call, module, function, calls, act)
            yield Injection(f"{number.name} while {where}", _outside_training(prepare, number))
        for where, function in (
            ("the model is saved", "model_card"),
            ("the plot is drawn", "draw_training"),
        ):
            act = partial(inside.send, number)
            prepare = partial(inside.at_call, "orpo_lab.records.results", function, 1, act)
            yield Injection(f"{number.name} while {where}", _while_results_are_written(prepare))
    for delay in DELAYS:
        number = SIGNALS[int(delay) % 2]
        name = f"{number.name} {delay:.0f} s after a fresh start"
        yield Injection(name, _early(delay, number))
    yield Injection("SIGTERM in training, from outside", _from_outside)
    yield Injection("SIGTERM to two jobs of joblib", _under("joblib", "hydra.launcher.n_jobs=2"))
    yield Injection("SIGTERM to two jobs of submitit", _under("submitit_local"))
    yield Injection("train.max_hours used up", _out_of_time)


def _stopped_and_gone_on_with(bench: Bench, done: Done, code: int, says: str) -> Outcome:
    run = bench.path("run")
    outcome = refused(done, run, f"stopped by {says}", code=code)
    if outcome.ending != Ending.REFUSED:
        return outcome
    return bench.resumed(*KEPT, step=newest_sealed(run))


def _in_step_3(signals: tuple[signal.Signals, ...], code: int) -> Callable[[Bench], Outcome]:
    def happen(bench: Bench) -> Outcome:
        prepare = partial(inside.in_step, 3, partial(inside.send, *signals))
        done = bench.run(*KEPT, RUN, prepare=prepare)
        if code == 75 and newest_sealed(bench.path("run")) != 3:
            return silent(f"step 3 is in no checkpoint: {done.stderr[-300:]}")
        return _stopped_and_gone_on_with(bench, done, code, signals[0].name)

    return happen


def _while_saving(signals: tuple[signal.Signals, ...], code: int) -> Callable[[Bench], Outcome]:
    def happen(bench: Bench) -> Outcome:
        file = "checkpoints/checkpoint-4/state.pt"
        watch = events.Watch(
            bench.path("run"),
            bench.path("events"),
            events.Point(events.Event("open", file, 1)),
            partial(inside.send, *signals),
        )
        done = bench.run(*KEPT, RUN, prepare=watch)
        return _stopped_and_gone_on_with(bench, done, code, signals[0].name)

    return happen


def _outside_training(
    prepare: Callable[[], None], number: signal.Signals
) -> Callable[[Bench], Outcome]:
    def happen(bench: Bench) -> Outcome:
        done = bench.run(*KEPT, RUN, prepare=prepare)
        return _stopped_and_gone_on_with(bench, done, 75, number.name)

    return happen


def _while_results_are_written(prepare: Callable[[], None]) -> Callable[[Bench], Outcome]:
    """The second that it takes is waited for: the run has finished then."""
    return lambda bench: survived(
        bench.run(*KEPT, RUN, prepare=prepare), bench.path("run"), bench.reference(*KEPT)
    )


def _early(delay: float, number: signal.Signals) -> Callable[[Bench], Outcome]:
    def happen(bench: Bench) -> Outcome:
        running = bench.start(*KEPT, RUN, fresh=True)
        running.wait_for(bench.path("run/status.json").exists)
        time.sleep(delay)
        running.signal(number)
        return _stopped_and_gone_on_with(bench, running.wait(), 75, number.name)

    return happen


def _from_outside(bench: Bench) -> Outcome:
    running = bench.start(*KEPT, RUN, fresh=True)
    running.wait_for(lambda: "step 2/6" in running.stdout)
    running.signal(signal.SIGTERM)
    return _stopped_and_gone_on_with(bench, running.wait(), 75, "SIGTERM")


def _out_of_time(bench: Bench) -> Outcome:
    done = bench.run(*KEPT, RUN, "train.max_hours=1e-9")
    return _stopped_and_gone_on_with(bench, done, 75, "train.max_hours")


def _under(launcher: str, *more: str) -> Callable[[Bench], Outcome]:
    """Stop a sweep whose jobs run in processes of a launcher, and go on with it."""

    def happen(bench: Bench) -> Outcome:
        sweep = ("-m", *KEPT, f"hydra/launcher={launcher}", *more, "hydra.sweep.dir=sweep")
        running = bench.start(*sweep, "seed=1,2", "train.max_steps=5000", fresh=True)
        running.wait_for(lambda: len(list(bench.path("sweep").glob("*/metrics.jsonl"))) == 2)
        running.signal(signal.SIGTERM)
        done = running.wait()
        if done.code != 75 or done.stderr != "stopped by SIGTERM\n":
            return silent(f"exit code {done.code}: {done.stderr[-300:]}")
        for job in bench.path("sweep").glob("*/status.json"):
            if status(job.parent) != "stopped" or newest_sealed(job.parent) is None:
                return silent(f"{job.parent.name}: {status(job.parent)}, without a checkpoint")
        return Outcome(Ending.REFUSED)

    return happen
