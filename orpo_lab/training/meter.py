"""What is measured while a run trains: the cost of training, and the means of the metrics."""

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
    """Measures the cost of training; the cost before a resume is included."""

    def __init__(self, before: Spent) -> None:
        self.before = before
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
        )


@dataclass
class Means:
    """The means of metrics over all pairs since the last line."""

    names: tuple[str, ...] = ()
    sums: Tensor | None = None

    def add(self, some: Sums) -> None:
        """Add the metrics of some pairs; every figure weighs the same."""
        self.names = some.names
        both = torch.cat([some.values, some.nums.to(some.values)])
        self.sums = both if self.sums is None else self.sums + both

    def take(self) -> Tensor:
        """Return the sums of M metrics and what each is a sum of, [2 M], and reset the sums."""
        assert self.sums is not None
        sums, self.sums = self.sums, None
        return sums

    def named(self, taken: Sequence[float]) -> dict[str, float]:
        """Return the mean of each metric that some pair has.

        Args:
            taken: what `take` returned.
        """
        sums, nums = taken[: len(self.names)], taken[len(self.names) :]
        given = zip(self.names, sums, nums, strict=True)
        return {name: total / num for name, total, num in given if num}
