"""How beta changes during a run; in ORPO beta is the weight of the odds-ratio loss.

The functions are pure: beta depends only on the configuration and on the number of the optimizer
step. So beta is the same after a resume and the same for every engine.
"""

import math
from bisect import bisect_right

from orpo_lab.config.beta_schedule import (
    BetaSchedule,
    Constant,
    Cosine,
    HoldThenAnneal,
    Linear,
    Step,
)


def progress(step: int, num_steps: int) -> float:
    """Return the progress of a run at 0-based step `step`: 0 at the first step, 1 at the last."""
    return step / max(1, num_steps - 1)


def beta_at(schedule: BetaSchedule, progress: float, *, beta: float, beta_end: float) -> float:
    """Return beta at `progress` in [0, 1] of the optimizer steps.

    Every schedule but constant starts at `beta` and ends at `beta_end`, which may be higher.
    """
    return beta + (beta_end - beta) * _share_moved(schedule, progress)


def _share_moved(schedule: BetaSchedule, progress: float) -> float:
    """Return the share of the change from beta to beta_end that is done, 0 to 1."""
    match schedule:
        case Constant():
            return 0.0
        case Linear():
            return progress
        case Cosine():
            return (1 - math.cos(math.pi * progress)) / 2
        case Step(milestones=milestones):
            return bisect_right(milestones, progress) / len(milestones)
        case HoldThenAnneal(anneal_fraction=fraction):
            return max(0.0, (progress - (1 - fraction)) / fraction)
    raise TypeError(f"no beta schedule: {schedule!r}")
