"""Disks that are full, or become read-only, while a run writes: it says so and stops.

Once there is room again it is gone on with and comes to the same bits. The disk is a tmpfs of its
own, filled to the last byte at a given change to the run's files; mounting it takes root.
"""

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from faults import events, inside
from faults.bench import UNTRACKED, Bench, Injection
from faults.judge import Ending, Outcome, newest_sealed, refused, told
from faults.processes import Done

RUN = "hydra.run.dir=disk/run"
SAYS = "cannot be written"
KEPT = (*UNTRACKED, "train.num_checkpoints=9")
WHEN = {
    "as the run begins": ("open", "config.yaml.part", 1),
    "as data_report.json is written": ("open", "data_report.json.part", 1),
    "as the second line of metrics.jsonl is written": ("open", "metrics.jsonl", 2),
    "as the weights of checkpoint 4 are written": (
        "open",
        "checkpoints/checkpoint-4/adapter_model.safetensors",
        1,
    ),
    "as the optimizer of checkpoint 4 is written": (
        "open",
        "checkpoints/checkpoint-4/state.pt",
        1,
    ),
    "as checkpoint 4 is sealed": ("open", "checkpoints/checkpoint-4/manifest.json.part", 1),
    "as the trained model is saved": (
        "open",
        "checkpoints/trained-6/adapter_model.safetensors",
        1,
    ),
    "as summary.json is written": ("open", "summary.json.part", 1),
    "as final/ is written": ("open", "final.part/README.md", 1),
    "as the plot is written": ("open", "plots/training.png", 1),
    "as samples.md is written": ("open", "samples.md.part", 1),
}


def faults(bench: Bench) -> Iterator[Injection]:
    """Return the faults."""
    for name, event in WHEN.items():
        at = events.Point(events.Event(*event))
        yield Injection(f"full {name}", _in_trouble(at, fill, empty))
        yield Injection(f"read-only {name}", _in_trouble(at, make_read_only, make_writable))
    yield Injection("full from the beginning", _in_trouble(None, fill, empty))
    yield Injection(
        "read-only from the beginning", _in_trouble(None, make_read_only, make_writable)
    )
    yield Injection("a file larger than may be", _too_large)


def fill(disk: Path) -> None:
    """Take what room there is."""
    with (disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))


def empty(disk: Path) -> None:
    """Give it back."""
    (disk / "filler").unlink()


def make_read_only(disk: Path) -> None:
    """Have every file that is opened from now on refuse to be written to."""
    for command in (["--bind", str(disk), str(disk)], ["-o", "remount,bind,ro", str(disk)]):
        subprocess.run(["mount", *command], check=True)


def make_writable(disk: Path) -> None:
    """Undo that."""
    subprocess.run(["umount", str(disk)], check=True)


@contextmanager
def _disk_at(folder: Path) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _in_trouble(
    at: events.Point | None, begin: Callable[[Path], None], end: Callable[[Path], None]
) -> Callable[[Bench], Outcome]:
    """Let trouble begin at a point of a run, or before it, and end after it."""

    def happen(bench: Bench) -> Outcome:
        disk = bench.path("disk")
        # The run's folder is on the disk, and has another name where other families look for it
        run = disk / "run"
        with _disk_at(disk):
            bench.path("run").symlink_to(run)
            run.mkdir()
            watch = events.Watch(run, bench.path("events"), at, partial(begin, disk))
            if at is None:
                begin(disk)
            done = bench.run(*KEPT, RUN, prepare=watch)
            # What cannot be written to keeps what it held, its status too
            outcome = told(done, SAYS) if begin is make_read_only else _full(done, run)
            end(disk)
            run.mkdir(exist_ok=True)  # an empty one is taken back
            return _gone_on_with(bench, outcome)

    return happen


def _too_large(bench: Bench) -> Outcome:
    prepare = partial(inside.limit_file_size, 200_000)
    done = bench.run(*KEPT, "hydra.run.dir=run", prepare=prepare)
    return _gone_on_with(bench, refused(done, bench.path("run"), SAYS))


def _full(done: Done, run: Path) -> Outcome:
    """Judge a run whose disk had no room for its status either.

    Where the trained model was saved already, what has been made of it may stay: it is complete.
    """
    if list(run.glob("checkpoints/trained-*/manifest.json")):
        return told(done, SAYS)
    return refused(done, run, SAYS, states=("failed", "running", "missing"))


def _gone_on_with(bench: Bench, outcome: Outcome) -> Outcome:
    if outcome.ending != Ending.REFUSED:
        return outcome
    return bench.resumed(*KEPT, step=newest_sealed(bench.path("run")))
