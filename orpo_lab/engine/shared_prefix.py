"""The fast optimizer step: it reads every prompt once, and packs pairs into rows of tokens.

The step never holds the logits of all tokens, and never makes the host wait for the device.

The pairs of an optimizer step are packed into micro-batches (`engine.packing`). The loss of a
micro-batch is a share of the step's loss (`methods`), so the gradient does not depend on the
packing.
"""

import contextlib
import functools
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from orpo_lab import memory, methods
from orpo_lab.config import Config
from orpo_lab.config.checks import AUTO
from orpo_lab.config.engine import SharedPrefixEngine
from orpo_lab.engine import attention, mismatched
from orpo_lab.engine.base import REFERENCE, MicroBatch, Pair, Score, Sums
from orpo_lab.engine.compiled import CompiledLayers
from orpo_lab.engine.head import add_scoring
from orpo_lab.engine.packing import Collator, halved, tokens_of
from orpo_lab.errors import NonFiniteError, UserError, one_line
from orpo_lab.methods.base import Batch, Method
from orpo_lab.model.causal import CausalModel, without_adapters
from orpo_lab.model.layers import fused, fusible
from orpo_lab.training.devices import REPEATED, OneDevice
from orpo_lab.training.parts import is_sharded

log = logging.getLogger(__name__)

# The smallest default token budget. With fewer tokens, the fixed costs of a micro-batch weigh more
MIN_BUDGET = 1024
# The largest budget that `fit_budget` chooses. A GPU is busy with fewer tokens already
MAX_BUDGET = 16384
# The share of the free memory that `fit_budget` fills
SHARE = 0.85
# The number of weights from which on compiled layers win back the time of their compilation
MIN_COMPILED = 100_000_000
# Token ids of the pair that `check` tries a model on: prompt, chosen, rejected
PROBE = [3, 4, 5, 6], [7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17]
# What is added to the ids of PROBE where the vocabulary has so many ids. The first ids are often
# special tokens that nobody has trained. SmolLM2 reads its own so unstably that rounding to bf16
# moves their log-probabilities by 1.5 nats
ORDINARY = 1000
# The largest difference, in nats a token, that rounding may cause between two readings of PROBE.
# A wrong reading differs by more.
MAX_APART = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.25, torch.int8: 0.25}

# The largest relative error that rounding to bf16 may cause in the results of flash attention. A
# wrong result differs by more
MAX_FLASH_ERROR = 0.05


class SharedPrefix:
    """Our own engine, with the methods of `engine.base.Engine`.

    The metrics are those of TRL, except TRL's metrics of the logits.

    Args:
        model: on its device, with adapters if it has any.
        collator: lays pairs out in rows.
        method: computes the loss and its terms from the sums of log-probabilities.
        attention_implementation: the name that `choose_attention` returns.
        devices: the device that the model computes on.
        measures: whether `fit_budget` may raise the token budget.
        compiled: the model's decoder layers, compiled; None: they run as they are.
    """

    def __init__(
        self,
        model: CausalModel,
        collator: Collator,
        *,
        method: Method,
        attention_implementation: str,
        devices: OneDevice,
        measures: bool = False,
        compiled: CompiledLayers | None = None,
    ) -> None:
        self.measures, self.compiled = measures, compiled
        self.collator, self.method = collator, method
        self.attention_implementation, self.devices = attention_implementation, devices
        self._token_budget: int | None = None
        # Tokens of the widest micro-batch of the last step
        self._widest = 0
        self._base, self._layers = without_adapters(model), fusible(model)
        prepare(self._base)

    @property
    def token_budget(self) -> int | None:
        """The token budget that was measured, or lowered after memory ran out.

        None: the configuration's is in use.
        """
        return self._token_budget

    @token_budget.setter
    def token_budget(self, budget: int | None) -> None:
        self._token_budget = budget
        if budget is not None:
            self.collator.budget = budget if self.measures else min(budget, self.collator.budget)

    def micro_batches(self, pairs: Sequence[Pair]) -> list[MicroBatch]:
        """Return all pairs, packed into micro-batches, each with the totals of the step.

        The totals `num_supervised` (see `Method.num_supervised`) and `num_pairs` are scalars. With
        them the loss of a micro-batch is computed as a share of the step's loss. Where several
        processes average their gradients, the totals are averaged over the processes too.

        `divergence` returns the step's `Batch.divergence`. It is computed when the first
        micro-batch is scored: if memory runs out then, the step is taken again like any other.
        """
        if not self.method.reads_rejected:
            pairs = [{**pair, "rejected_ids": [], "rejected_mask": []} for pair in pairs]
        laid_out = self.collator(pairs) if pairs else []
        self._widest = max(map(tokens_of, laid_out), default=0)
        counts = torch.cat([torch.empty(0, 3, dtype=torch.int64), *(m["counts"] for m in laid_out)])
        num_supervised = self.method.num_supervised(counts).float().sum()
        totals = torch.stack([num_supervised, torch.tensor(float(len(pairs)))])
        names = ("num_supervised", "num_pairs")
        shared = dict(zip(names, self.devices.average(totals), strict=True))
        if self.method.needs_divergence and not pairs:
            self._divergence([])  # the other processes wait for what this one has: nothing
        elif self.method.needs_divergence:
            others = self.devices.even(self.collator(mismatched.of(pairs)))
            shared["divergence"] = functools.cache(functools.partial(self._divergence, others))
        return [
            self.devices.place(micro_batch | shared) for micro_batch in self.devices.even(laid_out)
        ]

    @torch.no_grad()
    def _divergence(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Return `Batch.divergence`, from the mismatched pairs of a step.

        The random numbers of the step are left as they are. So its dropout is the same when its
        micro-batches are scored again.
        """
        device = self.devices.device
        taken = torch.zeros(2, device=device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for micro_batch in map(self.devices.place, micro_batches):
                ratios = self._sums(micro_batch)[:, 1:] - micro_batch[REFERENCE]
                num = (micro_batch["counts"][:, 1:] > 0).sum()
                sums = torch.stack([ratios.sum(), num.to(ratios.dtype)])
                taken = taken + sums * (not micro_batch.get(REPEATED))
        total, num = self.devices.total(taken)
        return (total / num).clamp(min=0)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Inside this context, let the model read rows of pairs, with fused and compiled layers.

        Without gradients the layers are not compiled: that would need a second compilation.
        """
        compiled = self.compiled if torch.is_grad_enabled() else None
        with (
            reading_rows(self._base, self.attention_implementation),
            fused(self._layers, self.devices.dtype),
            compiled.active() if compiled else contextlib.nullcontext(),
        ):
            yield

    def logps(self, micro_batch: MicroBatch) -> Tensor:
        """Return the log-probabilities of the N scored tokens, [N], in nats, in fp32 or wider."""
        with self.devices.precision():
            scored = scored_logps(
                self._base, micro_batch, self.attention_implementation, self._base.config
            )
        return scored.to(torch.promote_types(scored.dtype, torch.float32))

    def score(self, micro_batch: MicroBatch, beta: float) -> Score:
        """Return the micro-batch's share of the step's loss, and the micro-batch's metrics."""
        divergence = micro_batch["divergence"]() if "divergence" in micro_batch else None
        batch = Batch(
            self._sums(micro_batch),
            micro_batch["counts"],
            reference=micro_batch[REFERENCE],
            num_supervised=micro_batch["num_supervised"],
            num_pairs=micro_batch["num_pairs"],
            divergence=divergence,
        )
        losses = self.method.losses(batch, beta)
        sums = torch.stack(tuple(losses.terms.values())).detach().sum(1)
        ones = torch.ones_like(batch.logps[:, 0])
        nums = torch.stack([losses.nums.get(name, ones).sum() for name in losses.terms])
        names, share = tuple(losses.terms), 0.0 if micro_batch.get(REPEATED) else 1.0
        return Score(losses.loss * share, Sums(names, sums * share, nums * share), losses.parts)

    def _sums(self, micro_batch: MicroBatch) -> Tensor:
        """Return the sums of log-probabilities of prompt, chosen and rejected tokens, [B, 3]."""
        scored, counts = self.logps(micro_batch), micro_batch["counts"]
        sums = scored.new_zeros(counts.numel()).index_add(0, micro_batch["sums"], scored)
        return sums.view_as(counts)

    def recover(self, error: BaseException, micro_batches: Sequence[MicroBatch], step: int) -> bool:
        """Halve the token budget if memory ran out; otherwise give up compiled layers.

        The compiler raises errors of many types. A `UserError` is of our own code.
        """
        if memory.ran_out(error):
            return self._halve_budget(micro_batches, step)
        if self.compiled is None or isinstance(error, UserError):
            return False
        self.compiled = None
        log.warning(
            "step %d: failed with compiled layers (%s); this step and all later ones are taken "
            "without (engine.compile=false)",
            step,
            one_line(f"{type(error).__name__}: {error}")[:200],
        )
        return True

    def fit_budget(self, used: int, room: int) -> None:
        """Raise the token budget to what fits, if the configuration leaves it open.

        Memory grows with the tokens of a micro-batch. SHARE of the room is filled, since the
        allocator cannot use all of it. A budget that was lowered in the first step stays.
        """
        if not self.measures or self.token_budget is not None or used <= 0:
            return
        budget = min(int(SHARE * room / used * self._widest), MAX_BUDGET)
        if budget <= self.collator.budget:
            return
        self.token_budget = budget
        log.info(
            "engine.tokens_per_microbatch=%d from step 2 on: %d tokens took %.2f GB for their "
            "activations, and there is room for %.2f GB",
            budget,
            self._widest,
            used / 1e9,
            room / 1e9,
        )

    def _halve_budget(self, micro_batches: Sequence[MicroBatch], step: int) -> bool:
        """Set the budget to half of the old one, or of the widest micro-batch if that is smaller.

        The gradient does not depend on the packing, except through the dropout of adapters: with
        another packing its random numbers fall on other tokens.

        Returns:
            False where every micro-batch holds a single pair: then the budget stays.
        """
        before = self.collator.budget
        budget = halved(before, [micro_batch["sizes"] for micro_batch in micro_batches])
        if budget is None:
            return False
        self.token_budget = budget
        log.warning(
            "step %d: out of memory; taken again with engine.tokens_per_microbatch=%d instead of "
            "%d, which the run keeps: the same gradient, but for adapters' dropout",
            step,
            self.token_budget,
            before,
        )
        return True


def build(
    config: Config, *, model: CausalModel, tokenizer: PreTrainedTokenizerBase, devices: OneDevice
) -> SharedPrefix:
    """Return our own engine; the arguments are those of `engine.build`."""
    assert isinstance(config.engine, SharedPrefixEngine)
    method, implementation = methods.build(config), choose_attention(model, devices.dtype)
    collator = Collator(
        budget=config.engine.tokens_per_microbatch or default_budget(config.dataset.max_length),
        multiple=attention.BLOCK if implementation == attention.FLEX else 1,
        prompt_is_scored=method.scores_prompt,
        pad_token_id=int(tokenizer.pad_token_id),
    )
    return SharedPrefix(
        model,
        collator,
        method=method,
        attention_implementation=implementation,
        devices=devices,
        measures=config.engine.tokens_per_microbatch is None,
        compiled=CompiledLayers(model) if _compiles(config.engine, model) else None,
    )


def _compiles(engine: SharedPrefixEngine, model: CausalModel) -> bool:
    """Return whether to compile the model's decoder layers."""
    if engine.compile != AUTO:
        return engine.compile == "true"
    if is_sharded(model):
        return False
    is_large = without_adapters(model).num_parameters() >= MIN_COMPILED
    return model.device.type == "cuda" and is_large


def check(model: CausalModel, dtype: torch.dtype) -> None:
    """Refuse a model that reads a pair differently as one row and as two sequences.

    `attention.check` comes first: it knows some architectures, and gives a clearer reason.

    Args:
        model: on its device, with adapters if it has any; stays in training or evaluation mode.
        dtype: precision of the arithmetic.

    Raises:
        UserError: the model cannot be trained on rows.
        NonFiniteError: the untrained model's log-probabilities are not finite.
    """
    base = without_adapters(model)
    name = type(base).__name__
    attention.check(base)
    try:
        apart = _apart(model, attention.BY_PAIR, dtype)
    except (RuntimeError, TypeError) as error:
        if memory.ran_out(error):
            raise
        raise UserError(
            f"engine=shared_prefix cannot train {name}: it does not take a row of a pair "
            f"({one_line(error)[:200]}); use engine=trl"
        ) from error
    if not math.isfinite(apart):
        raise NonFiniteError(
            f"{name} predicts nothing finite (a mean log-probability is {apart}) before it is "
            "trained: its weights are damaged, or model.dtype is too narrow for them"
        )
    if not apart < _max_apart(base, dtype):
        raise UserError(
            f"engine=shared_prefix cannot train {name}: a pair read as one row and as two "
            f"sequences differ by {apart:.2g} nats a token on average; use engine=trl"
        )


def choose_attention(model: CausalModel, dtype: torch.dtype) -> str:
    """Return the fastest attention implementation that reads rows of a model rightly.

    Flash attention is tried first, forward and backward: its kernels are chosen for the GPU and for
    the size of heads. Where flash attention fails, a warning says why.

    Args:
        model: on its device, with adapters if it has any; `check` has accepted the model.
        dtype: precision of the arithmetic.
    """
    for name in attention.possible(without_adapters(model), dtype):
        trouble = _trouble_of_flash(model, dtype) if name == attention.VARLEN else None
        if trouble is None:
            return name
        _warn_once(f"flash attention is not used, which is slower: {trouble}")
    raise AssertionError("BY_PAIR is always possible")


def _trouble_of_flash(model: CausalModel, dtype: torch.dtype) -> str | None:
    """Return why flash attention cannot read rows of a model on its GPU; None: it can."""
    base = without_adapters(model)
    try:
        error = attention.flash_error(base, _row(_probe(base), base.device), dtype)
        apart = _apart(model, attention.VARLEN, dtype)
    except (RuntimeError, TypeError, ValueError) as problem:
        if memory.ran_out(problem):
            raise
        return one_line(problem)[:200]
    if not error < MAX_FLASH_ERROR:
        return f"on this GPU its output or a gradient is off by {error:.2g} of its size"
    if not apart < _max_apart(base, dtype):
        return f"a pair read as one row differs by {apart:.2g} nats a token on average"
    return None


@functools.cache
def _warn_once(line: str) -> None:
    log.warning("%s", line)


def _max_apart(base: Any, dtype: torch.dtype) -> float:
    # With 8-bit weights the rounding of a token depends on the tokens beside it, in any dtype
    in_8_bits = any(weight.dtype == torch.int8 for weight in base.parameters())
    return MAX_APART[torch.int8 if in_8_bits else dtype]


def _apart(model: CausalModel, implementation: str, dtype: torch.dtype) -> float:
    """Return how much PROBE differs as one row and as two sequences.

    The row is read as the engine reads rows; the sequences are read by the model's own layers.

    Returns:
        The mean absolute difference of the log-probabilities, in nats a token.
    """
    base = without_adapters(model)
    prepare(base)
    was_training, pair = base.training, _probe(base)
    prompt, *completions = pair
    base.eval()
    try:
        with (
            torch.no_grad(),
            torch.autocast(base.device.type, dtype, enabled=dtype != torch.float32),
        ):
            expected = [_logps(base, prompt + completion) for completion in completions]
            expected[1] = expected[1][len(prompt) - 1 :]
            with reading_rows(base, implementation), fused(fusible(model), dtype):
                seen = scored_logps(base, _row(pair, base.device), implementation, base.config)
    finally:
        base.train(was_training)
    return float((seen - torch.cat(expected)).abs().mean())


def _logps(base: Any, ids: list[int]) -> Tensor:
    """Return the log-probabilities of all tokens of a sequence but the first, in nats."""
    sequence = torch.tensor([ids], device=base.device)
    logps = base(input_ids=sequence, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return logps.gather(1, sequence[0, 1:, None])[:, 0]


def _probe(base: Any) -> list[list[int]]:
    """Return PROBE in ids of ordinary tokens: prompt, chosen and rejected."""
    first = ORDINARY if base.config.get_text_config().vocab_size > 2 * ORDINARY else 0
    return [[token_id + first for token_id in part] for part in PROBE]


def _row(parts: list[list[int]], device: torch.device) -> MicroBatch:
    """Return the pair of a prompt, a chosen and a rejected completion as a row."""
    prompt, chosen, rejected = parts
    pair = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
    collator = Collator(
        budget=MIN_BUDGET, multiple=1, prompt_is_scored=True, pad_token_id=prompt[0]
    )
    return OneDevice(device, torch.float32).place(collator.lay_out([pair]))


def prepare(base: Any) -> None:
    """Let a model score tokens and read rows, inside `reading_rows`; a second call does nothing."""
    add_scoring(base)
    attention.tell_windows(base)


@contextlib.contextmanager
def reading_rows(base: Any, implementation: str) -> Iterator[None]:
    """Give a model the attention that reads rows of pairs; restore its own attention at the end."""
    # `set_attn_implementation` of the model looks at all modules, and would do so twice a step
    config = base.config
    before, config._attn_implementation = config._attn_implementation, implementation
    try:
        yield
    finally:
        config._attn_implementation = before


def scored_logps(
    model: CausalModel, micro_batch: dict[str, Any], implementation: str, config: PretrainedConfig
) -> Tensor:
    """Return the log-probabilities of a micro-batch's N scored tokens, [N], in nats."""
    return model(
        input_ids=micro_batch["input_ids"],
        position_ids=micro_batch["position_ids"],
        sources=micro_batch["sources"],
        targets=micro_batch["targets"],
        **attention.inputs(implementation, micro_batch, config),
    )


def default_budget(max_length: int) -> int:
    """Return the default token budget: 2 * `max_length` fits any pair; at least MIN_BUDGET."""
    return max(MIN_BUDGET, 2 * max_length)
