"""Supervised fine-tuning on the chosen completions alone."""

from dataclasses import dataclass

from torch import Tensor

from orpo_lab.config.method import SftMethod
from orpo_lab.methods.base import Batch, Losses, nll, nll_term, scope


@dataclass(frozen=True)
class Sft:
    """L = L_SFT, the negative log-likelihood of the chosen completions; beta is not read."""

    config: SftMethod
    """Which tokens L_SFT covers, and how L_SFT averages over them."""

    reads_rejected = False
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
        """Return the share of some pairs in the step's L_SFT; see `Method.losses`."""
        by_sequence = self.config.nll_mean == "sequences"
        likelihood = nll(batch, scope(self.config), by_sequence=by_sequence)
        terms = {
            "nll_loss": nll_term(likelihood, batch),
            "logps/chosen": batch.logps[:, 1] / batch.counts[:, 1],
        }
        return Losses(likelihood, None, terms)
