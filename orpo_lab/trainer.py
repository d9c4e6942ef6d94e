"""One training run: the schedule of beta, the guard against non-finite numbers, the metrics.

What computes a step is the engine's; the loop, the learning rate, the checkpoints are those of
`transformers.Trainer`.
"""

import contextlib
import logging
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, TrainerCallback

from orpo_lab import engine
from orpo_lab import optimizer as optimizers
from orpo_lab.beta_schedule import beta_at, progress
from orpo_lab.config import Config, Galore
from orpo_lab.data import Data
from orpo_lab.errors import LIKELY_CAUSES, NonFiniteError, UserError
from orpo_lab.galore import GaLore
from orpo_lab.run_folder import RunFolder
from orpo_lab.tracker import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainStats:
    """What training cost; design: `summary.json`, key `train`."""

    steps: int
    wall_seconds: float
    tokens_per_second: float
    pairs_per_second: float
    peak_memory_bytes: int
    device: str
    """The GPU's name, or cpu."""
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
        NonFiniteError: a loss or a gradient is not finite; no weight took it.
    """
    num_steps = count_steps(config, len(data.train))
    data = replace(data, train=_whole_batches(data.train, config.train.batch_size))
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

    reset_peak_memory()
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
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        galore_memory_bytes=optimizer.memory() if isinstance(optimizer, GaLore) else None,
    )


def _whole_batches(pairs: datasets.Dataset, batch_size: int) -> datasets.Dataset:
    """Leave out what is over: transformers would end every epoch in a smaller step, whose pairs
    weigh more."""
    left_over = len(pairs) % batch_size
    if left_over:
        log.info("%d training pairs are left over from whole batches and not used", left_over)
    return pairs.select(range(len(pairs) - left_over))


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
    """Keeps a non-finite loss or gradient from every weight, and stops the run.

    What it sees stays on the device: from the first such step on, gradients are zero. It is read,
    and the run stopped, at the next logging step and before anything is evaluated or saved.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, fp16: bool) -> None:
        self.optimizer = optimizer
        # In fp16 the loss scaler meets infinite gradients by design, and skips those steps
        self.check_gradients = not fp16
        self.losses: list[torch.Tensor] = []
        self.seen: torch.Tensor | None = None
        """The first non-finite step, its loss and its gradient norm, [3]; zeros: none yet."""

    def watch(self, trainer: Any) -> None:
        """Look at every micro-batch's loss as the trainer computes it."""
        compute_loss = trainer.compute_loss

        def watched(*args: Any, **kwargs: Any) -> Any:
            result = compute_loss(*args, **kwargs)
            loss = result[0] if isinstance(result, tuple) else result
            if torch.is_grad_enabled():
                self.losses.append(loss.detach())
            return result

        trainer.compute_loss = watched

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the step's losses and gradients, and zero the latter if there is a fault."""
        gradients = self._gradients() if self.check_gradients else []
        loss = torch.stack(self.losses).sum().float()
        self.losses.clear()
        norm = (
            torch.nn.utils.get_total_norm(gradients).to(loss) if gradients else loss.new_zeros(())
        )
        now = torch.stack([torch.full_like(loss, state.global_step + 1), loss, norm])
        if self.seen is None:
            self.seen = torch.zeros_like(now)
        is_first = ~torch.isfinite(now).all() & (self.seen[0] == 0)
        self.seen = torch.where(is_first, now, self.seen)
        for gradient in gradients:
            gradient.masked_fill_((self.seen[0] > 0).to(gradient.device), 0)

    def _gradients(self) -> list[torch.Tensor]:
        if isinstance(self.optimizer, GaLore):
            return self.optimizer.gradients()
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        return [p.grad for p in weights if p.grad is not None]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the run before a fault is logged over or saved."""
        flags = ("should_log", "should_evaluate", "should_save", "should_training_stop")
        if self.seen is None or not any(getattr(control, flag) for flag in flags):
            return
        step, loss, norm = self.seen.tolist()  # device-to-host sync
        if step:
            what = f"gradient norm is {norm}" if math.isfinite(loss) else f"loss is {loss}"
            raise NonFiniteError(
                f"step {step:.0f}: the {what}; the run stops, and nothing of that step or after it "
                f"is kept. {LIKELY_CAUSES}"
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


def reset_peak_memory() -> None:
    """Let the peak begin anew, from what is held now: a process may have trained before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # elsewhere than on Linux it stays the process's
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Return the peak since `reset_peak_memory`: the GPU's allocations, or a CPU process's size."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would count what a larger process held when it started this one
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
