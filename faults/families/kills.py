"""SIGKILL at every change that a run makes to its files, and in the middle of a step.

What is killed is gone on with by the same command and `resume=auto`. It must go on from the newest
checkpoint that was sealed when it died, and come to the same bits as a run that was never killed.
"""

import signal
from collections.abc import Callable, Iterator
from functools import partial

from faults import events, inside
from faults.bench import UNTRACKED, Bench, Injection
from faults.judge import Outcome, newest_sealed, silent, status
from faults.processes import Done

# A period of GaLore's bases is half over at step 4
GALORE = ("optimizer=galore", "optimizer.update_proj_gap=3")
RUNS = {
    "qlora": ("optimizer=qlora",),
    "lora": ("optimizer=lora",),
    "galore": GALORE,
    "adamw": ("optimizer=adamw",),
    # With a reference, which is in every checkpoint
    "dpo with qlora": ("method=dpo", "optimizer=qlora"),
    "sft with galore": ("method=sft", *GALORE),
}
RUN = "hydra.run.dir=run"
# One checkpoint is kept: the save of step 4 has a rotation in it
CHECKPOINT, ROTATED = "checkpoints/checkpoint-4", "checkpoints/checkpoint-2"


def settings(kind: str) -> tuple[str, ...]:
    """Return the command line of the runs that are killed."""
    return (*UNTRACKED, *RUNS[kind], "train.num_checkpoints=1")


def faults(bench: Bench) -> Iterator[Injection]:
    """Return every point of every kind of run but those of saves like the one that is there."""
    for kind in RUNS:
        log = bench.path(f"events-{kind}")
        watch = events.Watch(bench.path(f"recorded-{kind}/run"), log)
        recorded = Bench(watch.folder.parent, bench.reference)
        if recorded.run(*settings(kind), RUN, prepare=watch).code != 0:
            raise RuntimeError(f"the unharmed run of {kind} failed")
        for point in events.points(_chosen(events.read(log))):
            if not (point.torn and _is_put_in_place(point.event)):
                yield Injection(f"{kind}: {point}", _killed_at(point, kind))
        for step in (1, 4):
            yield Injection(f"{kind}: in step {step}", _killed_in(step, kind))
        yield Injection(f"{kind}: after step 3, from outside", _killed_from_outside(kind))


def _is_put_in_place(event: events.Event) -> bool:
    """Whether nobody sees a file before it is renamed: torn or whole makes no difference then."""
    written_whole = ".part" in event.path and "checkpoint-" not in event.path
    return event.kind == "open" and written_whole


def _chosen(found: list[events.Event]) -> list[events.Event]:
    """Return the events of the run's beginning, of one save with its rotation, and of its end."""
    places = [number for number, event in enumerate(found) if "checkpoint-" in event.path]
    saves = [n for n, event in enumerate(found) if event.path.startswith(CHECKPOINT)]
    rotated = [n for n, event in enumerate(found) if event.path.startswith(ROTATED)]
    middle = range(saves[0], rotated[-1] + 1)
    kept = {*range(places[0]), *middle, *range(places[-1] + 1, len(found))}
    # To make a folder that is there changes nothing
    return [
        event
        for number, event in enumerate(found)
        if number in kept and (event.kind, event.number > 1) != ("os.mkdir", True)
    ]


def _gone_on_with(bench: Bench, done: Done, kind: str, *, fresh: bool = False) -> Outcome:
    if done.code != -signal.SIGKILL:
        return silent(f"it was not killed: exit code {done.code}: {done.stderr[-300:]}")
    run = bench.path("run")
    # What had finished is left alone
    step = None if status(run) == "finished" else newest_sealed(run)
    return bench.resumed(*settings(kind), step=step, fresh=fresh)


def _killed_at(point: events.Point, kind: str) -> Callable[[Bench], Outcome]:
    def happen(bench: Bench) -> Outcome:
        watch = events.Watch(bench.path("run"), bench.path("events"), point)
        done = bench.run(*settings(kind), RUN, prepare=watch)
        return _gone_on_with(bench, done, kind)

    return happen


def _killed_in(step: int, kind: str) -> Callable[[Bench], Outcome]:
    def happen(bench: Bench) -> Outcome:
        kill = partial(inside.in_step, step, inside.die)
        return _gone_on_with(bench, bench.run(*settings(kind), RUN, prepare=kill), kind)

    return happen


def _killed_from_outside(kind: str) -> Callable[[Bench], Outcome]:
    """Kill a process of its own, and go on in another."""

    def happen(bench: Bench) -> Outcome:
        running = bench.start(*settings(kind), RUN, fresh=True)
        running.wait_for(lambda: "step 3/6" in running.stdout)
        running.signal(signal.SIGKILL)
        return _gone_on_with(bench, running.wait(), kind, fresh=True)

    return happen
