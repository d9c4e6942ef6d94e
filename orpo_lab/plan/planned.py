"""The plan of a run: memory and time by part on a card, and whether the run fits there."""

from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from orpo_lab import methods
from orpo_lab.config import Config
from orpo_lab.config.checks import AUTO
from orpo_lab.config.engine import SharedPrefixEngine, TrlEngine
from orpo_lab.engine.shared_prefix import MAX_BUDGET, SHARE, default_budget
from orpo_lab.errors import UserError
from orpo_lab.model.precision import resolve_device, resolve_dtype
from orpo_lab.plan import memory, several, time
from orpo_lab.plan.cards import Card
from orpo_lab.plan.lengths import Lengths, without_rejected
from orpo_lab.plan.memory import Head, Memory, Step
from orpo_lab.plan.shapes import skeleton
from orpo_lab.plan.time import Seconds
from orpo_lab.training.sharded import is_asked
from orpo_lab.training.steps import check_dealt, count_steps


@dataclass(frozen=True)
class Plan:
    """What a run takes."""

    card: Card
    lengths: Lengths
    memory: Memory
    """With the token budget of the run's first step."""
    tokens: int
    """Of the widest micro-batch that `memory` is of."""
    seconds: Seconds
    num_steps: int
    budget: int
    """The token budget from the second step on."""
    largest_budget: int
    """The largest token budget that fits; 0: not even one token does."""
    checkpointing: bool
    """Whether the run computes activations again in the backward pass."""
    processes: int
    """Number of processes of the run. Memory is that of each; so is the card."""

    @property
    def fits(self) -> bool:
        """Whether the card has the memory that the run needs."""
        return self.memory.needed <= self.card.memory

    def figures(self) -> dict[str, Any]:
        """Return the figures for programs."""
        return {
            "card": self.card.name,
            "card_bytes": self.card.memory,
            "calibrated": self.card.calibrated or None,
            "fits": self.fits,
            "peak_bytes": self.memory.peak,
            "needed_bytes": self.memory.needed,
            "bytes": self.memory.parts(),
            "phases": self.memory.phases,
            "seconds": vars(self.seconds) | {"total": self.seconds.total},
            "steps": self.num_steps,
            "lengths": self.lengths.source,
            "tokens_per_pair": self.lengths.mean_tokens,
            "tokens_of_widest_microbatch": self.tokens,
            "tokens_per_microbatch": self.budget,
            "largest_tokens_per_microbatch": self.largest_budget,
            "gradient_checkpointing": self.checkpointing,
            "processes": self.processes,
        }


def plan(
    config: Config, own: PretrainedConfig, card: Card, lengths: Lengths, processes: int = 1
) -> Plan:
    """Return the plan of a run.

    With `train.gradient_checkpointing=auto` the plan is without checkpointing if that fits.

    Args:
        config: the run's configuration.
        own: the model's own configuration.
        card: what the run computes on.
        lengths: of its pairs.
        processes: number of processes that train together, each on such a card. Processes on a
            CPU share its memory.

    Raises:
        UserError: the number of steps or of pairs with a reference is not known, the model cannot
            be adapted or projected, it is of a kind that cannot be read without its weights, or
            there are more processes than pairs.
    """
    method, scored = methods.build(config), lengths.pairs
    if not method.reads_rejected:
        lengths = without_rejected(lengths)
    if lengths.num_train is None:
        unknown = "the number of training pairs, which is not known without the data: give"
        given = "--lengths ...,pairs=N or dataset.num_train"
        if config.train.max_steps is None:
            raise UserError(f"train.num_epochs needs {unknown} {given}, or train.max_steps")
        if method.needs_reference:
            raise UserError(
                f"the time of the method's reference needs {unknown} {given} (lengths are "
                f"{lengths.source})"
            )
    check_dealt(config, lengths.num_held_out, processes)
    num_steps = count_steps(config, lengths.num_train or config.train.batch_size)
    dtype = card.dtype(config.model.dtype)
    if not card.is_gpu:
        card = replace(card, memory_gb=card.memory_gb / processes)
        dtype = resolve_dtype(config.model.dtype, resolve_device())
    budget, sizes = _widest(config, lengths, processes)
    step = Step(tuple(sizes), method.scores_prompt)
    model = skeleton(config, own, dtype)
    shares_weights = is_asked(config, processes)

    def of_run(checkpointing: bool) -> Memory:
        found = memory.of_run(
            config,
            own,
            model,
            dtype,
            num_steps=num_steps,
            step=step,
            on_gpu=card.is_gpu,
            checkpointing=checkpointing,
        )
        if isinstance(config.engine, TrlEngine):
            logits = step.tokens * own.get_text_config().vocab_size * 4
            found = replace(found, head=Head(round(memory.TRL_LOGITS * logits), 0, 0))
        return several.share(found, config, model, processes) if shares_weights else found

    asked = config.train.gradient_checkpointing
    found = of_run(checkpointing := asked == "true")
    if asked == AUTO and found.needed > card.memory:
        found = of_run(checkpointing := True)
    largest = _largest(found, step.tokens, card)
    is_measured = isinstance(config.engine, SharedPrefixEngine) and (
        config.engine.tokens_per_microbatch is None
    )
    if is_measured and card.is_gpu:
        budget = max(budget, min(int(SHARE * largest), MAX_BUDGET))
    # With shared weights every process reads all pairs that it scores
    readers = 1 if shares_weights else processes
    seconds = time.of_run(
        config,
        own,
        model,
        card=card,
        memory=found,
        pairs=several.hand(lengths.batch(config.train.batch_size), processes),
        scored=scored,
        budget=budget,
        num_steps=num_steps,
        num_train=-(-(lengths.num_train or 0) // readers),
        num_held_out=-(-lengths.num_held_out // readers),
        method=method,
        checkpointing=checkpointing,
        sent=several.exchange(config, model, card.link_gbps, processes, num_steps),
    )
    return Plan(
        card,
        lengths,
        found,
        step.tokens,
        seconds,
        num_steps,
        budget,
        largest,
        checkpointing,
        processes,
    )


def _widest(
    config: Config, lengths: Lengths, processes: int
) -> tuple[int, list[tuple[int, int, int]]]:
    """Return the token budget of the first step, and the pairs of its widest micro-batch.

    TRL's step reads every completion behind a prompt of its own, padded to the longest.
    """
    size = -(-config.train.batch_size // processes)
    if isinstance(config.engine, SharedPrefixEngine):
        budget = config.engine.tokens_per_microbatch or default_budget(config.dataset.max_length)
        return budget, lengths.widest(size, budget)
    assert isinstance(config.engine, TrlEngine)
    longest = max(p + max(c, r) for p, c, r in lengths.pairs)
    num = 2 * config.engine.micro_batch_size
    return num * longest, [(longest // 2, longest - longest // 2, 0)] * num


def _largest(found: Memory, tokens: int, card: Card) -> int:
    """Return the largest token budget that fits: activations grow with the tokens."""
    phases = found.phases
    grows = phases["backward"] - found.states - found.gradients
    room = card.memory / (1 + memory.MARGIN) - found.states - found.gradients
    if max(phases["update"], phases["evaluation"]) * (1 + memory.MARGIN) > card.memory:
        return 0
    return max(0, int(tokens * room / grows))
