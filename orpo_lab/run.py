"""One run, from a checked configuration to its results. Read this file first."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo_lab.config import Config, Lora, hash_of, kind
from orpo_lab.errors import Terminated, UserError, one_line
from orpo_lab.masking import MaskingFormatter, mask
from orpo_lab.quiet import silence_upstream
from orpo_lab.run_folder import RunFolder
from orpo_lab.sweep import Sweep

if TYPE_CHECKING:
    from orpo_lab.data import Data
    from orpo_lab.evaluate import Evaluation

log = logging.getLogger("orpo_lab")


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
    number: int = 0,
) -> RunResult:
    """Run an experiment in its folder: data, model, evaluation, training, evaluation, report.

    Args:
        config: as `orpo_lab.config.load` returns it.
        folder: the run folder; it may exist, but hold no run other than the one to resume.
        choices: the option chosen in every config group, for the record.
        overrides: the command line's, for the record.
        sweep: the sweep this run belongs to, if any: the tracker's default group, and where
            tokenized data and the untrained model's evaluation are shared.
        number: the job's in its sweep; jobs side by side take one of the visible GPUs each by it.

    Raises:
        UserError: something the user can put right; the folder's status says so too.
    """
    _use_one_device(number)
    silence_upstream()
    place = RunFolder(folder)
    record = place.begin(config, choices, overrides)
    with _said_in(place), _status_kept(place):
        return _train(config, place, record, sweep)


def _train(
    config: Config, place: RunFolder, record: dict[str, Any], sweep: Sweep | None
) -> RunResult:
    # Seconds of imports, once the configuration is known to be good and the folder is ours
    from transformers import set_seed

    from orpo_lab import engine, model, report, tracker, trainer
    from orpo_lab.adapter import attach
    from orpo_lab.evaluate import evaluate

    # What can be refused is refused before anything heavy is loaded
    checkpoint = trainer.latest_checkpoint(place.path) if config.resume else None
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
    if isinstance(config.optimizer, Lora):
        checkpointing = config.train.gradient_checkpointing
        network = attach(network, config.optimizer, gradient_checkpointing=checkpointing)
    engine.check(config, network, dtype)

    run = tracker.start(
        config.tracker,
        folder=place.path,
        name=mask(config.name or place.path.name),
        config=record,
        sweep=sweep.folder.name if sweep else None,
    )
    exit_code = 1
    try:
        # Evaluation, training, evaluation
        measure = partial(evaluate, network, tokenizer, pairs, config.dataset, dtype=dtype)
        before = _measure_before(config, measure, sweep)
        stats = trainer.fit(
            config,
            model=network,
            tokenizer=tokenizer,
            data=pairs,
            dtype=dtype,
            place=place,
            log_to=run,
            checkpoint=checkpoint,
        )
        after = measure(desc="after")

        # What the run leaves, in its folder and in the tracker
        summary = report.summarize(before, after, stats, pairs, place)
        report.save_scores(place, before, after)
        report.save_final(place, network, tokenizer, config, summary)
        report.publish(place, run, before, after, summary)
        exit_code = 0
    finally:
        run.finish(exit_code)
    return RunResult(place.path, summary)


def _load_data(config: Config, tokenizer: Any, sweep: Sweep | None) -> "Data":
    """Return the tokenized pairs; a sweep tokenizes once for all jobs with the same data."""
    from orpo_lab import data

    def load() -> "Data":
        return data.load(config.dataset, tokenizer)

    if sweep is None:
        return load()
    name = f"data-{hash_of(config.dataset)}-{hash_of(config.model)}"
    pairs = sweep.once(name, load, data.Data.save, data.Data.restore)
    fingerprints = {split: pairs.report[split]["fingerprint"] for split in ("train", "held_out")}
    sweep.check_data(name, fingerprints, accept_changes=config.accept_changes)
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
    parts = (config.dataset, config.model, config.quantization)
    name = "-".join(["before", kind(config.optimizer), *map(hash_of, parts)])
    return sweep.once(name, lambda: measure(desc="before"), Evaluation.save, Evaluation.restore)


@contextmanager
def _status_kept(place: RunFolder) -> Iterator[None]:
    """Keep `status.json` true, however the run ends."""
    try:
        yield
    except KeyboardInterrupt as error:
        code = 143 if isinstance(error, Terminated) else 130
        place.set_status("stopped", "SIGTERM" if code == 143 else "interrupted", exit_code=code)
        raise
    except BaseException as error:
        place.set_status("failed", one_line(f"{type(error).__name__}: {error}"), exit_code=1)
        raise
    place.set_status("finished", exit_code=0)


@contextmanager
def _said_in(place: RunFolder) -> Iterator[None]:
    """Send our own lines to the terminal and to the run's `run.log`, for as long as it lasts."""
    file = logging.FileHandler(place.path / "run.log")
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


def _use_one_device(number: int) -> None:
    """See one GPU only, before torch is imported.

    With several in sight `transformers.Trainer` multiplies the batch by their number without a
    word; under torchrun each process would train in a folder of its own.

    Raises:
        UserError: the run was started under torchrun or the like.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a run uses one device: start it with python launch.py, not with torchrun")
    # The first job of a process decides for those after it: torch looks once
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[number % len(visible)]
