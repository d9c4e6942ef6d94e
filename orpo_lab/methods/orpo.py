"""The ORPO objective (Hong, Lee and Thorne 2024, arXiv:2403.07691), as functions of tensors."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from orpo_lab.config.method import OrpoMethod
from orpo_lab.methods.base import Losses, mean_logps, preference_terms
from orpo_lab.methods.odds import log_odds_ratio


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

        The terms have TRL's names. `odds_ratio_loss` is the penalty of each pair: L_OR (Eq. 7), or
        minus the log odds ratio if `method.penalty` is log_odds.
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
