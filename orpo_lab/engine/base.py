"""What the training loop asks of an engine."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

# Token ids of `prompt_ids`, `chosen_ids` and `rejected_ids`
Pair = Mapping[str, list[int]]
COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids"]
MicroBatch = dict[str, Any]


@dataclass(frozen=True)
class Sums:
    """Metrics of some pairs, added up on the device; M metrics."""

    names: tuple[str, ...]
    values: Tensor
    """Of each metric the sum over the pairs, [M]; without a graph."""
    num_pairs: int


@dataclass(frozen=True)
class Score:
    """What an engine makes of a micro-batch."""

    loss: Tensor
    """The micro-batch's share of the step's loss, a scalar: the shares add up to the loss."""
    sums: Sums


class Engine(Protocol):
    """Lays out the pairs of a step, and scores them.

    Its metrics have TRL's names, and `preference_accuracy`, `logp_margin` and `odds_ratio_loss`,
    which are free of beta.
    """

    token_budget: int | None
    """Tokens of a micro-batch, where memory ran out with those of the configuration."""

    def micro_batches(self, pairs: Sequence[Pair]) -> list[MicroBatch]:
        """Return all pairs of a step, or of an evaluation's batch, on the device."""

    def reading(self) -> AbstractContextManager[None]:
        """Return a context in which the model reads this engine's micro-batches."""

    def score(self, micro_batch: MicroBatch, beta: float) -> Score:
        """Return the micro-batch's share of the loss, and its metrics.

        Args:
            micro_batch: of `micro_batches`.
            beta: weight of the odds-ratio loss.
        """

    def halve_budget(self, micro_batches: Sequence[MicroBatch], step: int) -> bool:
        """Lay out all that follows in micro-batches of half the tokens, and say so.

        Args:
            micro_batches: of the step that found no memory.
            step: its number, 1 for the first.

        Returns:
            False where micro-batches cannot be made smaller.
        """
