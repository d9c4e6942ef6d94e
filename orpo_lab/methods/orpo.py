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
    """Which tokens L_SFT is over, how they are averaged, and the penalty."""

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt is part of L_SFT."""
        return self.config.nll_scope == "prompt_and_completion"

    def num_supervised(self, counts: Tensor) -> Tensor:
        """Return the tokens of each pair that L_SFT is over, [B]."""
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
        """Return the objective of some pairs, as their share of a step; see `Method.losses`.

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
            # The mean of a share of L_SFT over its pairs is that share of the step's pairs
            "nll_loss": (nll * num_pairs / len(chosen)).expand_as(chosen),
            "log_odds_ratio": log_sigmoid,
            "log_odds_chosen": log_odds,
            "odds_ratio_loss": odds_ratio,
        }
        return Losses(loss, terms | preference_terms(chosen, rejected))


def supervised(sums: Tensor, config: OrpoMethod) -> Tensor:
    """Add up the columns of [B, 3] (prompt, chosen, rejected) that L_SFT is over, [B]."""
    if config.nll_scope == "prompt_and_completion":
        return sums[:, 0] + sums[:, 1]
    return sums[:, 1]


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x <= 0, any shape, finite in value and in gradient.

    The split at -ln 2, against cancellation as x nears 0, is that of Maechler 2012, "Accurately
    computing log(1 - exp(-|a|))". Each form sees only what it is for: the gradient of a form that
    `where` leaves out would be multiplied by 0, and 0 times infinity is NaN.

    P = exp(x) = 1 has no odds. There x is taken for the nearest normal number below 0, of which
    value and slope are finite; x itself gets no gradient. docs/method.md says why.
    """
    split, nearest = -math.log(2), -torch.finfo(x.dtype).tiny
    small = torch.log1p(-torch.exp(x.clamp(max=split)))
    large = torch.log(-torch.expm1(x.clamp(split, nearest)))
    return torch.where(x < split, small, large)


def log_odds_ratio(chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
    """Return log odds(y_w|x) - log odds(y_l|x), shape [B] (Eq. 4 and the argument of Eq. 7).

    Args:
        chosen_logps: log P(y_w|x), the mean log-probability of a token (Eq. 3), [B], in nats.
        rejected_logps: the same of the rejected completion, [B].
    """
    wide = torch.promote_types(chosen_logps.dtype, torch.float32)
    chosen, rejected = chosen_logps.to(wide), rejected_logps.to(wide)
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
