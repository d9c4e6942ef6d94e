"""The ORPO objective (Hong, Lee and Thorne 2024, arXiv:2403.07691), as functions of tensors."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from orpo_lab.config import Objective


@dataclass(frozen=True)
class Losses:
    """The objective over some of a step's pairs, B of them, and what it is made of."""

    loss: Tensor
    """Their share of the step's loss, a scalar: the shares of a step add up to its loss (Eq. 6)."""
    nll: Tensor
    """Their share of L_SFT, a scalar."""
    odds_ratio: Tensor
    """L_OR of each pair (Eq. 7), [B]."""
    log_odds: Tensor
    """The log odds ratio of each pair, [B]."""
    chosen_logps: Tensor
    """log P(y_w|x), the mean over the completion's tokens (Eq. 3), [B]."""
    rejected_logps: Tensor
    """log P(y_l|x), [B]."""


def orpo(
    logps: Tensor,
    counts: Tensor,
    *,
    beta: float,
    objective: Objective,
    num_tokens: Tensor,
    num_pairs: Tensor,
) -> Losses:
    """Return L = L_SFT + beta L_OR of some pairs of an optimizer step, as their share of it.

    Args:
        logps: sums of log-probabilities over the prompt, the chosen and the rejected tokens of each
            pair, [B, 3], in nats. The prompt's is 0 where the objective leaves the prompt out.
        counts: how many tokens each sum is over, [B, 3].
        beta: weight of L_OR, the paper's lambda.
        objective: which tokens L_SFT is over, how they are averaged, and the penalty.
        num_tokens: tokens that L_SFT is over in the whole step, a scalar.
        num_pairs: pairs of the whole step, a scalar.
    """
    chosen, rejected = (logps[:, side] / counts[:, side] for side in (1, 2))
    sft_logps, sft_counts = (supervised(sums, objective) for sums in (logps, counts))
    if objective.nll_mean == "tokens":
        nll = -sft_logps.sum() / num_tokens
    else:
        nll = -(sft_logps / sft_counts).sum() / num_pairs
    log_odds = log_odds_ratio(chosen, rejected)
    odds_ratio = -logsigmoid(log_odds) if objective.penalty == "log_sigmoid" else -log_odds
    loss = nll + beta * odds_ratio.sum() / num_pairs
    return Losses(loss, nll, odds_ratio, log_odds, chosen, rejected)


def supervised(sums: Tensor, objective: Objective) -> Tensor:
    """Add up the columns of [B, 3] (prompt, chosen, rejected) that L_SFT is over, [B]."""
    if objective.nll_scope == "prompt_and_completion":
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
