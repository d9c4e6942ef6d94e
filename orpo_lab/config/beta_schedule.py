"""Keys of `beta_schedule`: how beta changes in a run."""

import math
from dataclasses import dataclass
from typing import ClassVar

from orpo_lab.config.checks import check
from orpo_lab.config.policy import setting


@dataclass(kw_only=True)
class BetaSchedule:
    """Base class of the schedules, which change beta from `beta` to `beta_end`."""

    reads_beta_end: ClassVar[bool] = True
    is_known_before: ClassVar[bool] = True
    """Whether beta is known at every step before the run begins."""


@dataclass(kw_only=True)
class Constant(BetaSchedule):
    """beta stays the same in the whole run."""

    reads_beta_end: ClassVar[bool] = False


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


@dataclass(kw_only=True)
class Adaptive(BetaSchedule):
    """beta follows the margin of each batch (beta-DPO); see `beta_schedule.adapted`."""

    reads_beta_end: ClassVar[bool] = False
    is_known_before: ClassVar[bool] = False

    alpha: float = setting()
    momentum: float = setting()
    max_change: float = setting()

    def __post_init__(self) -> None:
        check(
            0 < self.alpha < math.inf,
            f"beta_schedule.alpha={self.alpha} must be above 0; beta_schedule=constant keeps beta",
        )
        check(
            0 <= self.momentum < 1,
            f"beta_schedule.momentum={self.momentum} must be at least 0 and below 1",
        )
        check(
            0 < self.max_change < 1,
            f"beta_schedule.max_change={self.max_change} must be above 0 and below 1, so that beta "
            "stays above 0",
        )
