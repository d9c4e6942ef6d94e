"""One training run: the schedule of beta, the guard against non-finite numbers, the metrics.

What computes a step is the engine's; the loop, the learning rate, the checkpoints are those of
`transformers.Trainer`.
"""

import logging
import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import datasets
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, TrainerCallback

from orpo_lab import checkpoint, engine, memory
from orpo_lab import optimizer as optimizers
from orpo_lab.beta_schedule import beta_at, progress
from orpo_lab.checkpoint import Checkpoint, Made, Spent
from orpo_lab.config import Config, Galore, Train
from orpo_lab.data import Data
from orpo_lab.errors import LIKELY_CAUSES, NonFiniteError, UserError, one_line
from orpo_lab.galore import GaLore
from orpo_lab.run_folder import RunFolder
from orpo_lab.stop import Stop, Stopped
from orpo_lab.tracker import Run

log = logging.getLogger(__name__)

# The most that the published recipes in conf/experiment/ take
MAX_EPOCHS = 10


@dataclass(frozen=True)
class TrainStats:
    """What training cost, over all starts of the run; design: `summary.json`, key `train`."""

    steps: int
    wall_seconds: float
    tokens_per_second: float
    pairs_per_second: float
    peak_memory_bytes: int
    skipped_steps: int
    """Steps that took no gradient, since it or the loss was not finite."""
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
    made: Made,
    start: Checkpoint | None,
    stop: Stop,
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
        made: what the run is made from, for its checkpoints.
        start: the checkpoint to continue from; None: from the beginning.
        stop: whether the run should end early; it still waits when this returns, so that the
            caller can save the trained model first.

    Raises:
        NonFiniteError: a loss, a gradient or a weight is not finite; nothing of it is kept.
        OutOfMemoryError, RuntimeError: memory ran out, and nothing is left to make smaller.
        UserError: a checkpoint cannot be written, or the one to continue from does not fit.
        Stopped: the run was asked to end; its last step is in a checkpoint.
    """
    num_steps = count_steps(config, len(data.train))
    data = replace(data, train=_whole_batches(data.train, config.train.batch_size))
    optimizer = optimizers.build(config, model, num_steps=num_steps, dtype=dtype)
    meter, stopper = Meter(start.spent if start else Spent()), StopCallback(stop)
    guard = NonFiniteGuard(optimizer, config.train, meter, fp16=dtype == torch.float16)
    trainer = engine.build(
        config,
        model=model,
        tokenizer=tokenizer,
        data=data,
        arguments=arguments(config, place.path, dtype),
        optimizer=optimizer,
        # The guard looks before anything is saved, also where the run is asked to stop
        callbacks=[stopper, guard],
    )
    for upstream in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(upstream)
    trainer.token_budget = meter.before.token_budget
    for ours in (
        ResumeCallback(trainer, optimizer),
        BetaCallback(config, trainer),
        MetricsCallback(trainer, optimizer, meter, place, log_to),
        CheckpointCallback(trainer, place, made, meter, config.train.num_checkpoints),
    ):
        trainer.add_callback(ours)
    guard.watch(trainer)
    trainer._issue_warnings_after_load = partial(_check_loaded, model)

    meter.start()
    try:
        num_taken = _train(trainer, start, num_steps)
    except UnpicklingError as error:  # torch reads nothing but tensors and plain values
        assert start is not None
        raise UserError(
            f"{start.path} holds more than a checkpoint of ours does, and nothing of that was run "
            f"({one_line(error)[:100]}); do not trust this folder"
        ) from error
    spent = meter.spent()
    if stopper.reason:
        raise Stopped(stopper.reason)
    pairs = num_taken * config.train.batch_size
    return TrainStats(
        steps=num_taken,
        wall_seconds=spent.wall_seconds,
        tokens_per_second=pairs * _mean_tokens(data) / spent.wall_seconds,
        pairs_per_second=pairs / spent.wall_seconds,
        peak_memory_bytes=spent.peak_memory_bytes,
        skipped_steps=spent.num_skipped,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        galore_memory_bytes=optimizer.memory() if isinstance(optimizer, GaLore) else None,
    )


def _train(trainer: Any, start: Checkpoint | None, num_steps: int) -> int:
    """Train to the end, and return the steps that the weights have taken."""
    if start is not None and start.step >= num_steps:
        # transformers takes a step before it asks whether it was the last one
        trainer._load_from_checkpoint(str(start.path))
        return start.step
    trainer.train(resume_from_checkpoint=str(start.path) if start else None)
    return trainer.state.global_step


def _check_loaded(model: torch.nn.Module, result: Any) -> None:
    """Check that a checkpoint had every weight; transformers warns, also of one that is tied.

    Args:
        model: the weights were loaded into.
        result: what torch says of names that were missing and names that nothing has.

    Raises:
        UserError: it had not, or it had others.
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(weight) for name, weight in weights.items() if name not in result.missing_keys}
    missing = [name for name, weight in weights.items() if id(weight) not in loaded]
    if missing or result.unexpected_keys:
        names = ", ".join([*missing, *result.unexpected_keys][:3])
        raise UserError(f"the checkpoint's weights are not this model's ({names}); start a new run")


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


def say_length(config: Config, num_pairs: int) -> None:
    """Say how often a run sees its pairs, and warn where that, or its warm-up, is too long."""
    num_steps, train = count_steps(config, num_pairs), config.train
    num_epochs = num_steps / (num_pairs // train.batch_size)
    is_often = num_epochs > MAX_EPOCHS
    log.log(
        logging.WARNING if is_often else logging.INFO,
        "%d steps are %.3g epochs of %d pairs%s",
        num_steps,
        num_epochs,
        num_pairs,
        f", more than the {MAX_EPOCHS} of any published recipe here: see train.max_steps"
        if is_often
        else "",
    )
    warms_up = train.lr_scheduler_type != "constant"
    if warms_up and num_steps < train.warmup_steps:
        log.warning(
            "train.warmup_steps=%d is above the %d steps of this run: the learning rate ends at "
            "%.3g of its peak; lower it, or give a fraction of the run (0.1)",
            train.warmup_steps,
            num_steps,
            (num_steps - 1) / train.warmup_steps,
        )


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
        # It leaves NaN out of the mean that is logged; where the guard stops, none must be hidden
        "logging_nan_inf_filter": train.on_nonfinite == "skip",
        "eval_strategy": "steps" if train.eval_steps else "no",
        "eval_steps": train.eval_steps,
        "save_strategy": "steps" if train.save_steps else "no",
        "save_steps": train.save_steps or 0,
        # transformers would count checkpoints that nobody finished: `checkpoint.rotate` does it
        "save_total_limit": None,
        "report_to": "none",
        "disable_tqdm": True,
    }


class Meter:
    """What training costs, what was spent before a resume included."""

    def __init__(self, before: Spent) -> None:
        self.before = before
        self.num_skipped = before.num_skipped
        self._begin = math.nan

    def start(self) -> None:
        """Begin to count, before the first step."""
        memory.reset_peak()
        self._begin = time.perf_counter()

    def spent(self) -> Spent:
        """Return what has been spent so far."""
        return Spent(
            wall_seconds=self.before.wall_seconds + time.perf_counter() - self._begin,
            peak_memory_bytes=max(self.before.peak_memory_bytes, memory.peak_bytes()),
            num_skipped=self.num_skipped,
        )


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
    # Few, with short names: in 80 columns a bar is left beside them, however long the run
    IN_BAR: ClassVar = {
        "loss": "loss",
        "preference_accuracy": "accuracy",
        "logp_margin": "margin",
    }

    def __init__(
        self,
        trainer: Any,
        optimizer: torch.optim.Optimizer,
        meter: Meter,
        place: RunFolder,
        log_to: Run,
    ) -> None:
        self.trainer, self.optimizer, self.meter = trainer, optimizer, meter
        self.place, self.log_to = place, log_to
        self.num_skipped = meter.num_skipped
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar; it hides itself where there is no terminal."""
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="train",
            disable=None,
            bar_format="{n_fmt}/{total_fmt} {bar} {elapsed}<{remaining}{postfix}",
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
            if self.meter.num_skipped > self.num_skipped:
                # Of an interval with a skipped step there are no means over all its pairs
                del metrics["loss"]
                self.num_skipped = metrics["skipped_steps"] = self.meter.num_skipped
        metrics = _finite(state.global_step, metrics)
        self.place.append_metrics(state.global_step, metrics)
        self.log_to.log(state.global_step, metrics)
        shown = {key: f"{metrics[key]:.3f}" for key in self.SHOWN if key in metrics}
        if not shown:
            return
        in_bar = {name: f"{metrics[key]:.2f}" for key, name in self.IN_BAR.items() if key in shown}
        self.bar.set_postfix(in_bar)
        if self.bar.disable:
            text = "  ".join(f"{key} {value}" for key, value in shown.items())
            log.info("step %d/%d  %s", state.global_step, state.max_steps, text)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.bar.close()


def _finite(step: int, metrics: dict[str, float]) -> dict[str, float]:
    """Return the figures that JSON and a curve can hold, and say which ones are left out.

    The norm of gradients that fp16's loss scaler skips is infinite, for example.
    """
    others = {key: one for key, one in metrics.items() if not math.isfinite(one)}
    if others:
        said = ", ".join(f"{key} is {one}" for key, one in others.items())
        log.warning("step %d: %s, left out of this step's metrics", step, said)
    return {key: one for key, one in metrics.items() if key not in others}


class StopCallback(TrainerCallback):
    """Ends the run after a step, saved, when it is asked to."""

    def __init__(self, stop: Stop) -> None:
        self.stop = stop
        self.reason = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From now on a request waits for the end of a step."""
        self.stop.waits = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save, and stop."""
        self.reason = self.stop.reason()
        if self.reason:
            control.should_save = control.should_training_stop = True


class ResumeCallback(TrainerCallback):
    """Gives a resumed run its own settings; transformers takes those that are in the checkpoint."""

    def __init__(self, trainer: Any, optimizer: torch.optim.Optimizer) -> None:
        self.trainer = trainer
        self.settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set intervals, and the optimizer's settings with the learning rate of this step."""
        state.compute_steps(args, state.max_steps)
        scheduler = self.trainer.lr_scheduler
        scheduler.base_lrs = [settings["lr"] for settings in self.settings]
        for group, settings, factor in zip(
            self.trainer.optimizer.param_groups, self.settings, scheduler.lr_lambdas, strict=True
        ):
            base = settings["lr"]
            group |= settings | {"initial_lr": base, "lr": base * factor(scheduler.last_epoch)}
        # What transformers logs
        scheduler._last_lr = [group["lr"] for group in self.trainer.optimizer.param_groups]


class CheckpointCallback(TrainerCallback):
    """Seals what transformers saves, and never lets it save weights that are not finite."""

    def __init__(
        self, trainer: Any, place: RunFolder, made: Made, meter: Meter, num_checkpoints: int
    ) -> None:
        save = trainer._save_checkpoint

        def watched(*args: Any, **kwargs: Any) -> None:
            path = place.path / "checkpoints" / f"checkpoint-{trainer.state.global_step}"
            with checkpoint.written(path):
                save(*args, **kwargs)
                spent = replace(meter.spent(), token_budget=trainer.token_budget)
                checkpoint.seal(path, place, made, spent)
            checkpoint.rotate(place, num_checkpoints)

        trainer._save_checkpoint = watched

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Log what is saved: the sums of metrics since the last line are not in a checkpoint."""
        if not control.should_save:
            return
        control.should_log = True
        check_weights(model, state.global_step)


def check_weights(model: torch.nn.Module, step: int) -> None:
    """Look at every trained weight.

    Args:
        model: its weights.
        step: the last one that was taken.

    Raises:
        NonFiniteError: one is not finite.
    """
    finite = [p.isfinite().all() for p in model.parameters() if p.requires_grad]
    if not torch.stack(finite).all():  # device-to-host sync
        raise NonFiniteError(
            f"step {step}: its update left weights that are not finite; the run stops, and nothing "
            f"of that step is kept. {LIKELY_CAUSES}"
        )


class NonFiniteGuard(TrainerCallback):
    """Keeps a non-finite loss or gradient from every weight, and stops the run or skips the step.

    To stop, what it sees stays on the device: from the first such step on, gradients are zero. It
    is read, and the run stopped, at the next logging step and before anything is evaluated or
    saved. To skip a step, it is read at every step.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, train: Train, meter: Meter, *, fp16: bool
    ) -> None:
        self.optimizer, self.train, self.meter = optimizer, train, meter
        # In fp16 the loss scaler meets infinite gradients by design, and skips those steps
        self.check_gradients = not fp16
        self.losses: list[torch.Tensor] = []
        self.clipped_norm: torch.Tensor | None = None
        self.seen: torch.Tensor | None = None
        """The first non-finite step, its loss and its gradient norm, [3]; zeros: none yet."""

    def watch(self, trainer: Any) -> None:
        """Look at every micro-batch's loss, and the gradients' norm before they are clipped."""
        compute_loss, clip = trainer.compute_loss, trainer._clip_grad_norm

        def watched(*args: Any, **kwargs: Any) -> Any:
            result = compute_loss(*args, **kwargs)
            loss = result[0] if isinstance(result, tuple) else result
            if torch.is_grad_enabled():
                self.losses.append(loss.detach())
            return result

        def clipped(*args: Any, **kwargs: Any) -> Any:
            # A norm that overflows scales every gradient to zero, which looks like a fine step
            self.clipped_norm = clip(*args, **kwargs)
            return self.clipped_norm

        trainer.compute_loss, trainer._clip_grad_norm = watched, clipped

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Make the optimizer skip the steps that are to be skipped."""
        if self.train.on_nonfinite == "stop":
            return
        take_step = optimizer.step

        def step(*args: Any, **kwargs: Any) -> None:
            if self.is_skipping():
                optimizer.zero_grad()
                optimizer._opt_called = True  # or the scheduler warns that no step was taken
            else:
                take_step(*args, **kwargs)

        step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # and torch is content
        optimizer.step = step

    def is_skipping(self) -> bool:
        """Return whether the step about to be taken is not finite, and count it.

        Raises:
            NonFiniteError: too many steps were.
        """
        fault = self._fault()
        if not fault:
            return False
        self.meter.num_skipped += 1
        limit = self.train.max_skipped_steps
        if self.meter.num_skipped > limit:
            raise NonFiniteError(
                f"{fault}; more than train.max_skipped_steps={limit} were skipped, and the run "
                f"stops. {LIKELY_CAUSES}"
            )
        log.warning("%s; skipped (%d of %d)", fault, self.meter.num_skipped, limit)
        self.seen = None
        return True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the step's losses and gradients, and zero the latter if there is a fault."""
        gradients = self._gradients() if self.check_gradients else []
        loss = torch.stack(self.losses).sum().float()
        self.losses.clear()
        norm = loss.new_zeros(())
        if gradients:
            norm = torch.nn.utils.get_total_norm(gradients).to(loss)
            if self.clipped_norm is not None:
                norm = torch.maximum(norm, self.clipped_norm.to(loss))
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
        if not any(getattr(control, flag) for flag in flags):
            return
        if fault := self._fault():
            raise NonFiniteError(
                f"{fault}; the run stops, and nothing of that step or after it is kept. "
                f"{LIKELY_CAUSES}"
            )

    def _fault(self) -> str:
        """Return what was not finite, and at which step; empty: nothing yet."""
        if self.seen is None:
            return ""
        step, loss, norm = self.seen.tolist()  # device-to-host sync
        what = f"gradient norm is {norm}" if math.isfinite(loss) else f"loss is {loss}"
        return f"step {step:.0f}: the {what}" if step else ""


def _mean_tokens(data: Data) -> float:
    """Return the mean tokens of a training pair: its prompt once, and both completions."""
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    total = sum(len(ids) for column in columns for ids in data.train[column])
    return total / len(data.train)
