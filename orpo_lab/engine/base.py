"""The interface through which the training loop calls an engine."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

# Token ids of `prompt_ids`, `chosen_ids` and `rejected_ids`; MASKS of `data.encode` if the sums of
# log-probabilities leave tokens out; and REFERENCE and MISMATCHED if the method needs them. A row
# of data with a single completion has no token on the other side
Pair = Mapping[str, Any]
COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids"]
# The column with the reference's sums of log-probabilities over chosen and rejected tokens, [2].
# With MISMATCHED, those of the mismatched completions follow, [4]
REFERENCE = "reference"
# The column with `chosen_ids` and `rejected_ids` of another pair; see `engine.mismatched`
MISMATCHED = "mismatched"
MicroBatch = dict[str, Any]


@dataclass(frozen=True)
class Sums:
    """M metrics of some pairs, each summed over the pairs, on the device."""

    names: tuple[str, ...]
    values: Tensor
    """The sum of each metric over the pairs, [M], without an autograd graph."""
    nums: Tensor
    """How many figures each sum is over, [M]: the number of pairs, unless some pairs lack it."""


@dataclass(frozen=True)
class Score:
    """The result of scoring one micro-batch."""

    loss: Tensor
    """The micro-batch's share of the step's loss, a scalar: the shares add up to the loss."""
    sums: Sums
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """The loss by its terms, see `methods.base.Losses.parts`. Empty: the engine does not tell the
    terms apart."""


class Engine(Protocol):
    """Lays out the pairs of a step, and scores them.

    The metrics have TRL's names. `preference_accuracy`, `logp_margin` and `odds_ratio_loss` are
    added to TRL's metrics, and do not depend on beta.
    """

    token_budget: int | None
    """The token budget that was measured, or lowered after memory ran out. None: the
    configuration's is in use."""

    def micro_batches(self, pairs: Sequence[Pair]) -> list[MicroBatch]:
        """Return all pairs of a step, or of an evaluation batch, as micro-batches on the device."""

    def reading(self) -> AbstractContextManager[None]:
        """Return a context manager, inside which the model can read this engine's micro-batches."""

    def score(self, micro_batch: MicroBatch, beta: float) -> Score:
        """Return the micro-batch's share of the loss, and its metrics.

        Args:
            micro_batch: one of the micro-batches that `micro_batches` returned.
            beta: the method's beta in this step.
        """

    def recover(self, error: BaseException, micro_batches: Sequence[MicroBatch], step: int) -> bool:
        """Change what made a step fail, for this step and all later ones, and log a warning.

        Args:
            error: the error that ended the step.
            micro_batches: those of the failed step.
            step: the number of that step, 1 for the first.

        Returns:
            Whether the step can be taken again; False: the engine cannot help.
        """

    def fit_budget(self, used: int, room: int) -> None:
        """Raise the token budget to what fits in memory, unless the configuration sets it.

        Args:
            used: bytes that the activations of the first step took at their peak.
            room: bytes that activations can take.
        """
