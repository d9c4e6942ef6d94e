"""The jobs of this process and their outcomes: the only such state of a process."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from omegaconf import DictConfig

from orpo_lab import program
from orpo_lab.config.tracker import Tracker
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.redaction import redact
from orpo_lab.sweep import forks
from orpo_lab.sweep.folder import Sweep


@dataclass
class Jobs:
    """The jobs of a process: one, or all or some jobs of a sweep.

    Hydra itself makes its callback and calls every job, so nothing can be passed between them. Jobs
    write here what is needed at the end of the process.
    """

    sweep: Sweep | None = None
    """The sweep that this process has started. None: the process runs a single job, or a job of
    another process's sweep."""
    tracker: Tracker | None = None
    """The tracker to which the sweep's comparison is logged."""
    place: RunFolder | None = None
    """The run folder of a single run."""
    num: int | None = None
    """Number of jobs of the sweep; None: there is no sweep, or another process started it."""
    round: int | None = None
    """Number of the round of a race, 1 for the first; None: the sweep is no race."""
    left_out: list[str] = field(default_factory=list)
    """A line for each combination of the sweep that cannot be composed."""
    failures: list[str] = field(default_factory=list)
    """A line for each failed job; Hydra's basic launcher would go on and exit with 0."""
    seconds: list[float] = field(default_factory=list)
    """The duration of each job that has ended, in seconds."""

    def count(self, composed: list[DictConfig], left_out: list[str]) -> None:
        """Note the configurations of further jobs of the sweep, and what cannot be composed."""
        self.num = (self.num or 0) + len(composed)
        self.left_out += left_out
        if self.sweep is not None:
            forks.plan(self.sweep, composed)

    @property
    def all(self) -> str:
        """The number of the sweep's jobs as text; of a race, of the rounds so far."""
        return f"{self.num}" if self.round is None else f"{self.num} up to round {self.round}"

    def progress(self, number: int) -> str:
        """Return a line with the time that the sweep has taken, and an estimate of the time left.

        Args:
            number: number of the job that has ended, 1 for the first.
        """
        assert self.num is not None
        left = sum(self.seconds) / len(self.seconds) * (self.num - number)
        spent, more = (timedelta(seconds=round(each)) for each in (sum(self.seconds), left))
        return f"{number} of {self.all} jobs ended after {spent}, about {more} left"

    def fail(self, failure: str) -> None:
        """Remember why a job has failed."""
        self.failures.append(redact(failure))

    def next_step(self, arguments: Sequence[str], exit_code: int) -> str:
        """Return a line that says what to do next; empty: there is nothing to go on with.

        Args:
            arguments: the command line as the user typed it.
            exit_code: of this process.
        """
        if self.sweep is not None:
            folder, key = self.sweep.folder, "hydra.sweep.dir"
            has_begun = folder.is_dir()
        elif self.place is not None:
            folder, key = self.place.path, "hydra.run.dir"
            has_begun = self.place.status()["state"] in ("failed", "stopped")
        else:
            return ""
        if exit_code:
            how = "put that right, then" if exit_code == 1 else "to go on"
            return f"{how}  {_again(arguments, key, folder)}" if has_begun else ""
        # A sweep that has ended well has named its report and what to ship
        report = f"report      {program.command('compare')} {shlex.quote(str(folder))}"
        return report if self.sweep is None else ""

    def close(self) -> int:
        """Close the sweep, if there is one, and return the process's exit code: 0 or 1."""
        failed = [*self.failures]
        if self.sweep is not None and self.tracker is not None:
            failed += self.sweep.close(self.tracker)
        return int(bool(failed or self.left_out))


def _again(arguments: Sequence[str], key: str, folder: Path) -> str:
    """Return the command line with which a run or a sweep goes on in its folder."""
    left_out = (f"{key}=", "resume=")
    kept = [given for given in arguments if not given.startswith(left_out)]
    added = [f"{key}={folder}", *(["resume=auto"] if key == "hydra.run.dir" else [])]
    return redact(f"{program.command('train')} {shlex.join([*kept, *added])}")


JOBS = Jobs()
