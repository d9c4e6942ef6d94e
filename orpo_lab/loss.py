"""The odds ratio of ORPO (Hong, Lee and Thorne 2024, arXiv:2403.07691), as functions of tensors."""

import math

import torch
from torch import Tensor


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x < 0, any shape, without cancellation as x nears 0.

    The split at -ln 2 is that of Maechler 2012, "Accurately computing log(1 - exp(-|a|))".
    """
    return torch.where(x < -math.log(2), torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))


def log_odds_ratio(chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
    """Return log odds(y_w|x) - log odds(y_l|x), shape [B] (Eq. 4 and the argument of Eq. 7).

    Args:
        chosen_logps: log P(y_w|x), the mean log-probability of a token (Eq. 3), [B], in nats.
        rejected_logps: the same of the rejected completion, [B].
    """
    chosen, rejected = chosen_logps.float(), rejected_logps.float()
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
