"""Faults, and where they are made to happen."""

import itertools
import signal
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from faults import inside, processes
from faults.judge import Ending, Outcome, newest_sealed, resumed_from, silent, state, survived
from faults.processes import Done

# A run of two seconds with everything in it: six steps over an epoch and a half in shuffled order,
# dropout, a beta and a learning rate that move and do not end at 0 (where a step too many would not
# show), three checkpoints, answers before and after
SMALL = (
    "beta_end=0.05",
    "beta_schedule=linear",
    "dataset.num_train=16",
    "dataset.num_eval=4",
    "dataset.num_generations=2",
    "dataset.max_new_tokens=4",
    "train.batch_size=4",
    "train.max_steps=6",
    "train.lr_scheduler_type=inverse_sqrt",
    "train.warmup_steps=2",
    "train.save_steps=2",
    "train.logging_steps=1",
)
UNTRACKED = (*SMALL, "tracker=none")


class Bench:
    """A place of its own for a fault."""

    def __init__(self, folder: Path, references: "References") -> None:
        self.folder = folder
        self.reference = references
        folder.mkdir(parents=True)

    def start(self, *arguments: str, **options: Any) -> processes.Running:
        """Start `launch.py`; options are those of `processes.start`."""
        return processes.start(self.folder, list(arguments), **options)

    def run(self, *arguments: str, **options: Any) -> Done:
        """Run `launch.py` to its end."""
        return self.start(*arguments, **options).wait()

    def unharmed(self, *arguments: str, into: str) -> Path:
        """Run `launch.py` in here, where nothing happens to it; return the run folder.

        Raises:
            RuntimeError: something did.
        """
        done = self.run(*arguments, f"hydra.run.dir={into}")
        if done.code != 0:
            raise RuntimeError(f"the unharmed run failed: {done.stderr[-300:]}")
        state(self.folder / into)
        return self.folder / into

    def resumed(self, *arguments: str, step: int | None, fresh: bool = False) -> Outcome:
        """Go on with the run in `run` and judge what it comes to.

        Args:
            arguments: those it was begun with.
            step: the one it must go on from; None: it must begin anew.
            fresh: in a new interpreter.
        """
        done = self.run(*arguments, "resume=auto", "hydra.run.dir=run", fresh=fresh)
        outcome = survived(done, self.path("run"), self.reference(*arguments))
        if outcome.ending == Ending.SURVIVED and resumed_from(done) != step:
            return silent(f"it goes on from step {resumed_from(done)} instead of {step}")
        return outcome

    def killed_in_step_6(self, *arguments: str) -> Path:
        """Leave a run in `run` that was killed in its last step, after checkpoints 2 and 4."""
        kill = partial(inside.in_step, 6, inside.die)
        done = self.run(*arguments, "hydra.run.dir=run", prepare=kill)
        if done.code != -signal.SIGKILL or newest_sealed(self.path("run")) != 4:
            raise RuntimeError(f"exit code {done.code}: {done.stderr[-300:]}")
        return self.path("run")

    def path(self, name: str) -> Path:
        """Return a path in this place."""
        return self.folder / name


class References:
    """Unharmed runs to compare with, each made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count()
        self._made: dict[tuple[str, ...], Path] = {}
        self._locks: defaultdict[tuple[str, ...], threading.Lock] = defaultdict(threading.Lock)

    def __call__(self, *arguments: str) -> Path:
        """Return the folder of the unharmed run with these arguments."""
        with self._locks[arguments]:
            if arguments not in self._made:
                bench = Bench(self._folder / str(next(self._numbers)), self)
                self._made[arguments] = bench.unharmed(*arguments, into="run")
            return self._made[arguments]


@dataclass(frozen=True)
class Injection:
    """One thing that goes wrong: makes it happen in a bench, and judges what comes of it."""

    name: str
    happen: Callable[[Bench], Outcome]
    waits: bool = False
    """Whether it mostly waits, and can go on beside others."""
