"""The ORPO objective (Hong, Lee and Thorne 2024, arXiv:2403.07691), as functions of tensors."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from orpo_lab.config.method import OrpoMethod
from orpo_lab.methods.base import Losses, mean_logps, preference_terms


@dataclass(frozen=True)
class Orpo:
    """L = L_SFT + beta L_OR (Eq. 6); beta is the paper's lambda."""

    config: OrpoMethod
    """Which tokens L_SFT covers, how L_SFT averages over them, and which penalty is used."""

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt is part of L_SFT."""
        return self.config.nll_scope == "prompt_and_completion"

    def num_supervised(self, counts: Tensor) -> Tensor:
        """Return how many tokens of each pair L_SFT covers, [B]."""
        return supervised(counts, self.config)

    def losses(
        self,
        logps: Tensor,
        counts: Tensor,
        *,
        beta: float,
        num_tokens: Tensor,
        num_pairs: Tensor,
    ) -> Losses:
        """Return the share of some pairs in the step's ORPO loss; see `Method.losses`.

        The terms have TRL's names; `odds_ratio_loss` is L_OR (Eq. 7) of each pair.
        """
        chosen, rejected = mean_logps(logps, counts)
        sft_logps, sft_counts = (supervised(sums, self.config) for sums in (logps, counts))
        if self.config.nll_mean == "tokens":
            nll = -sft_logps.sum() / num_tokens
        else:
            nll = -(sft_logps / sft_counts).sum() / num_pairs
        log_odds = log_odds_ratio(chosen, rejected)
        log_sigmoid = logsigmoid(log_odds)
        odds_ratio = -log_sigmoid if self.config.penalty == "log_sigmoid" else -log_odds
        loss = nll + beta * odds_ratio.sum() / num_pairs
        terms = {
            "rewards/chosen": beta * chosen,
            "rewards/rejected": beta * rejected,
            "rewards/accuracies": (beta * chosen > beta * rejected).to(chosen),
            "rewards/margins": beta * (chosen - rejected),
            # Scaled so that the mean over all pairs of the step is L_SFT of the step
            "nll_loss": (nll * num_pairs / len(chosen)).expand_as(chosen),
            "log_odds_ratio": log_sigmoid,
            "log_odds_chosen": log_odds,
            "odds_ratio_loss": odds_ratio,
        }
        return Losses(loss, terms | preference_terms(chosen, rejected))


def supervised(sums: Tensor, config: OrpoMethod) -> Tensor:
    """Return the sum of the columns that L_SFT covers, [B].

    Args:
        sums: columns of prompt, chosen and rejected, [B, 3].
        config: says whether L_SFT covers the prompt too.
    """
    if config.nll_scope == "prompt_and_completion":
        return sums[:, 0] + sums[:, 1]
    return sums[:, 1]


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x <= 0, of any shape; value and gradient are finite.

    Two formulas avoid cancellation as x nears 0, split at x = -ln 2 (Maechler 2012, "Accurately
    computing log(1 - exp(-|a|))"). Each formula gets only values of x that it is meant for.
    Otherwise the gradient of the formula that `where` leaves out would be multiplied by 0, and 0
    times infinity is NaN.

    At P = exp(x) = 1 the odds are not defined. There x is replaced by the nearest normal number
    below 0, where value and slope are finite, and x itself gets no gradient. docs/method.md says
    why.
    """
    split, nearest = -math.log(2), -torch.finfo(x.dtype).tiny
    small = torch.log1p(-torch.exp(x.clamp(max=split)))
    large = torch.log(-torch.expm1(x.clamp(split, nearest)))
    return torch.where(x < split, small, large)


def log_odds_ratio(chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
    """Return log odds(y_w|x) - log odds(y_l|x), shape [B] (Eq. 4 and the argument of Eq. 7).

    Args:
        chosen_logps: log P(y_w|x), the mean log-probability of a token (Eq. 3), [B], in nats.
        rejected_logps: log P(y_l|x), likewise of the rejected completion, [B], in nats.
    """
    wide = torch.promote_types(chosen_logps.dtype, torch.float32)
    chosen, rejected = chosen_logps.to(wide), rejected_logps.to(wide)
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
