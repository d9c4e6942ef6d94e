"""The interface through which an engine calls a method."""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from orpo_lab.config.method import OrpoMethod, SftMethod

# Names of the two terms of a loss
LIKELIHOOD, PREFERENCE = "likelihood", "preference"


@dataclass(frozen=True)
class Batch:
    """Some of a step's pairs, B of them, as a method sees them."""

    logps: Tensor
    """Sums of log-probabilities over the prompt, the chosen and the rejected tokens of each pair,
    [B, 3], in nats. A sum over tokens that the method does not read is 0."""
    counts: Tensor
    """How many tokens each sum is over, [B, 3]."""
    reference: Tensor | None
    """The same sums of the chosen and the rejected tokens under the reference, the model before
    training, [B, 2]. None: the method needs no reference."""
    num_supervised: Tensor
    """The sum of `Method.num_supervised` over the whole step, a scalar."""
    num_pairs: Tensor
    """The number of pairs of the whole step, a scalar."""
    divergence: Tensor | None = None
    """How far the model is from the reference on mismatched completions, a scalar, in nats: the
    mean over the whole step of log pi(y'|x) - log pi_ref(y'|x), at least 0, without an autograd
    graph. None: the method does not need it."""


@dataclass(frozen=True)
class Losses:
    """A method's result for a batch of B pairs.

    The loss of a step is the sum of a likelihood term, such as L_SFT, and a preference term. A
    batch has a share in each term: the shares add up to the term.
    """

    likelihood: Tensor | None
    """The batch's share in the likelihood term, a scalar. None: the method has no such term."""
    preference: Tensor | None
    """The batch's share in the preference term with its weight, a scalar. None: the method has no
    such term."""
    terms: dict[str, Tensor]
    """A figure for each pair, [B], by the name under which it is logged."""
    nums: dict[str, Tensor] = field(default_factory=dict)
    """For a term of which a pair does not have exactly one figure: how many figures each pair's
    entry is the sum of, [B]. The term's mean is over figures, not over pairs."""

    @property
    def parts(self) -> dict[str, Tensor]:
        """The batch's share in each term that the method has, a scalar, by the term's name."""
        parts = {LIKELIHOOD: self.likelihood, PREFERENCE: self.preference}
        return {name: share for name, share in parts.items() if share is not None}

    @property
    def loss(self) -> Tensor:
        """The batch's share in the step's loss, a scalar."""
        first, *others = self.parts.values()  # a method has at least one term
        return sum(others, start=first)


class Method(Protocol):
    """A method, as an engine calls it."""

    @property
    def scores_prompt(self) -> bool:
        """Whether the loss needs the prompt's log-probabilities."""

    @property
    def reads_rejected(self) -> bool:
        """Whether the loss needs the rejected completions."""

    @property
    def needs_reference(self) -> bool:
        """Whether the loss needs the log-probabilities of the model before training."""

    @property
    def needs_divergence(self) -> bool:
        """Whether the loss needs `Batch.divergence`; such a method needs the reference too."""

    def num_supervised(self, counts: Tensor) -> Tensor:
        """Return how many tokens of each pair the method's likelihood term covers, [B].

        Of a method whose loss is a mean over completions: how many completions each pair has.

        Args:
            counts: numbers of tokens of prompt, chosen and rejected, [B, 3].
        """

    def losses(self, batch: Batch, beta: float) -> Losses:
        """Return the share of B pairs in the loss of their optimizer step, and the pairs' terms.

        Args:
            batch: the pairs.
            beta: the method's beta in this step.
        """


def mean_logps(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return log P(y|x) of both completions, [B] each: the mean over a completion's tokens."""
    return batch.logps[:, 1] / batch.counts[:, 1], batch.logps[:, 2] / batch.counts[:, 2]


def scope(config: OrpoMethod | SftMethod) -> slice:
    """Return the columns of prompt, chosen and rejected that L_SFT covers."""
    return slice(0, 2) if config.nll_scope == "prompt_and_completion" else slice(1, 2)


def nll(batch: Batch, columns: slice, *, by_sequence: bool) -> Tensor:
    """Return the batch's share in a step's negative log-likelihood, a scalar, in nats per token.

    Args:
        batch: the pairs.
        columns: the columns of [B, 3] whose tokens the likelihood covers.
        by_sequence: whether the mean is over pairs, of each pair's mean over its tokens. False: the
            mean is over all supervised tokens of the step.
    """
    logps, counts = batch.logps[:, columns].sum(1), batch.counts[:, columns].sum(1)
    if by_sequence:
        return -(logps / counts).sum() / batch.num_pairs
    return -logps.sum() / batch.num_supervised


def nll_term(share: Tensor, batch: Batch) -> Tensor:
    """Return the term `nll_loss`, [B]: its mean over all pairs of the step is the step's NLL.

    Args:
        share: what `nll` returns.
        batch: the pairs.
    """
    return (share * batch.num_pairs / len(batch.logps)).expand(len(batch.logps))


def reward_terms(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Return TRL's terms of rewards, each [B]; a reward is beta times a log-probability or ratio.

    Args:
        chosen: reward of each chosen completion, [B].
        rejected: reward of each rejected completion, [B].
    """
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen),
        "rewards/margins": chosen - rejected,
    }


def preference_terms(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Return the terms that every method of preference logs, each [B]; none depends on beta.

    Args:
        chosen: log P(y_w|x) of each pair, [B], in nats.
        rejected: log P(y_l|x) of each pair, [B], in nats.
    """
    return {
        "logps/rejected": rejected,
        "logps/chosen": chosen,
        "preference_accuracy": (chosen > rejected).to(chosen),
        "logp_margin": chosen - rejected,
    }
