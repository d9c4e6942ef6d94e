"""What is measured while a run trains: the cost of training, and the means of the metrics."""

import math
import time
from dataclasses import dataclass

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
    num_pairs: int = 0

    def add(self, some: Sums) -> None:
        """Add the metrics of some pairs; every pair weighs the same."""
        self.names = some.names
        self.sums = some.values if self.sums is None else self.sums + some.values
        self.num_pairs += some.num_pairs

    def take(self) -> Tensor:
        """Return the mean of each of M metrics, [M], on the device, and reset the sums."""
        assert self.sums is not None
        means = self.sums / self.num_pairs
        self.sums, self.num_pairs = None, 0
        return means
