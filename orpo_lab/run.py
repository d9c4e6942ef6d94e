"""One run, from a checked configuration to its results. Read this file first."""

import errno
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo_lab import checkpoint, environment
from orpo_lab.config import AUTO, Config, Lora, kind
from orpo_lab.errors import UserError, one_line
from orpo_lab.identity import identity, name_of
from orpo_lab.masking import MaskingFormatter, mask
from orpo_lab.quiet import silence_upstream
from orpo_lab.run_folder import RunFolder
from orpo_lab.stop import Stop, Stopped
from orpo_lab.sweep import Sweep

if TYPE_CHECKING:
    from orpo_lab.data import Data
    from orpo_lab.evaluate import Evaluation

log = logging.getLogger("orpo_lab")

# Full, over its quota, above a size limit, read-only, not ours
DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class RunResult:
    """What a finished run came to; the same figures stand in its `summary.json`."""

    folder: Path
    summary: dict[str, Any]


def train(
    config: Config,
    folder: Path,
    *,
    choices: dict[str, str],
    overrides: list[str],
    sweep: Sweep | None = None,
) -> RunResult:
    """Run an experiment in its folder: data, model, evaluation, training, evaluation, report.

    Args:
        config: as `orpo_lab.config.load` returns it.
        folder: the run folder; it may exist, but hold no run other than the one to resume.
        choices: the option chosen in every config group, for the record.
        overrides: the command line's, for the record.
        sweep: the sweep this run belongs to, if any: the tracker's default group, and where
            tokenized data and the untrained model's evaluation are shared; its processes claim one
            of the visible GPUs each.

    Raises:
        UserError: something the user can put right; the folder's status says so too.
    """
    unread = environment.settle()
    environment.use_one_device(sweep.folder / ".cache" if sweep else None)
    silence_upstream()
    place, stop = RunFolder(folder), Stop(config.train.max_hours)
    with _said_in(place), _disk_trouble_said(place), stop.listening():
        resume = AUTO if sweep else config.resume
        record = place.begin(config, choices, overrides, resume=resume)
        for line in unread:
            log.warning("%s", line)
        with _status_kept(place):
            from orpo_lab import memory  # imports torch

            with memory.given_back(), memory.trouble_said(config):
                result = _train(config, place, record, sweep, stop)
        if sweep:
            stop.check()
        return result


def _train(
    config: Config, place: RunFolder, record: dict[str, Any], sweep: Sweep | None, stop: Stop
) -> RunResult:
    # Seconds of imports, once the configuration is known to be good and the folder is ours
    from transformers import set_seed

    from orpo_lab import engine, model, report, tracker, trainer
    from orpo_lab.adapter import attach
    from orpo_lab.evaluate import evaluate

    # What can be refused is refused before anything heavy is loaded
    start = _find_start(config, place)
    model_config = model.load_config(config.model)
    model.check_context(model_config, config.dataset)

    # Rows -> pairs -> token ids
    tokenizer = model.load_tokenizer(config.model, model_config)
    pairs = _load_data(config, tokenizer, sweep)
    place.write_json("data_report.json", pairs.report)
    trainer.count_steps(config, len(pairs.train))

    # Weights, quantization, adapter
    set_seed(config.seed)
    dtype = model.resolve_dtype(config.model.dtype, model.device())
    network: Any = model.load(config, tokenizer, dtype)
    num_threads = environment.use_threads(network.num_parameters())
    log.info("torch computes with %d thread(s) on the CPU", num_threads)
    made = checkpoint.Made(
        # As it was at the start: files may have been written to since
        config_hash=place.segments()[-1]["config_hash"],
        data="-".join(pairs.report[split]["fingerprint"] for split in ("train", "held_out")),
        model=model.fingerprint(network),
    )
    _check_made(start, made, accept_changes=config.accept_changes)
    if isinstance(config.optimizer, Lora):
        checkpointing = config.train.gradient_checkpointing
        network = attach(network, config.optimizer, gradient_checkpointing=checkpointing)
    engine.check(config, network, dtype)
    stop.check()

    run = tracker.start(
        config.tracker,
        folder=place.path,
        name=mask(config.name or place.path.name),
        config=record,
        sweep=sweep.folder.name if sweep else None,
        history=place.metrics(),
    )
    exit_code = 1
    try:
        # Evaluation, training, evaluation
        measure = partial(evaluate, network, tokenizer, pairs, config.dataset, dtype=dtype)
        before = _measure_before(config, measure, sweep)
        stop.check()
        stats = trainer.fit(
            config,
            model=network,
            tokenizer=tokenizer,
            data=pairs,
            dtype=dtype,
            place=place,
            log_to=run,
            made=made,
            start=start,
            stop=stop,
        )
        after = measure(desc="after")
        stop.check()
        stop.waits = True

        # What the run leaves, in its folder and in the tracker
        summary = report.summarize(before, after, stats, pairs, place)
        report.save_scores(place, before, after)
        report.save_final(place, network, tokenizer, config, summary)
        report.publish(place, run, before, after, summary)
        exit_code = 0
    except Stopped as error:
        exit_code = error.exit_code
        raise
    finally:
        run.finish(exit_code)
    return RunResult(place.path, summary)


def _find_start(config: Config, place: RunFolder) -> checkpoint.Checkpoint | None:
    """Return the checkpoint to continue from, the run's metrics cut back to it; None: the start.

    Raises:
        UserError: the run to resume has no valid checkpoint.
    """
    start = checkpoint.newest_valid(place)
    if start is None:
        if config.resume not in (None, AUTO):
            raise UserError(
                f"resume={place.path}: no valid checkpoint in it; set train.save_steps to write "
                "some, or begin it anew with resume=auto hydra.run.dir=..."
            )
        place.start_over()
        return None
    log.info("resuming from step %d (%s)", start.step, start.path)
    place.go_on(start.path / checkpoint.METRICS)
    return start


def _check_made(
    start: checkpoint.Checkpoint | None, made: checkpoint.Made, *, accept_changes: bool
) -> None:
    """Check that a run goes on with what it began with.

    Raises:
        UserError: the base model is another, or the data are and `accept_changes` is false.
    """
    if start is None:
        return
    if start.made.model != made.model:
        raise UserError(
            "the base model is not the one that the checkpoint was trained from (its files have "
            "changed); put back the old one, or start a new run"
        )
    if start.made.data != made.data and not accept_changes:
        raise UserError(
            "the pairs are not those that the checkpoint was trained on (their files or the "
            "tokenizer have changed); put back the old ones, start a new run, or say "
            "accept_changes=true"
        )


def _load_data(config: Config, tokenizer: Any, sweep: Sweep | None) -> "Data":
    """Return the tokenized pairs; a sweep tokenizes once for all jobs with the same data."""
    from orpo_lab import data

    def load() -> "Data":
        return data.load(config.dataset, tokenizer)

    if sweep is None:
        return load()
    parts = ("dataset", "model")
    pairs = sweep.once(f"data-{identity(config, *parts)}", load, data.Data.save, data.Data.restore)
    fingerprints = {split: pairs.report[split]["fingerprint"] for split in ("train", "held_out")}
    sweep.check_data(name_of(config, *parts), fingerprints, accept_changes=config.accept_changes)
    return pairs


def _measure_before(
    config: Config, measure: Callable[..., "Evaluation"], sweep: Sweep | None
) -> "Evaluation":
    """Return the untrained model's evaluation; a sweep makes it once for each base and data.

    Adapters begin as the identity, whatever their rank and seed.
    """
    from orpo_lab.evaluate import Evaluation

    if sweep is None:
        return measure(desc="before")
    parts = identity(config, "dataset", "model", "quantization")
    name = f"before-{kind(config.optimizer)}-{parts}"
    return sweep.once(name, lambda: measure(desc="before"), Evaluation.save, Evaluation.restore)


@contextmanager
def _status_kept(place: RunFolder) -> Iterator[None]:
    """Keep `status.json` true, however the run ends."""
    try:
        yield
    except Stopped as error:
        place.drop_results()
        place.set_status("stopped", error.reason, exit_code=error.exit_code)
        raise
    except BaseException as error:
        with suppress(OSError):  # a full disk does not take that either
            place.drop_results()
            place.set_status("failed", one_line(f"{type(error).__name__}: {error}"), exit_code=1)
        raise
    place.set_status("finished", exit_code=0)


@contextmanager
def _disk_trouble_said(place: RunFolder) -> Iterator[None]:
    """Turn what the user can put right about a disk into a line that says so."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_TROUBLE:
            raise
        raise UserError(
            f"{place.path} cannot be written to ({one_line(error)}); what is in it is intact: put "
            "that right, then go on with resume="
        ) from error


class _Log(logging.FileHandler):
    """A file of lines, without which a run still goes on: a full disk does not take them."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (logging's name)
        """Leave the line out; the terminal has it."""


@contextmanager
def _said_in(place: RunFolder) -> Iterator[None]:
    """Send our own lines to the terminal and to the run's `run.log`, for as long as it lasts."""
    file = _Log(place.path / "run.log", delay=True)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout), file]
    for handler in handlers:
        handler.setFormatter(MaskingFormatter())
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()
