"""KTO, a method for single completions that are labelled good or bad, as functions of tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from orpo_lab.config.method import KtoMethod
from orpo_lab.methods.base import Batch, Losses, preference_terms, reward_terms
from orpo_lab.methods.dpo import log_ratios


@dataclass(frozen=True)
class Kto:
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv:2402.01306, Eq. 7).

    The loss of a chosen completion is w_D (1 - sigmoid(beta (r - z))), that of a rejected one
    w_U (1 - sigmoid(beta (z - r))). The log ratio r = log pi(y|x) - log pi_ref(y|x) is a sum over
    the completion's tokens, z is `Batch.divergence`. The mean is over all completions of the step.
    A pair may have one completion alone.
    """

    config: KtoMethod
    """The weights w_D and w_U."""

    scores_prompt = False
    reads_rejected = True
    needs_reference = True
    needs_divergence = True

    def num_supervised(self, counts: Tensor) -> Tensor:
        """Return the number of completions of each pair, [B]."""
        return (counts[:, 1:] > 0).sum(1)

    def losses(self, batch: Batch, beta: float) -> Losses:
        """Return the share of some pairs in the step's KTO loss; see `Method.losses`."""
        assert batch.divergence is not None, "the method says that it needs the divergence"
        has, ratios = batch.counts[:, 1:] > 0, log_ratios(batch)
        # 1 - sigmoid(x) is sigmoid(-x)
        chosen, rejected = (beta * (batch.divergence - ratios)).unbind(1)
        losses = torch.stack(
            [
                self.config.desirable_weight * chosen.sigmoid(),
                self.config.undesirable_weight * (-rejected).sigmoid(),
            ],
            dim=1,
        )
        losses = losses.where(has, 0)
        means = batch.logps[:, 1:] / batch.counts[:, 1:].clamp(min=1)
        by_side = reward_terms(*(beta * ratios).unbind(1)) | preference_terms(*means.unbind(1))
        nums = {name: _num(name, has) for name in by_side} | {"preference_loss": has.sum(1)}
        terms = {
            "preference_loss": losses.sum(1),
            **{name: term * nums[name] for name, term in by_side.items()},
            "kl": batch.divergence.expand(len(has)),
        }
        return Losses(None, losses.sum() / batch.num_supervised, terms, nums)


def _num(name: str, has: Tensor) -> Tensor:
    """Return which pairs have a term, [B]: the one side that it names, or else both sides.

    Args:
        name: of the term.
        has: whether each pair has a chosen and a rejected completion, [B, 2].
    """
    match name.rpartition("/")[2]:
        case "chosen":
            return has[:, 0]
        case "rejected":
            return has[:, 1]
    return has.all(1)
