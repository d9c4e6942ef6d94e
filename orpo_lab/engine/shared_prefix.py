"""The fast ORPO step: every prompt once, packed rows, no logits, no synchronisation.

One batch of the dataloader is the whole optimizer step. It is packed into micro-batches
(`engine.packing`), whose losses are shares of the step's (`loss.orpo`): so the gradient does not
depend on the packing.
"""

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import (
    PretrainedConfig,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from orpo_lab import memory
from orpo_lab.config import Config, Objective, SharedPrefixEngine
from orpo_lab.data import Data
from orpo_lab.engine import attention
from orpo_lab.engine.head import add_scoring
from orpo_lab.engine.packing import Collator, is_one_pair, tokens_of
from orpo_lab.errors import NonFiniteError, UserError, one_line
from orpo_lab.galore import GaLore
from orpo_lab.loss import Losses, orpo, supervised

log = logging.getLogger(__name__)

# Tokens of a micro-batch below which its fixed costs show
MIN_BUDGET = 1024
# A pair to try a model on: prompt, chosen, rejected
PROBE = [3, 4, 5, 6], [7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17]
# Nats a token that rounding may set two readings of it apart; a wrong one is off by more
MAX_APART = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.25, torch.int8: 0.25}


class OrpoTrainer(Trainer):
    """`transformers.Trainer` on batches of `packing.Collator`; logs TRL's metrics but the logits'.

    Args:
        beta: weight of the odds-ratio loss; may be set anew before every step.
        objective: what the loss is.
        attention_implementation: as `attention.choose` returns it.
        others: as for `transformers.Trainer`.
    """

    def __init__(
        self, *, beta: float, objective: Objective, attention_implementation: str, **others: Any
    ) -> None:
        super().__init__(**others)
        self.beta = beta
        self.objective = objective
        self.attention_implementation = attention_implementation
        self._token_budget: int | None = None
        self._base = causal_model(self.model)
        add_scoring(self._base)
        # Sums of the metrics over pairs, and how many pairs, since the last line
        self._names: tuple[str, ...] = ()
        self._sums: dict[str, Tensor] = {}
        self._num_pairs: dict[str, int] = {}

    @property
    def token_budget(self) -> int | None:
        """Tokens of a micro-batch, where memory ran out with those of the configuration."""
        return self._token_budget

    @token_budget.setter
    def token_budget(self, budget: int | None) -> None:
        self._token_budget = budget
        if budget is not None:
            self.data_collator.budget = min(budget, self.data_collator.budget)

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Add up the gradients of a whole optimizer step, and return its loss, detached.

        Where memory runs out the step is taken again from its start with half the token budget,
        until every micro-batch is one pair: the gradient does not depend on the packing, but for
        adapters' dropout, whose random numbers fall on other tokens then.

        Raises:
            OutOfMemoryError, RuntimeError: there is not enough memory for one pair.
        """
        model.train()
        start = _RandomState.now(), dict(self._sums), dict(self._num_pairs)
        while True:
            batch = self.data_collator.within_budget(inputs)
            try:
                return self._add_up(model, self._micro_batches(batch))
            except (RuntimeError, MemoryError) as error:
                if not memory.ran_out(error) or all(map(is_one_pair, batch["micro_batches"])):
                    raise
            # Not before the error is gone: its traceback holds all activations
            self._begin_again(*start)
            self._halve_budget(batch)

    def _add_up(self, model: Any, micro_batches: list[dict[str, Any]]) -> Tensor:
        total = torch.zeros((), device=self.args.device)
        with reading_rows(self._base, self.attention_implementation):
            for i, micro_batch in enumerate(micro_batches):
                is_last = i == len(micro_batches) - 1
                with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                    loss = self.compute_loss(model, micro_batch)
                    self.accelerator.backward(loss)
                total += loss.detach()
        return total

    def _begin_again(
        self, random: "_RandomState", sums: dict[str, Tensor], num_pairs: dict[str, int]
    ) -> None:
        """Undo what a part of a step has done."""
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # in accelerate's
        if isinstance(optimizer, GaLore):
            optimizer.drop_gradients()
        else:
            optimizer.zero_grad()
        self._sums, self._num_pairs = dict(sums), dict(num_pairs)
        memory.give_back()
        random.restore()

    def _halve_budget(self, batch: dict[str, Any]) -> None:
        """Lower the budget to half of the step's widest micro-batch, or of what it was."""
        widest = max(map(tokens_of, batch["micro_batches"]))
        before = self.data_collator.budget
        self.token_budget = min(widest, before) // 2
        log.warning(
            "step %d: out of memory; taken again with engine.tokens_per_microbatch=%d instead of "
            "%d, which the run keeps: the same gradient, but for adapters' dropout",
            self.state.global_step + 1,
            self.token_budget,
            before,
        )

    def _micro_batches(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """Return a step's micro-batches, each with the totals that its loss is a share of.

        Where several processes average their gradients, the totals are those of all of them.
        """
        batch = self._prepare_inputs(inputs)
        tokens_of_pairs = supervised(batch["counts"], self.objective).float()
        totals = torch.stack([tokens_of_pairs.sum(), torch.ones_like(tokens_of_pairs).sum()])
        totals = self.accelerator.reduce(totals, "mean")
        return [
            one | {"num_tokens": totals[0], "num_pairs": totals[1]}
            for one in batch["micro_batches"]
        ]

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Return a micro-batch's share of the loss."""
        scored = token_logps(model, inputs, self.attention_implementation, self._base.config)
        counts = inputs["counts"]
        logps = scored.new_zeros(counts.numel())
        losses = orpo(
            logps.index_add(0, inputs["sums"], scored).view_as(counts),
            counts,
            beta=self.beta,
            objective=self.objective,
            num_tokens=inputs["num_tokens"],
            num_pairs=inputs["num_pairs"],
        )
        self._count(losses, inputs["num_pairs"], "train" if model.training else "eval")
        return losses.loss

    def _count(self, losses: Losses, num_pairs: Tensor, mode: str) -> None:
        """Add a micro-batch to the metrics, on its device."""
        metrics = pair_metrics(losses, self.beta, num_pairs)
        self._names = tuple(metrics)
        sums = torch.stack(tuple(metrics.values())).detach().sum(1)
        self._sums[mode] = self._sums[mode] + sums if mode in self._sums else sums
        self._num_pairs[mode] = self._num_pairs.get(mode, 0) + len(losses.log_odds)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics since the last line."""
        mode = "train" if "loss" in logs else "eval"
        if mode in self._sums:
            means = self._sums.pop(mode) / self._num_pairs.pop(mode)
            means = self.accelerator.reduce(means, "mean").tolist()  # device-to-host sync
            prefix = "eval_" if mode == "eval" else ""
            logs |= {prefix + name: value for name, value in zip(self._names, means, strict=True)}
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Return the loss of a batch of held-out pairs."""
        batch = self.data_collator.within_budget(inputs)
        with torch.no_grad(), reading_rows(self._base, self.attention_implementation):
            losses = [self.compute_loss(model, one) for one in self._micro_batches(batch)]
        return torch.stack(losses).sum(), None, None


@dataclass(frozen=True)
class _RandomState:
    """Where torch's random numbers are, from which dropout takes its own."""

    cpu: Tensor
    gpu: Tensor | None

    @classmethod
    def now(cls) -> "_RandomState":
        gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return cls(torch.get_rng_state(), gpu)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu)


def pair_metrics(losses: Losses, beta: float, num_pairs: Tensor) -> dict[str, Tensor]:
    """Return TRL's metrics and the beta-free ones of each of B pairs, [B], under their names.

    Args:
        losses: of the pairs.
        beta: weight of the odds-ratio loss.
        num_pairs: of the whole step, of whose NLL `losses.nll` is a share.
    """
    chosen, rejected = losses.chosen_logps, losses.rejected_logps
    return {
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * rejected,
        "rewards/accuracies": (beta * chosen > beta * rejected).to(chosen),
        "rewards/margins": beta * (chosen - rejected),
        "logps/rejected": rejected,
        "logps/chosen": chosen,
        "nll_loss": (losses.nll * num_pairs / len(chosen)).expand_as(chosen),
        "log_odds_ratio": logsigmoid(losses.log_odds),
        "log_odds_chosen": losses.log_odds,
        "preference_accuracy": (chosen > rejected).to(chosen),
        "logp_margin": chosen - rejected,
        "odds_ratio_loss": losses.odds_ratio,
    }


def build(
    config: Config,
    *,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    arguments: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    callbacks: list[TrainerCallback],
) -> OrpoTrainer:
    """Return a trainer around our own step; the parts are those of `engine.trl.build`."""
    assert isinstance(config.engine, SharedPrefixEngine)
    implementation = attention.choose(causal_model(model))
    collator = Collator(
        budget=config.engine.tokens_per_microbatch or default_budget(config.dataset.max_length),
        multiple=attention.BLOCK if implementation == attention.FLEX else 1,
        prompt_is_scored=config.objective.nll_scope == "prompt_and_completion",
        pad_token_id=int(tokenizer.pad_token_id),
    )
    batch_size = config.train.batch_size
    ids = ["prompt_ids", "chosen_ids", "rejected_ids"]
    return OrpoTrainer(
        beta=config.beta,
        objective=config.objective,
        attention_implementation=implementation,
        model=model,
        args=TrainingArguments(
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            remove_unused_columns=False,
            # To a GPU the next step's batch travels while this one is computed
            accelerator_config={"non_blocking": torch.cuda.is_available()},
            **arguments,
        ),
        data_collator=collator,
        train_dataset=data.train.select_columns(ids),
        eval_dataset=data.held_out.select_columns(ids) if config.train.eval_steps else None,
        processing_class=tokenizer,
        optimizers=(optimizer, None),
        callbacks=callbacks,
    )


def check(model: Any, dtype: torch.dtype) -> None:
    """Read a pair both as a row and as two sequences, and refuse a model that sees a difference.

    What is known of its attention is asked first, for a clearer reason (`attention.check`).

    Args:
        model: on its device, with adapters if it has any; left in the mode it came in.
        dtype: precision of the arithmetic.

    Raises:
        UserError: it cannot be trained on rows.
    """
    base = causal_model(model)
    attention.check(base)
    add_scoring(base)
    name, was_training = type(base).__name__, base.training
    base.eval()
    try:
        with (
            torch.no_grad(),
            torch.autocast(base.device.type, dtype, enabled=dtype != torch.float32),
        ):
            apart = _apart(base)
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"engine=shared_prefix cannot train {name}: it does not take a row of a pair "
            f"({one_line(error)[:200]}); use engine=trl"
        ) from error
    finally:
        base.train(was_training)
    if not math.isfinite(apart):
        raise NonFiniteError(
            f"{name} predicts nothing finite (a mean log-probability is {apart}) before it is "
            "trained: its weights are damaged, or model.dtype is too narrow for them"
        )
    # In 8 bits a token's rounding depends on the tokens beside it, whatever the rest computes in
    in_8_bits = any(weight.dtype == torch.int8 for weight in base.parameters())
    if not apart < MAX_APART[torch.int8 if in_8_bits else dtype]:
        raise UserError(
            f"engine=shared_prefix cannot train {name}: a pair read as one row and as two "
            f"sequences differ by {apart:.2g} nats a token on average; use engine=trl"
        )


def _apart(base: Any) -> float:
    """Return how far a row and its two sequences are apart, in nats a token."""
    prompt, chosen, rejected = PROBE
    pair = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
    collator = Collator(
        budget=MIN_BUDGET, multiple=1, prompt_is_scored=True, pad_token_id=prompt[0]
    )
    row = {
        key: value.to(base.device) if isinstance(value, Tensor) else value
        for key, value in collator.lay_out([pair]).items()
    }
    expected = []
    for ids in (prompt + chosen, prompt + rejected):
        sequence = torch.tensor([ids], device=base.device)
        logps = base(input_ids=sequence, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        expected.append(logps.gather(1, sequence[0, 1:, None])[:, 0])
    expected[1] = expected[1][len(prompt) - 1 :]
    with reading_rows(base, attention.BY_PAIR):
        seen = token_logps(base, row, attention.BY_PAIR, base.config)
    return float((seen - torch.cat(expected)).abs().mean())


@contextlib.contextmanager
def reading_rows(base: Any, implementation: str) -> Iterator[None]:
    """Give a model the attention that reads a row of pairs; afterwards its own again."""
    before = base.config._attn_implementation
    base.set_attn_implementation(implementation)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def token_logps(
    model: Any, micro_batch: dict[str, Any], implementation: str, config: PretrainedConfig
) -> Tensor:
    """Return the log-probabilities of what is scored of a micro-batch, [N]."""
    return model(
        input_ids=micro_batch["input_ids"],
        position_ids=micro_batch["position_ids"],
        attention_mask=attention.mask(implementation, micro_batch, config),
        sources=micro_batch["sources"],
        targets=micro_batch["targets"],
    )


def default_budget(max_length: int) -> int:
    """Return twice the longest sequence, which any pair fits, and at least MIN_BUDGET."""
    return max(MIN_BUDGET, 2 * max_length)


def causal_model(model: Any) -> Any:
    """Return the causal language model inside adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
