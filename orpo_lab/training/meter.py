"""What is measured while a run trains: the cost of training, and the sums of the metrics."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orpo_lab import memory
from orpo_lab.engine.base import Sums
from orpo_lab.training.checkpoint import Spent


class Meter:
    """Measures the cost of training; the cost before a resume is included.

    Args:
        before: the cost up to the checkpoint that the run goes on from.
        reference_seconds: what this start of the run has spent on its reference.
    """

    def __init__(self, before: Spent, reference_seconds: float = 0.0) -> None:
        self.before = before
        self.reference_seconds = before.reference_seconds + reference_seconds
        self.num_skipped = before.num_skipped
        self._begin = math.nan

    def start(self) -> None:
        """Begin to measure; called before the first step."""
        memory.reset_peak()
        self._begin = time.perf_counter()

    def spent(self, token_budget: int | None = None) -> Spent:
        """Return the cost so far.

        Args:
            token_budget: see `Spent.token_budget`.
        """
        return Spent(
            wall_seconds=self.before.wall_seconds + time.perf_counter() - self._begin,
            peak_memory_bytes=max(self.before.peak_memory_bytes, memory.peak_bytes()),
            num_skipped=self.num_skipped,
            token_budget=token_budget,
            num_shared=self.before.num_shared,
            reference_seconds=self.reference_seconds,
        )


@dataclass
class Since:
    """What was summed since the last line of metrics; checkpoints hold these sums.

    So lines of metrics are the same, whether and where checkpoints are written between them.
    """

    names: tuple[str, ...] = ()
    """Names of M metrics."""
    sums: Tensor | None = None
    """Sums of the metrics over pairs, then the number of values in each sum, [2 M]."""
    total_loss: Tensor | float = 0.0
    """Sum of the steps' losses, on the device."""
    num_steps: int = 0
    num_skipped: int = 0
    """Number of skipped steps among them."""

    def add(self, some: Sums) -> None:
        """Add the metrics of some pairs; every figure weighs the same."""
        self.names = some.names
        both = torch.cat([some.values, some.nums.to(some.values)])
        self.sums = both if self.sums is None else self.sums + both

    def add_step(self, loss: Tensor, *, is_skipped: bool) -> None:
        """Add the loss of a step, a scalar, and count the step."""
        self.total_loss = self.total_loss + loss
        self.num_steps += 1
        self.num_skipped += is_skipped

    def named(self, taken: Sequence[float]) -> dict[str, float]:
        """Return the mean of each metric that some pair has.

        Args:
            taken: the values of `sums`.
        """
        sums, nums = taken[: len(self.names)], taken[len(self.names) :]
        given = zip(self.names, sums, nums, strict=True)
        return {name: total / num for name, total, num in given if num}
