"""What an engine asks of a method."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Losses:
    """What a method makes of some of a step's pairs, B of them."""

    loss: Tensor
    """Their share of the step's loss, a scalar: the shares of a step add up to the loss."""
    terms: dict[str, Tensor]
    """Figures of each pair, [B], under the names that are logged."""


class Method(Protocol):
    """What an engine needs to know of a method."""

    @property
    def scores_prompt(self) -> bool:
        """Whether the loss needs the prompt's log-probabilities."""

    def num_supervised(self, counts: Tensor) -> Tensor:
        """Return the tokens of each pair that the method's likelihood term is over, [B].

        Args:
            counts: tokens of prompt, chosen and rejected, [B, 3].
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
        """Return the loss of some pairs of an optimizer step, as their share of it.

        Args:
            logps: sums of log-probabilities over the prompt, the chosen and the rejected tokens of
                each pair, [B, 3], in nats. The prompt's is 0 where the method does not score it.
            counts: how many tokens each sum is over, [B, 3].
            beta: the method's weight of preference.
            num_tokens: the supervised tokens of the whole step, a scalar.
            num_pairs: pairs of the whole step, a scalar.
        """


def mean_logps(logps: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return log P(y|x) of both completions, [B] each: the mean over a completion's tokens.

    Args:
        logps: sums over prompt, chosen and rejected, [B, 3].
        counts: how many tokens each sum is over, [B, 3].
    """
    return logps[:, 1] / counts[:, 1], logps[:, 2] / counts[:, 2]


def preference_terms(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Return the figures that every method has, free of beta, of each pair, [B].

    Args:
        chosen: log P(y_w|x) of each pair, [B], in nats.
        rejected: log P(y_l|x), [B].
    """
    return {
        "logps/rejected": rejected,
        "logps/chosen": chosen,
        "preference_accuracy": (chosen > rejected).to(chosen),
        "logp_margin": chosen - rejected,
    }
