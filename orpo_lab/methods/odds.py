"""Odds of completions, from their log-probabilities."""

import math

import torch
from torch import Tensor


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
