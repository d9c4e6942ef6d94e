"""The jobs of this process and their outcomes: the only such state of a process."""

from dataclasses import dataclass, field
from datetime import timedelta

from omegaconf import DictConfig

from orpo_lab.config.tracker import Tracker
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

    def close(self) -> int:
        """Close the sweep, if there is one, and return the process's exit code: 0 or 1."""
        failed = self.failures
        if self.sweep is not None and self.tracker is not None:
            failed = self.sweep.close(self.tracker)
        return int(bool(failed or self.left_out))


JOBS = Jobs()
