"""Keys of `beta_schedule`: how beta changes in a run."""

from dataclasses import dataclass
from typing import ClassVar

from orpo_lab.config.checks import check
from orpo_lab.config.policy import setting


@dataclass(kw_only=True)
class BetaSchedule:
    """Base class of the schedules, which change beta from `beta` to `beta_end`."""

    is_known_before: ClassVar[bool] = True
    """Whether beta is known at every step before the run begins."""


@dataclass(kw_only=True)
class Constant(BetaSchedule):
    """beta stays the same in the whole run; `beta_end` is not used."""


@dataclass(kw_only=True)
class Linear(BetaSchedule):
    """A straight line from the first step to the last."""


@dataclass(kw_only=True)
class Cosine(BetaSchedule):
    """Half a period of a cosine: slow at first, then fast, slow at the end."""


@dataclass(kw_only=True)
class Step(BetaSchedule):
    """Equal jumps at the milestones."""

    milestones: list[float] = setting()

    def __post_init__(self) -> None:
        rising = self.milestones == sorted(set(self.milestones))
        inside = all(0 < milestone < 1 for milestone in self.milestones)
        check(
            bool(self.milestones) and rising and inside,
            f"beta_schedule.milestones={self.milestones} must rise and lie between 0 and 1",
        )


@dataclass(kw_only=True)
class HoldThenAnneal(BetaSchedule):
    """beta, then a straight line to beta_end over the final part of the run."""

    anneal_fraction: float = setting()

    def __post_init__(self) -> None:
        check(
            0 < self.anneal_fraction <= 1,
            f"beta_schedule.anneal_fraction={self.anneal_fraction} must be in (0, 1]",
        )
