"""The ORPO objective (Hong, Lee and Thorne 2024, arXiv:2403.07691), as functions of tensors."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from orpo_lab.config.method import OrpoMethod
from orpo_lab.methods.base import (
    Batch,
    Losses,
    mean_logps,
    nll,
    nll_term,
    preference_terms,
    reward_terms,
    scope,
)
from orpo_lab.methods.odds import log_odds_ratio


@dataclass(frozen=True)
class Orpo:
    """L = L_SFT + beta L_OR (Eq. 6); beta is the paper's lambda."""

    config: OrpoMethod
    """Which tokens L_SFT covers, how L_SFT averages over them, and which penalty is used."""

    reads_rejected = True
    needs_reference = False
    needs_divergence = False

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt is part of L_SFT."""
        return self.config.nll_scope == "prompt_and_completion"

    def num_supervised(self, counts: Tensor) -> Tensor:
        """Return how many tokens of each pair L_SFT covers, [B]."""
        return counts[:, scope(self.config)].sum(1)

    def losses(self, batch: Batch, beta: float) -> Losses:
        """Return the share of some pairs in the step's ORPO loss; see `Method.losses`.

        The terms have TRL's names. `odds_ratio_loss` is the penalty of each pair: L_OR (Eq. 7), or
        minus the log odds ratio if `method.penalty` is log_odds.
        """
        chosen, rejected = mean_logps(batch)
        by_sequence = self.config.nll_mean == "sequences"
        likelihood = nll(batch, scope(self.config), by_sequence=by_sequence)
        log_odds = log_odds_ratio(chosen, rejected)
        log_sigmoid = logsigmoid(self.config.log_odds_scale * log_odds)
        odds_ratio = -log_sigmoid if self.config.penalty == "log_sigmoid" else -log_odds
        terms = {
            "nll_loss": nll_term(likelihood, batch),
            "log_odds_ratio": log_sigmoid,
            "log_odds_chosen": log_odds,
            "odds_ratio_loss": odds_ratio,
        }
        terms |= reward_terms(beta * chosen, beta * rejected) | preference_terms(chosen, rejected)
        return Losses(likelihood, beta * odds_ratio.sum() / batch.num_pairs, terms)
