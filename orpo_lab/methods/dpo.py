"""Methods that compare a model with its reference, as functions of tensors: DPO and IPO."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from orpo_lab.config.method import DpoMethod
from orpo_lab.methods.base import Batch, Losses, mean_logps, preference_terms, reward_terms


@dataclass(frozen=True)
class Dpo:
    """Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290, Eq. 7).

    L = -log sigmoid(beta (r_w - r_l)). The log ratio r = log pi(y|x) - log pi_ref(y|x) is a sum
    over the completion's tokens. With `label_smoothing` e, the loss is (1 - e) L(r_w - r_l) +
    e L(r_l - r_w): a share e of the labels is taken to be wrong (conservative DPO).
    """

    config: DpoMethod

    scores_prompt = False
    reads_rejected = True
    needs_reference = True
    needs_divergence = False

    def num_supervised(self, counts: Tensor) -> Tensor:
        """Return 0 for each pair, [B]: there is no likelihood term."""
        return torch.zeros_like(counts[:, 0])

    def losses(self, batch: Batch, beta: float) -> Losses:
        """Return the share of some pairs in the step's DPO loss; see `Method.losses`."""
        chosen, rejected = log_ratios(batch).unbind(1)
        loss = smoothed(beta * (chosen - rejected), self.config.label_smoothing)
        terms = {"preference_loss": loss, **reward_terms(beta * chosen, beta * rejected)}
        terms |= preference_terms(*mean_logps(batch))
        return Losses(None, loss.sum() / batch.num_pairs, terms)


@dataclass(frozen=True)
class Ipo:
    """Identity preference optimization (Azar et al. 2023, arXiv:2310.12036, Eq. 17).

    L = (r_w - r_l - 1 / (2 beta))^2; beta is the paper's tau. The log ratio r is the mean over the
    completion's tokens, not the sum: TRL's choice, which the paper's authors have confirmed there.
    """

    scores_prompt = False
    reads_rejected = True
    needs_reference = True
    needs_divergence = False

    def num_supervised(self, counts: Tensor) -> Tensor:
        """Return 0 for each pair, [B]: there is no likelihood term."""
        return torch.zeros_like(counts[:, 0])

    def losses(self, batch: Batch, beta: float) -> Losses:
        """Return the share of some pairs in the step's IPO loss; see `Method.losses`."""
        ratios = log_ratios(batch)
        chosen, rejected = (ratios / batch.counts[:, 1:]).unbind(1)
        loss = (chosen - rejected - 1 / (2 * beta)).square()
        rewards = (beta * ratios).unbind(1)
        terms = {"preference_loss": loss, **reward_terms(*rewards)}
        terms |= preference_terms(*mean_logps(batch))
        return Losses(None, loss.sum() / batch.num_pairs, terms)


def log_ratios(batch: Batch) -> Tensor:
    """Return log pi(y|x) - log pi_ref(y|x) of both completions of each pair, [B, 2], in nats."""
    assert batch.reference is not None, "the method says that it needs a reference"
    return batch.logps[:, 1:] - batch.reference


def smoothed(logits: Tensor, smoothing: float) -> Tensor:
    """Return -log sigmoid(logits), [B], where a share of the labels is taken to be wrong.

    Args:
        logits: how much better the chosen completion is, [B].
        smoothing: the share of labels that are taken to be wrong, 0 to below 0.5.
    """
    return -(1 - smoothing) * logsigmoid(logits) - smoothing * logsigmoid(-logits)
