"""How beta changes during a run; in ORPO beta is the weight of the odds-ratio loss.

The functions are pure. Beta depends only on the configuration and on the number of the optimizer
step; for an adaptive schedule, on the margins of the batches so far. So beta is the same after a
resume.
"""

import math
from bisect import bisect_right

from orpo_lab.config.beta_schedule import (
    Adaptive,
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

    Every schedule but constant starts at `beta` and ends at `beta_end`, which may be higher. An
    adaptive schedule has no beta of its own at a step; its `beta` is that of an average batch.
    """
    return beta + (beta_end - beta) * _share_moved(schedule, progress)


def betas(schedule: BetaSchedule, num_steps: int, *, beta: float, beta_end: float) -> list[float]:
    """Return beta at every step of a run of `num_steps` steps; see `beta_at`."""
    return [
        beta_at(schedule, progress(step, num_steps), beta=beta, beta_end=beta_end)
        for step in range(num_steps)
    ]


def _share_moved(schedule: BetaSchedule, progress: float) -> float:
    """Return the share of the change from beta to beta_end that is done, 0 to 1."""
    match schedule:
        case Constant() | Adaptive():
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


def adapted(
    schedule: Adaptive, margin: float, average: float | None, *, beta: float, direction: int
) -> tuple[float, float | None]:
    """Return beta for a batch, and the new average of margins.

    The batch-level rule of beta-DPO (Wu et al. 2024, arXiv:2407.08639):
    beta_t = (1 + alpha (M_t - M)) beta, where M <- m M + (1 - m) M_t. M is the average of the
    batches before. The change is cut off at `max_change`, so beta stays positive. A batch that is
    separated well gets less preference.

    Args:
        schedule: its alpha, m and `max_change`.
        margin: M_t, the batch's mean margin. If it is not finite, beta and the average stay.
        average: M; None: this is the first batch, whose margin is the average.
        beta: the beta of a batch of average margin.
        direction: 1 if a higher beta means less preference (DPO), -1 if it means more (ORPO).
    """
    if not math.isfinite(margin):
        return beta, average
    average = margin if average is None else average
    change = schedule.alpha * (margin - average)
    change = max(-schedule.max_change, min(schedule.max_change, change))
    moved = schedule.momentum * average + (1 - schedule.momentum) * margin
    return beta * (1 + direction * change), moved
