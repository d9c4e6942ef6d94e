"""One training run: the schedule of beta, the guard against non-finite numbers, the metrics.

What computes a step is the engine's; the loop, the learning rate, the checkpoints are those of
`transformers.Trainer`.
"""

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, TrainerCallback

from orpo_lab import engine
from orpo_lab import optimizer as optimizers
from orpo_lab.beta_schedule import beta_at, progress
from orpo_lab.config import Config, Galore
from orpo_lab.data import Data
from orpo_lab.errors import UserError
from orpo_lab.galore import GaLore
from orpo_lab.run_folder import RunFolder
from orpo_lab.tracker import Run

log = logging.getLogger(__name__)


class NonFiniteError(UserError):
    """A loss or a gradient was NaN or infinite; the weights are those before that step."""


@dataclass(frozen=True)
class TrainStats:
    """What training cost; design: `summary.json`, key `train`."""

    steps: int
    wall_seconds: float
    tokens_per_second: float
    pairs_per_second: float
    peak_memory_bytes: int
    galore_memory_bytes: dict[str, dict[str, int]] | None
    """What GaLore's weights, gradients and states take; None with another optimizer."""


def fit(
    config: Config,
    *,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    dtype: torch.dtype,
    place: RunFolder,
    log_to: Run,
    checkpoint: Path | None,
) -> TrainStats:
    """Train the model in place.

    Args:
        config: the run.
        model: on its device, with adapters if it has any.
        tokenizer: with a pad token.
        data: tokenized pairs that fit.
        dtype: precision of the arithmetic.
        place: the run folder; checkpoints go to `checkpoints/` in it, metrics to its file.
        log_to: the tracked run, which gets the same metrics.
        checkpoint: the one to continue from; None: from the start.

    Raises:
        NonFiniteError: a loss or a gradient is not finite; no weight was touched by it.
    """
    num_steps = count_steps(config, len(data.train))
    left_over = len(data.train) % config.train.batch_size
    if left_over:
        log.info("%d training pairs are left over from whole batches and not used", left_over)
    optimizer = optimizers.build(config, model, num_steps=num_steps, dtype=dtype)
    guard = NonFiniteGuard(optimizer, fp16=dtype == torch.float16)
    trainer = engine.build(
        config,
        model=model,
        tokenizer=tokenizer,
        data=data,
        arguments=arguments(config, place.path, dtype),
        optimizer=optimizer,
        callbacks=[guard],
    )
    for upstream in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(upstream)
    metrics = MetricsCallback(trainer, optimizer, place, log_to)
    for ours in (BetaCallback(config, trainer), metrics):
        trainer.add_callback(ours)
    guard.watch(trainer)
    # A resumed run writes the lines after its checkpoint again
    place.cut_metrics(_step_of(checkpoint) if checkpoint else 0)

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - start
    done = trainer.state.global_step - (_step_of(checkpoint) if checkpoint else 0)
    pairs = done * config.train.batch_size
    return TrainStats(
        steps=trainer.state.global_step,
        wall_seconds=seconds,
        tokens_per_second=pairs * _mean_tokens(data) / seconds,
        pairs_per_second=pairs / seconds,
        peak_memory_bytes=peak_memory_bytes(),
        galore_memory_bytes=optimizer.memory() if isinstance(optimizer, GaLore) else None,
    )


def count_steps(config: Config, num_pairs: int) -> int:
    """Return the run's optimizer steps; an epoch is as many whole batches as there are.

    Raises:
        UserError: one batch needs more pairs than there are.
    """
    per_epoch = num_pairs // config.train.batch_size
    if per_epoch == 0:
        raise UserError(
            f"train.batch_size={config.train.batch_size} is above the {num_pairs} training pairs; "
            "lower it"
        )
    if config.train.max_steps is not None:
        return config.train.max_steps
    assert config.train.num_epochs is not None
    return math.ceil(per_epoch * config.train.num_epochs)


def arguments(config: Config, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Return what every engine hands to `transformers.TrainingArguments`; nothing is left to its
    defaults that a run's result depends on."""
    train, optimizer = config.train, config.optimizer
    layerwise = isinstance(optimizer, Galore) and optimizer.layerwise
    return {
        "output_dir": str(folder / "checkpoints"),
        "seed": config.seed,
        "max_steps": train.max_steps or -1,
        "num_train_epochs": train.num_epochs or 0,
        "dataloader_drop_last": True,
        "learning_rate": optimizer.learning_rate,
        "lr_scheduler_type": train.lr_scheduler_type,
        "warmup_steps": train.warmup_steps,
        # Layer-wise GaLore has the gradients, and clips them itself
        "max_grad_norm": 0 if layerwise else train.max_grad_norm,
        "gradient_checkpointing": train.gradient_checkpointing,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": train.logging_steps,
        "logging_first_step": True,
        # It would log the last good loss in place of NaN; the guard stops instead
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if train.eval_steps else "no",
        "eval_steps": train.eval_steps,
        "save_strategy": "steps" if train.save_steps else "no",
        "save_steps": train.save_steps or 0,
        "save_total_limit": train.num_checkpoints,
        "report_to": "none",
        "disable_tqdm": True,
    }


class BetaCallback(TrainerCallback):
    """Sets the trainer's beta before every optimizer step."""

    def __init__(self, config: Config, trainer: Any) -> None:
        self.config, self.trainer = config, trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Micro-batches of one step share one beta."""
        self.trainer.beta = beta_at(
            self.config.beta_schedule,
            progress(state.global_step, state.max_steps),
            beta=self.config.beta,
            beta_end=self.config.beta_end,
        )


class MetricsCallback(TrainerCallback):
    """Hands every line of metrics on, with the beta of its step, and shows how far the run is."""

    SHOWN = ("loss", "preference_accuracy", "logp_margin", "beta")

    def __init__(
        self, trainer: Any, optimizer: torch.optim.Optimizer, place: RunFolder, log_to: Run
    ) -> None:
        self.trainer, self.optimizer = trainer, optimizer
        self.place, self.log_to = place, log_to
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar; it hides itself where there is no terminal."""
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="train", disable=None
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self.bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Drop transformers' closing line of timings, which the summary has."""
        if "train_runtime" in logs:
            return
        metrics = {key: value for key, value in logs.items() if isinstance(value, int | float)}
        if "loss" in metrics:
            metrics["beta"] = self.trainer.beta
            if isinstance(self.optimizer, GaLore) and self.optimizer.grad_norm is not None:
                metrics["grad_norm"] = self.optimizer.grad_norm.item()
        self.place.append_metrics(state.global_step, metrics)
        self.log_to.log(state.global_step, metrics)
        shown = {key: f"{metrics[key]:.3f}" for key in self.SHOWN if key in metrics}
        self.bar.set_postfix(shown)
        if self.bar.disable and shown:
            text = "  ".join(f"{key} {value}" for key, value in shown.items())
            log.info("step %d/%d  %s", state.global_step, state.max_steps, text)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.bar.close()


class NonFiniteGuard(TrainerCallback):
    """Stops the run before a non-finite loss or gradient reaches a weight."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, fp16: bool) -> None:
        self.optimizer = optimizer
        # In fp16 the loss scaler meets infinite gradients by design, and skips those steps
        self.check_gradients = not fp16

    def watch(self, trainer: Any) -> None:
        """Look at every micro-batch's loss as the trainer computes it."""
        compute_loss = trainer.compute_loss

        def checked(*args: Any, **kwargs: Any) -> Any:
            result = compute_loss(*args, **kwargs)
            loss = result[0] if isinstance(result, tuple) else result
            if not torch.isfinite(loss):  # device-to-host sync
                raise self._error("loss", loss.item(), trainer.state.global_step)
            return result

        trainer.compute_loss = checked

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the gradients once a step."""
        if isinstance(self.optimizer, GaLore):
            grads = self.optimizer.gradients()
        else:
            weights = [p for group in self.optimizer.param_groups for p in group["params"]]
            grads = [p.grad for p in weights if p.grad is not None]
        if self.check_gradients and grads:
            norm = torch.nn.utils.get_total_norm(grads)
            if not torch.isfinite(norm):  # device-to-host sync
                raise self._error("gradient norm", norm.item(), state.global_step)

    def _error(self, what: str, value: float, step: int) -> NonFiniteError:
        return NonFiniteError(
            f"step {step + 1}: the {what} is {value}; the run stops with step {step}'s weights. "
            "Likely causes: optimizer.learning_rate or beta too high for this model, too short a "
            "train.warmup_steps, or model.dtype=fp16 overflowing (try bf16 or fp32)"
        )


def latest_checkpoint(folder: Path) -> Path:
    """Return a run folder's newest checkpoint.

    Raises:
        UserError: it has none.
    """
    found = sorted((folder / "checkpoints").glob("checkpoint-*[0-9]"), key=_step_of)
    if not found:
        raise UserError(f"resume={folder}: no checkpoint in it; set train.save_steps to write some")
    return found[-1]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[-1])


def _mean_tokens(data: Data) -> float:
    """Return the mean tokens of a training pair: its prompt once, and both completions."""
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    total = sum(len(ids) for column in columns for ids in data.train[column])
    return total / len(data.train)


def peak_memory_bytes() -> int:
    """Return the GPU's peak allocation since training began, or the process's peak on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would count what a larger process held when it started this one
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
