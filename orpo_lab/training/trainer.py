"""One training run: build the parts of the loop, run the loop, and return the cost of training."""

import contextlib
import logging
from dataclasses import dataclass

import datasets
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from orpo_lab import engine, methods
from orpo_lab import optimizer as optimizers
from orpo_lab.config import Config
from orpo_lab.config.checks import AUTO
from orpo_lab.data import Data
from orpo_lab.engine import reference
from orpo_lab.engine.base import COLUMNS
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.stop import Stop, Stopped
from orpo_lab.tracker.base import Run
from orpo_lab.training import checkpoint
from orpo_lab.training.checkpoint import Checkpoint, Made, Spent
from orpo_lab.training.devices import gathered, is_first, num_processes
from orpo_lab.training.finite import FiniteCheck
from orpo_lab.training.lines import Lines
from orpo_lab.training.loop import Loop
from orpo_lab.training.meter import Meter, Since
from orpo_lab.training.preference import PreferenceMeter
from orpo_lab.training.sharded import devices_of
from orpo_lab.training.state import State
from orpo_lab.training.steps import count_steps

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainStats:
    """The cost of training, over all starts of the run; key `train` of `summary.json`."""

    steps: int
    wall_seconds: float
    tokens_per_second: float
    pairs_per_second: float
    peak_memory_bytes: int
    skipped_steps: int
    """Number of steps without an update, because their loss or gradient was not finite. Steps that
    fp16's loss scaling skips are not counted."""
    device: str
    """The GPU's name, or cpu."""
    galore_memory_bytes: dict[str, dict[str, int]] | None
    """Bytes of GaLore's weights, gradients and states; None without our GaLore."""
    shared_steps: int = 0
    """Number of the first steps that another run of the sweep has taken for this run, too. Seconds,
    tokens and memory are those of the other steps."""
    num_processes: int = 1
    """Number of processes in the run's last start; memory is that of the process that took most."""
    reference_seconds: float = 0.0
    """Time in which the run's reference was computed, before the first step; `wall_seconds` and the
    rates are without it. Jobs of a sweep that share a reference all have its time, as with the
    evaluation before training. 0 if no method of the run had a reference."""


def fit(
    config: Config,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    dtype: torch.dtype,
    place: RunFolder,
    log_to: Run,
    made: Made,
    start: Checkpoint | None,
    stop: Stop,
    forks: frozenset[int] = frozenset(),
    untrained: dict[str, float] | None = None,
    reference_seconds: float = 0.0,
) -> TrainStats:
    """Train the model in place.

    Args:
        config: the run's configuration.
        model: on its device, with adapters if it has any.
        tokenizer: with a pad token.
        data: tokenized pairs; no prompt with a completion is longer than `dataset.max_length`.
        dtype: precision of the arithmetic.
        place: the run folder; gets `checkpoints/` and the lines of `metrics.jsonl`.
        log_to: the tracked run, which gets the same metrics.
        made: what the run is made from; every checkpoint records it.
        start: the checkpoint to continue from; None: begin with the first step.
        stop: says whether the run should end early. When `fit` returns, `stop` still makes signals
            wait, so that the caller can save the trained model first.
        forks: the steps after which the state is left for other jobs of a sweep.
        untrained: figures of the untrained model, for the line of metrics of step 0.
        reference_seconds: what this start of the run has spent on its reference.

    Raises:
        NonFiniteError: a loss, a gradient or a weight is not finite; no checkpoint holds that step.
        OutOfMemoryError, RuntimeError: memory ran out, and micro-batches cannot be made smaller.
        UserError: a checkpoint cannot be written, or `start` does not fit the model.
        Stopped: the run was asked to end; a checkpoint holds its last step.
    """
    num_steps = count_steps(config, len(data.train))
    train = _whole_batches(config, data.train)
    devices = devices_of(model, dtype)
    updater = optimizers.build(config, model, num_steps=num_steps, dtype=dtype, devices=devices)
    state = State(
        model,
        updater,
        devices,
        optimizers.share_of_peak(config.train, num_steps),
        may_checkpoint=config.train.gradient_checkpointing == AUTO,
    )
    meter = Meter(start.spent if start else Spent(), reference_seconds)
    computing = engine.build(config, model=model, tokenizer=tokenizer, devices=devices)
    computing.token_budget = meter.before.token_budget

    def save(kinds: list[str]) -> None:
        rest = state.rest()
        path, *others = (checkpoint.folder(place, kind, state.step) for kind in kinds)
        if not is_first():
            state.save_parts(path)
            return
        with checkpoint.written(path) as files:
            state.save(files, rest)
            reference.save(data, files)
            tokenizer.save_pretrained(path)
            checkpoint.seal(files, place, made, meter.spent(computing.token_budget))
        for other in others:
            checkpoint.link(path, other)
        checkpoint.rotate(place, config.train.num_checkpoints)

    if config.train.gradient_checkpointing == "true":
        state.enable_checkpointing()
    set_seed(config.seed)  # so dropout does not depend on random numbers drawn before training
    stop.waits = True
    if start is not None and start.step >= num_steps:
        state.load_weights(start.path)
        state.step = start.step
    elif start is not None:
        state.load(start.path)
        if start.made.config_hash != made.config_hash and state.since.num_steps:
            log.warning(
                "the metrics of the last %d steps before step %d are left out: a line of metrics "
                "is a mean over steps of equal settings, and settings have changed",
                state.since.num_steps,
                state.step,
            )
            state.since = Since()
    meter.start()
    reason = ""
    if state.step < num_steps:
        lines = Lines(place, log_to, state.step, num_steps, untrained=untrained)
        loop = Loop(
            config=config,
            state=state,
            engine=computing,
            finite=FiniteCheck(config.train, meter, is_scaled=dtype == torch.float16),
            lines=lines,
            train=train,
            held_out=data.held_out,
            num_steps=num_steps,
            save=save,
            stop=stop,
            forks=forks,
            preference=PreferenceMeter(config.train.meter_steps),
        )
        with contextlib.closing(lines):
            reason = loop.run()
    spent = meter.spent()
    if reason:
        raise Stopped(reason)
    pairs = (state.step - spent.num_shared) * config.train.batch_size
    return TrainStats(
        steps=state.step,
        wall_seconds=spent.wall_seconds,
        tokens_per_second=pairs * _mean_tokens(config, train) / spent.wall_seconds,
        pairs_per_second=pairs / spent.wall_seconds,
        peak_memory_bytes=max(gathered(spent.peak_memory_bytes)),
        skipped_steps=spent.num_skipped,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        galore_memory_bytes=updater.memory(),
        shared_steps=spent.num_shared,
        num_processes=num_processes(),
        reference_seconds=spent.reference_seconds,
    )


def _whole_batches(config: Config, pairs: datasets.Dataset) -> datasets.Dataset:
    """Return the pairs that fill whole batches, without those that are left over.

    With the left-over pairs transformers would end every epoch in a smaller step. The pairs of that
    step would weigh more than others.
    """
    batch_size, unit = config.train.batch_size, config.unit
    left_over = len(pairs) % batch_size
    if left_over:
        log.info("%d training %s are left over from whole batches and not used", left_over, unit)
    return pairs.select(range(len(pairs) - left_over))


def _mean_tokens(config: Config, pairs: datasets.Dataset) -> float:
    """Return the mean number of tokens that are read of a pair; the prompt counts once."""
    columns = COLUMNS if methods.build(config).reads_rejected else COLUMNS[:2]
    return sum(len(ids) for column in columns for ids in pairs[column]) / len(pairs)
