"""The output head without its logits: log-probabilities of the tokens that carry a loss."""

import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from orpo_lab.model.causal import CausalModel
from orpo_lab.upstream import hidden

# Rows of logits that exist at once on a CPU
CHUNK = 256
# Chunks whose slopes are kept for the backward pass where the head is trained; those of the others
# are computed again. A chunk saves a product of the size of its logits, and costs their memory.
NUM_KEPT = 4
# Columns of the vocabulary in a tile of TRL's kernel, its own choice
TILE = 32768
# A sequence to try a model on
PROBE = list(range(3, 17))
# Nats a token that rounding may set two ways to a log-probability apart in fp32
MAX_APART = 1e-3


def add_scoring(model: PreTrainedModel) -> None:
    """Let `model(..., sources=..., targets=...)` return log-probabilities, [N], instead of logits.

    `sources` are places in the flattened input, `targets` the token ids whose log-probability the
    hidden states there give. Any other call is what it was. Goes through the model's own forward,
    so that wrappers (peft, DistributedDataParallel, autocast) see it. A second call does nothing.
    """
    plain = model.forward
    if hasattr(plain, "adds_scoring"):
        return

    @functools.wraps(type(model).forward)  # generation asks for its signature
    def forward(
        self: Any, *args: Any, sources: Any = None, targets: Any = None, **kwargs: Any
    ) -> Any:
        if sources is None:
            return plain(*args, **kwargs)
        given = {key: value for key, value in kwargs.items() if value is not None}
        return score(self, sources, targets, *args, **given)

    forward.adds_scoring = True  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


def score(
    model: CausalModel, sources: Tensor, targets: Tensor, *args: Any, **inputs: Any
) -> Tensor:
    """Return log-probabilities of tokens, [N], without logits.

    Right for models that are a base and an output head; `has_plain_head` tries whether one is.

    Args:
        model: with the output head, not an adapter around it.
        sources: places in the flattened input, [N].
        targets: ids of the tokens whose log-probabilities the hidden states there give, [N].
        args: of the model's forward pass.
        inputs: the same, by name.
    """
    states = model.base_model(*args, use_cache=False, **inputs).last_hidden_state
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    return token_logps(
        states.flatten(0, 1).index_select(0, sources),
        head.weight,
        getattr(head, "bias", None),
        targets,
        scale=logit_scale(config),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def score_by_logits(
    model: CausalModel, sources: Tensor, targets: Tensor, **inputs: Tensor
) -> Tensor:
    """Return what `score` returns, of any model, from the logits of one sequence at a time.

    Args:
        model: may be an adapter around another.
        sources: places in the flattened input, [N], ascending.
        targets: ids of the tokens whose log-probabilities are asked for, [N].
        inputs: of the model's forward pass, each [B, T].
    """
    width = inputs["input_ids"].shape[1]
    logps = []
    for row in range(len(inputs["input_ids"])):
        here = sources // width == row
        inputs_of_row = {name: value[row : row + 1] for name, value in inputs.items()}
        logits = (
            model(use_cache=False, **inputs_of_row).logits[0].index_select(0, sources[here] % width)
        )
        loss = torch.nn.functional.cross_entropy(logits.float(), targets[here], reduction="none")
        logps.append(-loss)
    return torch.cat(logps)


def has_plain_head(model: CausalModel) -> bool:
    """Return whether `score` gives what a model's own logits do, tried on one sequence.

    False of a model that does more between its base and its logits than its configuration tells of
    (ModernBERT decoders), or whose head is no matrix of numbers.
    """
    ids = torch.tensor([PROBE], device=model.device)
    mask, sources = torch.ones_like(ids), torch.arange(len(PROBE) - 1, device=model.device)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, :-1]
        expected = logits.float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        try:
            seen = score(model, sources, ids[0, 1:], input_ids=ids, attention_mask=mask)
        except (AttributeError, RuntimeError, TypeError):
            return False
    # Kernels round a product differently; in 16 bits a logit's rounding is larger
    limit = max(MAX_APART, float(torch.finfo(logits.dtype).eps * logits.abs().max()))
    apart = float((seen - expected).abs().mean())
    # Of damaged weights nothing is finite, and that is not the head's doing
    return apart <= limit or not bool(torch.isfinite(expected).all())


def logit_scale(config: PretrainedConfig) -> float:
    """Return what a model multiplies its logits by; each family has a name of its own for it."""
    if getattr(config, "logits_scaling", None) is not None:
        # Granite and its kin divide, HyperCLOVA X multiplies
        multiplies = config.model_type == "hyperclovax"
        return config.logits_scaling if multiplies else 1 / config.logits_scaling
    scale = getattr(config, "logit_scale", None)
    return 1.0 if scale is None else scale


def token_logps(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Return log-probabilities of tokens, [N], in fp32 or wider.

    Never [N, V] logits: TRL's fused kernel on a GPU, elsewhere chunks that are recomputed.

    Args:
        states: hidden states that predict them, [N, H].
        weight: of the output head, [V, H].
        bias: of the output head, [V].
        targets: ids of the tokens, [N].
        scale: logits are multiplied by it.
        softcap: logits are kept within it by tanh.
    """
    if not torch.is_grad_enabled():  # autograd tells its functions of gradients nobody will ask for
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    if states.is_cuda:
        return _fused_logps(states, weight, bias, targets, scale, softcap)
    on = states.device.type
    autocast = torch.is_autocast_enabled(on)
    dtype = torch.get_autocast_dtype(on) if autocast else states.dtype
    return _ChunkedLogps.apply(states, weight, bias, targets, _Head(dtype, scale, softcap))


def _fused_logps(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: float,
    softcap: float | None,
) -> Tensor:
    temperature, outputs = 1.0, ()  # none beside the log-probabilities
    return _trl_kernel().apply(
        states, weight, bias, targets, temperature, TILE, softcap, scale, outputs
    )[0]


@functools.cache
def _trl_kernel() -> Any:
    with hidden("wandb"):  # see engine.build
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer import utils  # noqa: F401  (its backward pass does)
    return ChunkedLogProbFunction


@dataclass(frozen=True)
class _Head:
    """What turns hidden states into logits, but for its weights."""

    dtype: torch.dtype
    """Of the matrix products."""
    scale: float
    softcap: float | None

    @property
    def wide(self) -> torch.dtype:
        """Of everything else, and of sums of products."""
        return torch.promote_types(self.dtype, torch.float32)

    def buffer(self, num: int, weight: Tensor) -> Tensor:
        """Return room for the products of a chunk: allocating it anew costs as much as a pass."""
        return weight.new_empty(min(num, CHUNK), len(weight), dtype=self.dtype)

    def logits(
        self, states: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return logits [N, V] and their derivative by the plain product; None: it is 1."""
        output = torch.mm(states.to(self.dtype), weight.mT, out=buffer[: len(states)])
        output = output.to(self.wide)
        if bias is not None:
            output.add_(bias)
        if self.softcap is not None:
            bounded = output.mul_(self.scale / self.softcap).tanh_()
            return bounded * self.softcap, self.scale * (1 - bounded.square())
        if self.scale != 1:
            return output.mul_(self.scale), output.new_tensor(self.scale)
        return output, None


class _ChunkedLogps(torch.autograd.Function):
    """Log-probabilities by chunks of rows, most of whose logits are computed again going backward.

    What the same chunks would compute under `torch.utils.checkpoint`, and faster: beside the matrix
    products only passes in place are left, and the first chunks keep what they came to.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: _Head
    ) -> Tensor:
        logps = states.new_empty(len(states), dtype=head.wide)
        log_sums = torch.empty_like(logps)
        narrow = weight.to(head.dtype)
        buffer = head.buffer(len(states), weight)
        of_states, of_weight, of_bias = ctx.needs_input_grad[:3]
        trains_head = of_weight or of_bias
        # A frozen head needs no second look at its logits: what the states' gradient is but for a
        # factor a row can be had from the first
        by_row = torch.empty_like(states) if of_states and not trains_head else None
        kept: dict[int, Tensor] = {}
        for rows in _chunks(len(states)):
            keeps = trains_head and len(kept) < NUM_KEPT
            into = head.buffer(len(states), weight) if keeps else buffer
            logits, derivative = head.logits(states[rows], narrow, bias, into)
            target = logits.gather(1, targets[rows, None])
            largest = logits.amax(1, keepdim=True)
            total = logits.sub_(largest).exp_().sum(1, keepdim=True)
            log_sum = total.log().add_(largest)
            log_sums[rows] = log_sum.squeeze(1)
            logps[rows] = (target - log_sum).squeeze(1)
            if keeps:
                kept[rows.start] = _slopes(logits.div_(total), targets[rows], derivative)
            elif by_row is not None:
                slopes = _slopes(logits.div_(total), targets[rows], derivative)
                by_row[rows] = (slopes.to(head.dtype) @ narrow).to(states.dtype)
        ctx.head, ctx.by_row, ctx.kept = head, by_row, kept
        if by_row is None:
            ctx.save_for_backward(states, weight, bias, targets, log_sums)
        return logps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        head = ctx.head
        if ctx.by_row is not None:
            return (ctx.by_row * gradient[:, None]).to(ctx.by_row.dtype), *[None] * 4
        *inputs, targets, log_sums = ctx.saved_tensors
        states, weight, bias = inputs
        sums = [
            torch.zeros_like(tensor, dtype=head.wide) if needed else None
            for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=False)
        ]
        of_states, of_weight, of_bias = sums
        narrow = weight.to(head.dtype)
        buffer = head.buffer(len(states), weight)
        for rows in _chunks(len(states)):
            slopes = ctx.kept.pop(rows.start, None)
            if slopes is None:
                logits, derivative = head.logits(states[rows], narrow, bias, buffer)
                probabilities = logits.sub_(log_sums[rows, None]).exp_()
                slopes = _slopes(probabilities, targets[rows], derivative)
            slopes.mul_(gradient[rows, None])
            if of_states is not None:
                of_states[rows] = (slopes.to(head.dtype) @ narrow).to(head.wide)
            if of_weight is not None:
                of_weight.addmm_(slopes.mT, states[rows].to(head.wide))
            if of_bias is not None:
                of_bias.add_(slopes.sum(0))
        gradients = (
            None if sum_ is None else sum_.to(i.dtype) for sum_, i in zip(sums, inputs, strict=True)
        )
        return *gradients, None, None


def _slopes(probabilities: Tensor, targets: Tensor, derivative: Tensor | None) -> Tensor:
    """Return d log p(target) / d output of the head, [N, V], in the place of the probabilities.

    By the logits it is onehot(target) - p.
    """
    slopes = probabilities.neg_()
    slopes.scatter_add_(1, targets[:, None], slopes.new_ones(()).expand(len(slopes), 1))
    return slopes if derivative is None else slopes.mul_(derivative)


def _chunks(num: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, num, CHUNK))
