"""What the jobs of this process have come to: the one place where a process keeps that."""

from dataclasses import dataclass, field
from datetime import timedelta

from orpo_lab.config.tracker import Tracker
from orpo_lab.redaction import redact
from orpo_lab.sweep.folder import Sweep


@dataclass
class Jobs:
    """The jobs of a process, of which a sweep has many.

    Hydra makes its callback and calls every job by itself; what the jobs leave for the end of the
    process they leave here.
    """

    sweep: Sweep | None = None
    """The sweep that this process has started; None: it runs a single job, or one for another."""
    tracker: Tracker | None = None
    """Where the sweep's comparison is logged."""
    num: int | None = None
    """How many jobs the sweep has; None: there is no sweep, or it is another process's."""
    left_out: list[str] = field(default_factory=list)
    """A line for each combination of the sweep that cannot be composed."""
    failures: list[str] = field(default_factory=list)
    """A line for each failed job: Hydra's basic launcher would go on and exit 0."""
    seconds: list[float] = field(default_factory=list)
    """What the jobs took, one after the other."""

    def count(self, num: int, left_out: list[str]) -> None:
        """Take note of how many jobs the sweep has, and of the combinations that cannot be."""
        self.num = num
        self.left_out += left_out

    def progress(self, number: int) -> str:
        """Return a line on how long the sweep has taken, and will take at its pace so far.

        Args:
            number: of the job that has ended, from 1.
        """
        assert self.num is not None
        left = sum(self.seconds) / len(self.seconds) * (self.num - number)
        spent, more = (timedelta(seconds=round(each)) for each in (sum(self.seconds), left))
        return f"{number} of {self.num} jobs ended after {spent}, about {more} left"

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
