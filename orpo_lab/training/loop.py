"""The loop: every optimizer step of a run, in the order in which things happen."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import datasets
import torch
from torch import Tensor

from orpo_lab import memory
from orpo_lab import progress as shown
from orpo_lab.beta_schedule import adapted, beta_at, progress
from orpo_lab.config import Config
from orpo_lab.data.encode import MASKS
from orpo_lab.engine.base import (
    COLUMNS,
    MISMATCHED,
    REFERENCE,
    Engine,
    MicroBatch,
    Pair,
    Score,
    Sums,
)
from orpo_lab.engine.packing import sizes_of
from orpo_lab.stop import Stop
from orpo_lab.training.checkpoint import CHECKPOINT, FORK
from orpo_lab.training.devices import OneDevice, gathered, num_processes
from orpo_lab.training.finite import FiniteCheck, check_weights
from orpo_lab.training.lines import Lines
from orpo_lab.training.meter import Since
from orpo_lab.training.preference import PreferenceMeter
from orpo_lab.training.state import RandomState, State

T = TypeVar("T")


@dataclass
class Loop:
    """The training loop: `run` takes the remaining steps of a run."""

    config: Config
    state: State
    engine: Engine
    finite: FiniteCheck
    lines: Lines
    train: datasets.Dataset
    """Training pairs; their number is a multiple of the batch size."""
    held_out: datasets.Dataset
    num_steps: int
    save: Callable[[list[str]], None]
    """Writes the state as a checkpoint of each given kind, `checkpoint.CHECKPOINT` or `FORK`."""
    stop: Stop
    forks: frozenset[int] = frozenset()
    """The steps after which the state is left for other jobs of a sweep, see `sweep.forks`."""

    preference: PreferenceMeter = field(default_factory=lambda: PreferenceMeter(None))
    """Measures how much of a step's gradient is preference."""
    beta: float = 0.0
    """Beta of the last step."""
    measured: dict[str, float] = field(default_factory=dict)
    """What was measured of the last step; empty: nothing."""

    def run(self) -> str:
        """Take the steps from `state.step` to `num_steps`.

        Returns:
            The reason why the run was asked to end early; empty: the run was not asked to.

        Raises:
            NonFiniteError: a loss, a gradient or a weight is not finite.
            OutOfMemoryError, RuntimeError: memory ran out, and micro-batches cannot be made
                smaller.
            UserError: a checkpoint cannot be written.
        """
        settings, state = self.config.train, self.state
        state.model.zero_grad()
        for pairs in batches(self.train, settings.batch_size, self.config.seed, state.step):
            before = memory.allocated_bytes()
            norm, rate = self.take_step(dealt(pairs, state.devices))
            if state.step == 1:
                self.fit_budget(before)
            self.lines.move()

            reason, is_last = self.reason_to_stop(), state.step == self.num_steps
            evaluates = is_due(state.step, settings.eval_steps, is_last)
            is_kept = is_due(state.step, settings.save_steps, is_last) or bool(reason)
            saves = [CHECKPOINT] * is_kept + [FORK] * (state.step in self.forks)
            logs = state.step == 1 or is_due(state.step, settings.logging_steps, is_last)
            if logs or evaluates or saves or self.measured:
                self.finite.check()
            if saves:
                check_weights(state.model, state.step)
            if saves or state.step == 1:
                state.devices.check_equal(state.trained_weights(), state.step)
            if logs:
                self.write_line(norm, rate)
            if self.measured:
                self.lines.write(state.step, self.measured | {"epoch": self.epoch()})
            if evaluates:
                self.evaluate()
            if saves:
                self.save(saves)
            if is_last or reason:
                return reason
        raise AssertionError("batches never end")

    def reason_to_stop(self) -> str:
        """Return the reason why some process was asked to end the run early; empty: none was."""
        reason = self.stop.reason()
        if not self.state.devices.any(bool(reason)):
            return ""
        return next(filter(None, gathered(reason)))

    def take_step(self, pairs: Sequence[Pair]) -> tuple[Tensor, float]:
        """Take one optimizer step on the pairs, and on those of the other processes.

        Returns:
            The gradient norm before clipping, a scalar on the device, and the learning rate.
        """
        state = self.state
        self.beta = beta = self.next_beta(pairs)
        state.model.train()
        state.devices.vary(self.config.seed, state.step)
        random = RandomState.now()
        loss, sums = add_gradients(self.engine, state, pairs, beta)
        self.measured = {}
        if self.preference.is_due(state.step + 1):
            self.measured = self.preference.measure(self.engine, state, pairs, beta, random)
        loss = state.devices.average(loss)
        state.updater.average(state.devices)
        state.devices.unscale(state.updater.optimizer)
        norm = state.updater.clip(self.config.train.max_grad_norm)
        self.finite.look(state.step + 1, loss, norm, state.updater.gradients())
        rate = state.set_rate()
        is_skipped = self.finite.skips()
        if is_skipped:
            state.skip_update()
        else:
            state.update()
        for some in sums:
            state.since.add(some)
        state.since.add_step(loss, is_skipped=is_skipped)
        return norm, rate

    def fit_budget(self, before: int) -> None:
        """Let the engine raise its token budget to what fits, after the run's first step.

        By then the optimizer's states exist. The gradients of a step need memory beside the
        activations.

        Args:
            before: bytes of all tensors before the first step.
        """
        room = memory.room_bytes()
        if room is not None:
            gradients = self.state.updater.gradient_bytes()
            used = memory.peak_bytes() - before - gradients
            self.engine.fit_budget(used, room - gradients)

    def next_beta(self, pairs: Sequence[Pair]) -> float:
        """Return beta for the next step, on the given pairs; all its micro-batches share beta."""
        config = self.config
        if schedule := config.adaptive:
            beta, self.state.margin = adapted(
                schedule,
                self.mean_margin(pairs),
                self.state.margin,
                beta=config.beta,
                direction=-1 if config.method.more_beta_is_more_preference else 1,
            )
            return beta
        at = progress(self.state.step, self.num_steps)
        return beta_at(config.beta_schedule, at, beta=config.beta, beta_end=config.beta_end)

    def mean_margin(self, pairs: Sequence[Pair]) -> float:
        """Return the mean margin of pairs, without dropout; see `Method.margin` in `config`.

        This takes a forward pass of its own. If memory runs out, the pass is taken again like a
        step; see `with_room`.
        """
        sums, read = Since(), partial(self.read, beta=1.0)
        for score in with_room(self.engine, self.state, pairs, read):
            sums.add(score.sums)
        assert sums.sums is not None
        taken = self.state.devices.average(sums.sums).tolist()  # device-to-host sync
        return sums.named(taken)[self.config.method.margin]

    def read(self, micro_batches: Sequence[MicroBatch], beta: float) -> list[Score]:
        """Return the scores of micro-batches, without gradients and dropout."""
        self.state.model.eval()
        with torch.no_grad(), self.engine.reading():
            return [self.engine.score(each, beta) for each in micro_batches]

    def write_line(self, norm: Tensor, rate: float) -> None:
        """Write a line with the means of the metrics since the last line, and reset the sums.

        Args:
            norm: gradient norm of the last step before clipping, a scalar.
            rate: learning rate of the last step.
        """
        state, since = self.state, self.state.since
        assert isinstance(since.total_loss, Tensor)
        assert since.sums is not None
        figures = torch.stack([since.total_loss, norm.to(since.total_loss)])
        figures = torch.cat([figures, state.devices.average(since.sums)])
        loss, grad_norm, *taken = figures.tolist()  # device-to-host sync
        line = {"grad_norm": grad_norm, "learning_rate": rate}
        if since.num_skipped:
            # The metrics of a skipped step may not be finite, so no means over pairs are written
            line["skipped_steps"] = self.finite.meter.num_skipped
        else:
            line = {"loss": loss / since.num_steps} | line | since.named(taken)
        line["epoch"] = self.epoch()
        if self.config.method.reads_beta:
            line["beta"] = self.beta
        self.lines.write(state.step, line)
        state.since = Since()

    def evaluate(self) -> None:
        """Write a line with the metrics of the held-out pairs; later steps are not affected."""
        begin, size, state = time.perf_counter(), self.config.train.batch_size, self.state
        num_pairs, sums, readers = len(self.held_out), Since(), state.devices.readers
        loss = torch.zeros((), device=state.devices.device)
        for start in shown.counted(range(0, num_pairs, size), "evaluate"):
            part = range(start, min(start + size, num_pairs))
            mine = dealt(rows(self.held_out, part), readers)
            micro_batches = self.engine.micro_batches(mine)
            for score in self.read(micro_batches, self.beta):
                sums.add(score.sums)
                loss = loss + score.loss * len(part) / num_pairs
        assert sums.sums is not None
        figures = torch.cat([loss[None], sums.sums])
        eval_loss, *taken = readers.average(figures).tolist()  # device-to-host sync
        seconds = time.perf_counter() - begin
        line = {
            "loss": eval_loss,
            "runtime": seconds,
            "samples_per_second": num_pairs / seconds,
            "steps_per_second": math.ceil(num_pairs / size) / seconds,
            **sums.named(taken),
        }
        line = {f"eval_{name}": value for name, value in line.items()} | {"epoch": self.epoch()}
        self.lines.write(state.step, line)

    def epoch(self) -> float:
        """Return how often the training pairs have been seen, in epochs."""
        per_epoch = len(self.train) // self.config.train.batch_size
        whole, part = divmod(self.state.step, per_epoch)
        return whole + part / per_epoch


def dealt(pairs: Sequence[Pair], devices: OneDevice) -> list[Pair]:
    """Return the pairs of a step, or of an evaluation batch, that this process takes."""
    mine = devices.deal([sum(sizes_of(pair)) for pair in pairs])
    return [pairs[i] for i in mine]


def add_gradients(
    engine: Engine, state: State, pairs: Sequence[Pair], beta: float
) -> tuple[Tensor, list[Sums]]:
    """Add up the gradients of a whole optimizer step; see `with_room`.

    Args:
        engine: lays out the pairs, and scores them.
        state: its weights get the gradients; in fp16 these are multiplied by the loss scale.
        pairs: all pairs of the step.
        beta: the method's beta in this step.

    Returns:
        The step's loss, a scalar without an autograd graph, and the metrics of each micro-batch.

    Raises:
        OutOfMemoryError, RuntimeError: the smallest micro-batches need too much memory.
    """
    return with_room(engine, state, pairs, partial(_add_up, engine, state, beta=beta))


def with_room(
    engine: Engine,
    state: State,
    pairs: Sequence[Pair],
    compute: Callable[[Sequence[MicroBatch]], T],
) -> T:
    """Compute something from the micro-batches of a step, in the memory that there is.

    If memory runs out, `compute` begins again with gradient checkpointing, or with half the token
    budget. This is repeated until the micro-batches cannot be made smaller. `compute` also begins
    again if the engine can mend the cause of another error. If `compute` fails in one process, it
    begins again in all.

    Args:
        engine: lays out the pairs.
        state: may get gradients from `compute`, which are dropped before it begins again.
        pairs: all pairs of the step.
        compute: gets the micro-batches.

    Raises:
        OutOfMemoryError, RuntimeError: the smallest micro-batches need too much memory.
    """
    random = RandomState.now()
    while True:
        micro_batches, has_failed = engine.micro_batches(pairs), False
        try:
            result = compute(micro_batches)
        except Exception as error:
            if state.devices.takes_turns:  # the other processes wait for this one
                raise
            step = state.step + 1
            checkpoints = memory.ran_out(error) and state.checkpoint_activations(step)
            if not checkpoints and not engine.recover(error, micro_batches, step):
                raise
            if num_processes() > 1 and (state.updater.sends_in_backward or MISMATCHED in pairs[0]):
                # The other processes wait for this one in the middle of `compute`
                raise
            has_failed = True
        if not state.devices.any(has_failed):
            return result
        # Only after the except block, since the error's traceback keeps all activations
        state.updater.drop_gradients()
        memory.give_back()
        random.restore()


def _add_up(
    engine: Engine, state: State, micro_batches: Sequence[MicroBatch], beta: float
) -> tuple[Tensor, list[Sums]]:
    """Run the forward and backward pass of every micro-batch; see `add_gradients`."""
    loss, sums = torch.zeros((), device=state.devices.device), []
    with engine.reading():
        for micro_batch in micro_batches:
            score = engine.score(micro_batch, beta)
            state.devices.backward(score.loss)
            loss = loss + score.loss.detach()
            sums.append(score.sums)
    return loss, sums


def is_due(step: int, interval: int | None, is_last: bool) -> bool:
    """Return whether an action is due at `step`: every `interval` steps, and at the last step.

    With an interval of None or 0 the action is never due.
    """
    return interval is not None and interval > 0 and (is_last or step % interval == 0)


def batches(pairs: datasets.Dataset, size: int, seed: int, start: int) -> Iterator[list[Pair]]:
    """Yield the pairs of every step from the 0-based step `start` on, without end.

    Each epoch has its own order: that of transformers' trainer with the same seed.

    Args:
        pairs: their number is a multiple of `size`.
        size: number of pairs in a batch.
        seed: seed of the order.
        start: number of steps that have been taken already.
    """
    first_epoch, taken = divmod(start, len(pairs) // size)
    for epoch in itertools.count(first_epoch):
        if taken == 0:
            # A DataLoader draws one random number when an epoch begins. Draw that number too, so
            # that dropout gets the same numbers as in transformers' trainer
            torch.empty((), dtype=torch.int64).random_()
        numbers = torch.Generator().manual_seed(seed + epoch)
        order = torch.randperm(len(pairs), generator=numbers).tolist()
        for at in range(taken * size, len(pairs), size):
            yield rows(pairs, order[at : at + size])
        taken = 0


def rows(pairs: datasets.Dataset, indices: Sequence[int]) -> list[Pair]:
    """Return the pairs at the given indices, with the columns that an engine reads."""
    names, columns = [*COLUMNS, *MASKS, REFERENCE, MISMATCHED], pairs[list(indices)]
    given = {name: columns[name] for name in names if name in columns}
    return [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)]
