"""Log-probabilities of scored tokens from the output head, without all logits in memory."""

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

# The number of rows of logits that exist at once on a CPU
CHUNK = 256
# Where the head is trained, the number of chunks whose slopes (see `_slopes`) are kept for the
# backward pass. The slopes of other chunks are computed again. Each kept chunk saves one matrix
# product, and costs the memory of the chunk's logits.
NUM_KEPT = 4
# Vocabulary columns in a tile of TRL's kernel; TRL's own choice
TILE = 32768
# Vocabulary columns in a tile of CHUNK rows of logits that need no gradient. In fp32 a tile has
# 4 MB, and stays in the cache of a CPU
CPU_TILE = 4096
# Token ids of the sequence that `has_plain_head` tries a model on
PROBE = list(range(3, 17))
# The largest difference, in nats a token, that rounding in fp32 may cause between two ways to
# compute a log-probability
MAX_APART = 1e-3


def add_scoring(model: PreTrainedModel) -> None:
    """Let `model(..., sources=..., targets=...)` return log-probabilities, [N], instead of logits.

    `sources` [N] are places in the flattened input. `targets` [N] are the token ids whose
    log-probabilities are computed from the hidden states at these places. A call without `sources`
    works as before.

    The model's own `forward` is replaced, so that wrappers (peft, DistributedDataParallel,
    autocast) call the new one. A second `add_scoring` does nothing.
    """
    plain = model.forward
    if hasattr(plain, "adds_scoring"):
        return

    @functools.wraps(type(model).forward)  # generation reads the signature of `forward`
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
    """Return log-probabilities of N tokens, [N], in nats, without all logits in memory.

    The result is right for a model whose logits are its output head applied to its last hidden
    states, with the scale and the softcap of its configuration. `has_plain_head` tries whether a
    model is of this kind.

    Args:
        model: the model with the output head, not an adapter around this model.
        sources: places in the flattened input, [N].
        targets: ids of the tokens that the hidden states at these places predict, [N].
        args: positional arguments of the model's forward pass.
        inputs: keyword arguments of the model's forward pass.
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
    """Return what `score` returns, but for any model; computes the logits of each sequence in turn.

    Args:
        model: any causal language model, also an adapter around a model.
        sources: places in the flattened input, [N], ascending.
        targets: ids of the tokens that the hidden states at these places predict, [N].
        inputs: keyword arguments of the model's forward pass, each [B, T].
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
    """Return whether `score` agrees with a model's own logits, tried on one sequence.

    The result is False for a model that computes more between its base and its logits than its
    configuration says (ModernBERT decoders), and for a head that is not a plain weight matrix.
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
    # Kernels round matrix products differently. In 16 bits the rounding of a logit is larger
    limit = max(MAX_APART, float(torch.finfo(logits.dtype).eps * logits.abs().max()))
    apart = float((seen - expected).abs().mean())
    # With damaged weights no log-probability is finite. The head is not the cause of that
    return apart <= limit or not bool(torch.isfinite(expected).all())


def logit_scale(config: PretrainedConfig) -> float:
    """Return the factor of a model's logits; each family of models has its own name for it."""
    if getattr(config, "logits_scaling", None) is not None:
        # Granite and related models divide by this number, HyperCLOVA X multiplies by it
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
    """Return log-probabilities of N tokens, [N], in nats, in fp32 or wider.

    A GPU uses TRL's fused kernel, which never holds the full logits [N, V]. Other devices compute
    the logits in chunks, and without gradients in tiles. If the head is trained, the backward pass
    computes the logits of all but the first NUM_KEPT chunks again.

    Args:
        states: hidden states that predict the tokens, [N, H].
        weight: of the output head, [V, H].
        bias: of the output head, [V], if the head has one.
        targets: ids of the tokens, [N].
        scale: factor of the logits.
        softcap: tanh bounds the scaled logits to +-softcap; None: no bound.
    """
    # Under no_grad autograd functions still see that the head's weights require gradients
    if not torch.is_grad_enabled():
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    if states.is_cuda:
        return _fused_logps(states, weight, bias, targets, scale, softcap)
    on = states.device.type
    autocast = torch.is_autocast_enabled(on)
    dtype = torch.get_autocast_dtype(on) if autocast else states.dtype
    head = _Head(dtype, scale, softcap)
    if not torch.is_grad_enabled():
        return _tiled_logps(states, weight, bias, targets, head)
    return _ChunkedLogps.apply(states, weight, bias, targets, head)


def _tiled_logps(
    states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: "_Head"
) -> Tensor:
    """Return the log-probabilities of the targets, [N], without anything that gradients need.

    A row's log of the sum of exponentials is that of its tiles' logs. So the result is at most 0,
    whatever the rounding.
    """
    starts = range(0, len(weight), CPU_TILE)
    of_targets = states.new_empty(len(states), dtype=head.wide)
    log_sums = states.new_empty(len(starts), len(states), dtype=head.wide)
    buffer = head.buffer(len(states), weight[:CPU_TILE])
    for tile, start in enumerate(starts):
        columns = slice(start, start + CPU_TILE)
        narrow = weight[columns].to(head.dtype)
        bias_here = None if bias is None else bias[columns]
        for rows in _chunks(len(states)):
            logits, _ = head.logits(states[rows], narrow, bias_here, buffer)
            places = targets[rows] - start
            is_here = (places >= 0) & (places < len(narrow))
            found = logits.gather(1, places.clamp(0, len(narrow) - 1)[:, None])[:, 0]
            of_targets[rows] = torch.where(is_here, found, of_targets[rows])
            log_sums[tile, rows] = logits.logsumexp(1)
    return of_targets - log_sums.logsumexp(0)


def _fused_logps(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: float,
    softcap: float | None,
) -> Tensor:
    temperature, outputs = 1.0, ()  # no outputs beside the log-probabilities
    return _trl_kernel().apply(
        states, weight, bias, targets, temperature, TILE, softcap, scale, outputs
    )[0]


@functools.cache
def _trl_kernel() -> Any:
    with hidden("wandb"):  # see engine.build
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer import utils  # noqa: F401  (the kernel's backward pass uses it)
    return ChunkedLogProbFunction


@dataclass(frozen=True)
class _Head:
    """How an output head computes logits from hidden states; the weights are passed separately."""

    dtype: torch.dtype
    """Precision of the matrix products."""
    scale: float
    softcap: float | None

    @property
    def wide(self) -> torch.dtype:
        """Precision of everything else, and of sums of matrix products."""
        return torch.promote_types(self.dtype, torch.float32)

    def buffer(self, num: int, weight: Tensor) -> Tensor:
        """Return an empty buffer for the logits of one chunk, [min(num, CHUNK), V].

        Chunks share a buffer, except those whose slopes are kept: a new allocation takes as long as
        a pass over the logits.
        """
        return weight.new_empty(min(num, CHUNK), len(weight), dtype=self.dtype)

    def logits(
        self, states: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return logits [N, V], and their derivative by the plain matrix product.

        The derivative is [N, V] or a scalar; None: the derivative is 1.
        """
        into = buffer[: len(states), : len(weight)]
        output = torch.mm(states.to(self.dtype), weight.mT, out=into)
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
    """Log-probabilities in chunks of rows, without keeping the logits for the backward pass.

    The result is that of the same chunks under `torch.utils.checkpoint`. This class is faster:
    beside the matrix products nearly all operations are in place. If the head is trained, the first
    chunks keep their slopes, and the backward pass computes the logits of the others again.
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
        # With a frozen head the logits are not computed again: the gradient of the states, up to
        # one factor for each row, is known in the forward pass
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
    """Return d log p(target) / d (plain matrix product of the head), [N, V].

    The result overwrites the probabilities. The derivative by the logits is onehot(target) - p.

    Args:
        probabilities: softmax of the logits, [N, V].
        targets: ids of the tokens, [N].
        derivative: of the logits by the matrix product, as `_Head.logits` returns it.
    """
    slopes = probabilities.neg_()
    slopes.scatter_add_(1, targets[:, None], slopes.new_ones(()).expand(len(slopes), 1))
    return slopes if derivative is None else slopes.mul_(derivative)


def _chunks(num: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, num, CHUNK))
