"""Methods of preference without a reference, as functions of tensors: CPO and SimPO."""

from dataclasses import dataclass

from torch import Tensor

from orpo_lab.config.method import CpoMethod, SimpoMethod
from orpo_lab.methods.base import (
    Batch,
    Losses,
    mean_logps,
    nll,
    nll_term,
    preference_terms,
    reward_terms,
)
from orpo_lab.methods.dpo import smoothed

COMPLETION = slice(1, 2)


@dataclass(frozen=True)
class Cpo:
    """Contrastive preference optimization (Xu et al. 2024, arXiv:2401.08417, Eq. 3 to 5).

    L = -log sigmoid(beta (log pi(y_w|x) - log pi(y_l|x))) + `sft_weight` L_SFT, with sums of
    log-probabilities over a completion's tokens. L_SFT is the mean over all tokens of the chosen
    completions, as in TRL.
    """

    config: CpoMethod

    scores_prompt = False
    reads_rejected = True
    needs_reference = False
    needs_divergence = False

    def num_supervised(self, counts: Tensor) -> Tensor:
        """Return the number of tokens of each chosen completion, [B]."""
        return counts[:, 1]

    def losses(self, batch: Batch, beta: float) -> Losses:
        """Return the share of some pairs in the step's CPO loss; see `Method.losses`."""
        chosen, rejected = batch.logps[:, 1], batch.logps[:, 2]
        loss = smoothed(beta * (chosen - rejected), self.config.label_smoothing)
        return _with_likelihood(batch, loss, (beta * chosen, beta * rejected), self.config)


@dataclass(frozen=True)
class Simpo:
    """Simple preference optimization (Meng, Xia and Chen 2024, arXiv:2405.14734, Eq. 6).

    L = -log sigmoid(beta (log P(y_w|x) - log P(y_l|x)) - gamma), with means of log-probabilities
    over a completion's tokens. `sft_weight` adds the weighted L_SFT of CPO (CPO-SimPO).
    """

    config: SimpoMethod

    scores_prompt = False
    reads_rejected = True
    needs_reference = False
    needs_divergence = False

    def num_supervised(self, counts: Tensor) -> Tensor:
        """Return the number of tokens of each chosen completion, [B]."""
        return counts[:, 1]

    def losses(self, batch: Batch, beta: float) -> Losses:
        """Return the share of some pairs in the step's SimPO loss; see `Method.losses`."""
        chosen, rejected = mean_logps(batch)
        loss = smoothed(beta * (chosen - rejected) - self.config.gamma, smoothing=0.0)
        return _with_likelihood(batch, loss, (beta * chosen, beta * rejected), self.config)


def _with_likelihood(
    batch: Batch, loss: Tensor, rewards: tuple[Tensor, Tensor], config: CpoMethod | SimpoMethod
) -> Losses:
    """Return a preference loss with the weighted L_SFT beside it.

    Args:
        batch: B pairs.
        loss: preference loss of each pair, [B].
        rewards: of the chosen and the rejected completions, [B] each.
        config: has the weight of L_SFT.
    """
    share = nll(batch, COMPLETION, by_sequence=False)
    terms = {"nll_loss": nll_term(share, batch), "preference_loss": loss, **reward_terms(*rewards)}
    terms |= preference_terms(*mean_logps(batch))
    likelihood = config.sft_weight * share if config.sft_weight else None
    return Losses(likelihood, loss.sum() / batch.num_pairs, terms)
