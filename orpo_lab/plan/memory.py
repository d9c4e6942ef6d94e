"""Memory of a run by part, in bytes: `shapes` counts, and this module adds up.

Not all parts exist at once. `Memory.phases` says which do: in the forward and backward pass, in the
optimizer's step, and in an evaluation.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig

from orpo_lab import optimizer as optimizers
from orpo_lab.config import Config
from orpo_lab.config.optimizer import Galore, Lora
from orpo_lab.engine import attention
from orpo_lab.engine.head import CHUNK, CPU_TILE, NUM_KEPT, TILE
from orpo_lab.engine.scoring import TOKENS_PER_CPU_ROW, TOKENS_PER_FORWARD
from orpo_lab.evaluate import TOKENS_PER_BATCH
from orpo_lab.model.projections import projections
from orpo_lab.optimizer.galore import CODE_BOOKS, KINDS, MIN_8BIT_SIZE, moment_bytes
from orpo_lab.plan.shapes import Saved, Sizes, frozen_bytes, saved, trained

# Rows of logits in a tile of TRL's kernel (`TOKEN_CHUNK_SIZE` of trl 1.16)
GPU_ROWS = 4096
# TRL's own step holds some 3.6 times one fp32 tensor of all its logits at its peak
TRL_LOGITS = 3.6
# Pairs on which it is counted what the tokens of many pairs keep
SAMPLE = ((64, 64, 64), (64, 64, 64))
# What has been counted on SAMPLE, by model, optimizer, precision and attention
_sampled: dict[str, Saved] = {}
# Share of all tensors by which the allocator's blocks may exceed them. An assumption
MARGIN = 0.05


@dataclass(frozen=True)
class Head:
    """Bytes that the output head takes for N scored tokens."""

    saved: int
    """What autograd keeps for the backward pass."""
    held: int
    """What else is held until the backward pass."""
    tiles: int
    """What exists only while logits are computed, and the gradients there."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a run by part."""

    frozen: int
    """Weights that are not trained, as they are stored."""
    trained: int
    """Weights that are trained."""
    gradients: int
    """All gradients of a step; of layer-wise GaLore the largest one and all projected ones."""
    moments: int
    bases: int
    updates: int
    activations: int
    """What the forward pass of the widest micro-batch keeps, without the head."""
    head: Head
    working: int
    """What one layer's backward pass takes: its weights as the arithmetic reads them, gradients of
    activations and, with gradient checkpointing, its activations again."""
    evaluation: int
    """The activations of held-out pairs, or keys and values of answers, whichever is more."""

    @property
    def states(self) -> int:
        """What exists from the first step to the last one."""
        return self.frozen + self.trained + self.moments + self.bases

    @property
    def phases(self) -> dict[str, int]:
        """The bytes of all tensors at the peak of each phase."""
        held = self.activations + self.head.saved + self.head.held
        return {
            "backward": self.states + self.gradients + held + max(self.working, self.head.tiles),
            "update": self.states + self.gradients + self.updates,
            "evaluation": self.states + self.evaluation,
        }

    @property
    def peak(self) -> int:
        """The bytes of all tensors at the peak of the run."""
        return max(self.phases.values())

    @property
    def needed(self) -> int:
        """The bytes that a device must have free: the peak and a margin."""
        return round(self.peak * (1 + MARGIN))

    def parts(self) -> dict[str, int]:
        """Return the bytes by part, with the head's sum."""
        return asdict(self) | {"head": sum(asdict(self.head).values())}


@dataclass(frozen=True)
class Step:
    """What one micro-batch reads."""

    sizes: tuple[Sizes, ...]
    """Of its pairs."""
    prompt_is_scored: bool

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return sum(map(sum, self.sizes))

    @property
    def scored(self) -> int:
        """The number of tokens whose log-probabilities are computed."""
        of_prompts = sum(p - 1 for p, _, _ in self.sizes) if self.prompt_is_scored else 0
        return of_prompts + sum(c + r for _, c, r in self.sizes)


def of_run(
    config: Config,
    own: PretrainedConfig,
    model: Any,
    dtype: torch.dtype,
    *,
    num_steps: int,
    step: Step,
    on_gpu: bool,
    checkpointing: bool,
) -> Memory:
    """Return the memory of a run.

    Args:
        config: the run's configuration.
        own: the model's own configuration.
        model: what `shapes.skeleton` returns.
        dtype: precision of the arithmetic.
        num_steps: number of optimizer steps.
        step: its widest micro-batch.
        on_gpu: whether the kernels are those of a GPU.
        checkpointing: whether activations are computed again in the backward pass.
    """
    kept = _saved(config, own, dtype, step, attention.VARLEN if on_gpu else attention.BY_PAIR)
    return Memory(
        frozen=frozen_bytes(model, config.quantization),
        trained=sum(weight.nbytes for weight in trained(config, model)),
        **optimizer_bytes(config, model, dtype, num_steps),
        activations=kept.kept(checkpointing=checkpointing),
        head=head_bytes(model, step.scored, dtype, on_gpu=on_gpu),
        working=_working(model, own, dtype, step.tokens, kept if checkpointing else None),
        evaluation=_evaluation(config, own, dtype, on_gpu=on_gpu),
    )


def optimizer_bytes(
    config: Config, model: Any, dtype: torch.dtype, num_steps: int
) -> dict[str, int]:
    """Return the bytes of gradients, moments, bases and updates, by name.

    galore-torch is counted as our GaLore with the same settings.

    Args:
        config: the run's configuration.
        model: what `skeleton` returns.
        dtype: precision of the arithmetic.
        num_steps: number of optimizer steps.
    """
    names = [name for name in KINDS if name != "weights"]
    if isinstance(config.optimizer, Galore):
        ours = replace(config.optimizer, implementation="orpo_lab")
        with _quiet():
            updater = optimizers.build(
                replace(config, optimizer=ours), model, num_steps=num_steps, dtype=dtype
            )
        rows = (updater.memory() or {}).values()
        # The groups take their steps one after another
        return {n: (max if n == "updates" else sum)(row[n] for row in rows) for n in names}
    weights = trained(config, model)
    bits = 8 if isinstance(config.optimizer, Lora) else 32
    moments = sum(moment_bytes(weight, bits) for weight in weights)
    if bits == 8 and any(weight.numel() >= MIN_8BIT_SIZE for weight in weights):
        moments += CODE_BOOKS
    gradients = sum(weight.nbytes for weight in weights)
    return dict.fromkeys(names, 0) | {"gradients": gradients, "moments": moments}


def _saved(
    config: Config, own: PretrainedConfig, dtype: torch.dtype, step: Step, implementation: str
) -> Saved:
    """Return what the forward pass keeps; of many pairs by the tokens of SAMPLE's pairs."""
    if len(step.sizes) <= len(SAMPLE):
        return saved(config, own, dtype, step.sizes, implementation)
    key = f"{config.optimizer} {own.to_json_string()} {dtype} {implementation}"
    if key not in _sampled:
        _sampled[key] = saved(config, own, dtype, SAMPLE, implementation)
    share = step.tokens / sum(map(sum, SAMPLE))
    return Saved(*(round(size * share) for size in vars(_sampled[key]).values()))


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside this context, the optimizer's room logs nothing: the run itself says it."""
    logger = logging.getLogger(optimizers.__name__)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def head_bytes(model: Any, num: int, dtype: torch.dtype, *, on_gpu: bool) -> Head:
    """Return the bytes of `engine.head.token_logps`.

    Args:
        model: what `skeleton` returns.
        num: number of scored tokens.
        dtype: precision of the arithmetic.
        on_gpu: whether the kernel is that of a GPU.
    """
    weight = model.get_output_embeddings().weight
    vocabulary, hidden = weight.shape
    narrow = dtype.itemsize
    # Adapters leave the residual stream in fp32; other models compute it as their weights are
    states = num * hidden * (weight.dtype.itemsize if weight.requires_grad else 4)
    is_trained = weight.requires_grad
    of_weight = weight.numel() * 4 if is_trained else 0
    places = 8 * num
    if on_gpu:
        tile = min(num, GPU_ROWS) * TILE * narrow
        return Head(states + places + 12 * num, 0, tile + 4 * num * hidden + of_weight)
    chunk = min(num, CHUNK) * vocabulary
    cast = 0 if narrow == weight.dtype.itemsize else vocabulary * hidden * narrow
    buffers = chunk * (narrow + (0 if narrow == 4 else 4)) + cast
    if not is_trained:
        return Head(places, states, buffers)
    slopes = min(num, NUM_KEPT * CHUNK) * vocabulary * 4
    saved_here = states + 2 * places + 4 * num
    return Head(saved_here, slopes, buffers + 4 * num * hidden + of_weight)


def _working(
    model: Any, own: PretrainedConfig, dtype: torch.dtype, tokens: int, again: Saved | None
) -> int:
    """Return what the backward pass of one layer takes beside all that is kept; an estimate."""
    layers = projections(model).values()
    weight = max(layer.weight.numel() for layer in layers) * dtype.itemsize
    widest = max(max(layer.weight.shape) for layer in layers)
    gradients = tokens * (2 * widest * dtype.itemsize + 2 * own.get_text_config().hidden_size * 4)
    return weight + gradients + (again.largest if again else 0)


def _evaluation(config: Config, own: PretrainedConfig, dtype: torch.dtype, *, on_gpu: bool) -> int:
    """Return what an evaluation takes beside the states; an estimate."""
    text = own.get_text_config()
    width = max(text.hidden_size, getattr(text, "intermediate_size", None) or 0)
    row = TOKENS_PER_FORWARD if on_gpu else TOKENS_PER_CPU_ROW
    tile = GPU_ROWS * TILE * dtype.itemsize if on_gpu else CHUNK * CPU_TILE * 4
    scoring = row * (3 * width * dtype.itemsize + 2 * text.hidden_size * 4) + tile
    if not config.dataset.num_generations:
        return scoring
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    longest = config.dataset.max_prompt_length + config.dataset.max_new_tokens
    num = min(config.dataset.num_generations, max(1, TOKENS_PER_BATCH // longest))
    cache = 2 * text.num_hidden_layers * heads * size * num * longest * dtype.itemsize
    return max(scoring, cache + num * longest * width * dtype.itemsize)
