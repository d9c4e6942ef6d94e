"""The interface through which an engine calls a method."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Losses:
    """A method's result for some of a step's pairs, B of them."""

    loss: Tensor
    """The share of these pairs in the step's loss, a scalar: the shares add up to the loss."""
    terms: dict[str, Tensor]
    """A figure for each pair, [B], by the name under which it is logged."""


class Method(Protocol):
    """A method, as an engine calls it."""

    @property
    def scores_prompt(self) -> bool:
        """Whether the loss needs the prompt's log-probabilities."""

    def num_supervised(self, counts: Tensor) -> Tensor:
        """Return how many tokens of each pair the method's likelihood term covers, [B].

        Args:
            counts: numbers of tokens of prompt, chosen and rejected, [B, 3].
        """

    def losses(
        self,
        logps: Tensor,
        counts: Tensor,
        *,
        beta: float,
        num_tokens: Tensor,
        num_pairs: Tensor,
    ) -> Losses:
        """Return the share of B pairs in the loss of their optimizer step, and the pairs' terms.

        Args:
            logps: sums of log-probabilities over the prompt, the chosen and the rejected tokens of
                each pair, [B, 3], in nats. The prompt's sum is 0 if the method does not score
                prompts.
            counts: how many tokens each sum is over, [B, 3].
            beta: weight of the method's preference term.
            num_tokens: number of supervised tokens of the whole step, a scalar.
            num_pairs: number of pairs of the whole step, a scalar.
        """


def mean_logps(logps: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return log P(y|x) of both completions, [B] each: the mean over a completion's tokens.

    Args:
        logps: sums of log-probabilities over prompt, chosen and rejected, [B, 3], in nats.
        counts: how many tokens each sum is over, [B, 3].
    """
    return logps[:, 1] / counts[:, 1], logps[:, 2] / counts[:, 2]


def preference_terms(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Return the terms that every method logs, each [B]; no term depends on beta.

    Args:
        chosen: log P(y_w|x) of each pair, [B], in nats.
        rejected: log P(y_l|x) of each pair, [B], in nats.
    """
    return {
        "logps/rejected": rejected,
        "logps/chosen": chosen,
        "preference_accuracy": (chosen > rejected).to(chosen),
        "logp_margin": chosen - rejected,
    }
