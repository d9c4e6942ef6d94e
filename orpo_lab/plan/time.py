"""Time of a run by part, in seconds: FLOPs and bytes of its shapes, divided by a card's rates."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PretrainedConfig

from orpo_lab.config import Config
from orpo_lab.config.optimizer import Galore, Lora
from orpo_lab.engine.packing import pack
from orpo_lab.evaluate import TOKENS_PER_BATCH
from orpo_lab.methods.base import Method
from orpo_lab.model.projections import num_weights, projections
from orpo_lab.optimizer import rank_and_gap
from orpo_lab.optimizer.galore import NUM_PASSES, OVERSAMPLING
from orpo_lab.plan.cards import Card
from orpo_lab.plan.memory import Memory, Step
from orpo_lab.plan.several import Exchange
from orpo_lab.plan.shapes import Sizes


@dataclass(frozen=True)
class Seconds:
    """Seconds of a run by part."""

    load: float
    before: float
    """The evaluation before training."""
    reference: float
    """The log-probabilities of the pairs before training, for a method that needs them."""
    steps: float
    evaluation: float
    """What `train.eval_steps` asks for."""
    saving: float
    """Checkpoints and the trained model."""
    after: float

    @property
    def total(self) -> float:
        """All parts together."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Work:
    """What a token costs, in FLOPs of a forward pass."""

    layers: float
    """Of all projections, per token."""
    attention: float
    """Per token and per token that it attends to."""
    head: float
    """Per scored token."""
    trains_all: bool
    num_layers: int

    @classmethod
    def of(cls, model: Any, own: PretrainedConfig) -> "Work":
        """Return the work of a model, as `shapes.skeleton` returns it."""
        text = own.get_text_config()
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        weight = model.get_output_embeddings().weight
        return cls(
            layers=2 * sum(map(num_weights, projections(model).values())),
            attention=4 * text.num_hidden_layers * text.num_attention_heads * size,
            head=2 * weight.numel(),
            trains_all=weight.requires_grad,
            num_layers=text.num_hidden_layers,
        )

    def forward(self, step: Step) -> float:
        """Return the FLOPs of a micro-batch's forward pass without the head."""
        pairs = ((p, c, r) for p, c, r in step.sizes)
        seen = sum((p + c) ** 2 / 2 + r * p + r * r / 2 for p, c, r in pairs)
        return self.layers * step.tokens + self.attention * seen

    def training(self, step: Step, *, checkpointing: bool) -> float:
        """Return the FLOPs of a micro-batch's forward and backward pass.

        A frozen weight has no gradient: its backward pass costs one product, not two. The head's
        logits are computed again in the backward pass.
        """
        backward = 2 if self.trains_all else 1
        return self.forward(step) * (1 + backward + checkpointing) + self.head * step.scored * (
            2 + backward
        )


def of_run(
    config: Config,
    own: PretrainedConfig,
    model: Any,
    *,
    card: Card,
    memory: Memory,
    pairs: Sequence[Sizes],
    scored: Sequence[Sizes],
    budget: int,
    num_steps: int,
    num_train: int,
    num_held_out: int,
    method: Method,
    checkpointing: bool,
    sent: Exchange,
) -> Seconds:
    """Return the time of a run.

    Args:
        config: the run's configuration.
        own: the model's own configuration.
        model: what `shapes.skeleton` returns.
        card: what the run computes on.
        memory: of the run.
        pairs: sizes of the pairs of a step that one process reads.
        scored: sizes like those of the pairs that are scored before and after training.
        budget: the token budget of a micro-batch.
        num_steps: number of optimizer steps.
        num_train: number of training pairs whose reference one process computes.
        num_held_out: number of held-out pairs that one process reads.
        method: of the run.
        checkpointing: whether activations are computed again in the backward pass.
        sent: what several processes exchange.
    """
    dtype, work = card.dtype(config.model.dtype), Work.of(model, own)

    def seconds(flops: float, num_layers: float) -> float:
        rate = card.rate(dtype, trains_all=work.trains_all)
        return max(flops / rate, num_layers * card.host_ms_per_layer / 1e3)

    def reading(some: Step, num_pairs: int) -> float:
        """Return the time of a forward pass over a number of pairs like some others."""
        num_like = num_pairs / len(some.sizes)
        num_rows = some.tokens * num_like / max(budget, some.tokens / len(some.sizes))
        flops = (work.forward(some) + work.head * some.scored) * num_like
        # A forward pass takes a third of the host's time for both passes
        return seconds(flops, num_rows * work.num_layers / 3) + num_rows * sent.of_pass

    # Scoring reads both completions and needs nothing of the prompt, whatever the method's loss
    scoring = partial(reading, Step(tuple(scored), prompt_is_scored=False))

    rows = _rows(pairs, budget)
    steps = [Step(tuple(pairs[i] for i in row), method.scores_prompt) for row in rows]
    of_step = sum(
        seconds(work.training(step, checkpointing=checkpointing), work.num_layers) for step in steps
    ) + _update(config, model, memory, card, num_steps)
    num_passes = (3 if work.trains_all else 2) * len(rows)
    of_step += sent.of_step + num_passes * sent.of_pass
    # Mismatched pairs are as long as others, and have no backward pass
    of_step += method.needs_divergence * scoring(len(pairs))
    of_losses = reading(Step(tuple(pairs), method.scores_prompt), num_held_out)
    of_losses += method.needs_divergence * scoring(num_held_out)
    num_referred = num_train + num_held_out * bool(config.train.eval_steps)
    reference = method.needs_reference * (1 + method.needs_divergence) * scoring(num_referred)
    evaluation = scoring(num_held_out) + _answers(config, memory, card, work, num_held_out, sent)
    saves = num_steps // config.train.save_steps if config.train.save_steps else 0
    evaluations = num_steps // config.train.eval_steps if config.train.eval_steps else 0
    state = memory.trained + memory.moments + memory.bases
    loaded = memory.frozen if isinstance(config.optimizer, Lora) else memory.trained
    return Seconds(
        load=loaded / 1e9 / card.load_gbps,
        before=evaluation,
        reference=reference,
        steps=of_step * num_steps,
        evaluation=of_losses * evaluations,
        saving=(saves * state + memory.trained) / 1e9 / card.save_gbps,
        after=evaluation,
    )


def _rows(pairs: Sequence[Sizes], budget: int) -> list[list[int]]:
    return pack([sum(sizes) for sizes in pairs], budget)


def _update(config: Config, model: Any, memory: Memory, card: Card, num_steps: int) -> float:
    """Return the seconds of the optimizer's part of a step: its bytes are read and written once.

    GaLore's new bases are spread over the steps between two of them.
    """
    touched = 2 * (memory.trained + memory.gradients + memory.moments + memory.updates)
    taken = touched / 1e9 / card.bandwidth_gbps
    if isinstance(config.optimizer, Galore):
        rank, gap = rank_and_gap(config.optimizer, model.config, num_steps)
        weights = sum(map(num_weights, projections(model).values()))
        products = NUM_PASSES * 4 * weights * (rank + OVERSAMPLING)
        taken += products / gap / card.rate(torch.float32, trains_all=True)
    return taken


def _answers(
    config: Config, memory: Memory, card: Card, work: Work, num_held_out: int, sent: Exchange
) -> float:
    """Return the seconds of the greedy answers: every token reads all weights once a batch."""
    num = min(config.dataset.num_generations, num_held_out)
    if not num:
        return 0.0
    longest = config.dataset.max_prompt_length + config.dataset.max_new_tokens
    batches = -(-num // max(1, TOKENS_PER_BATCH // longest))
    read = (memory.frozen + memory.trained) / 1e9 / card.bandwidth_gbps
    of_token = max(read, work.num_layers * card.host_ms_per_token / 1e3) + sent.of_pass
    return batches * config.dataset.max_new_tokens * of_token
