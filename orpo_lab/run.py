"""One run, from a checked configuration to its results. Read this file first."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from orpo_lab.config import Config, Lora
from orpo_lab.errors import UserError, one_line
from orpo_lab.quiet import silence_upstream
from orpo_lab.run_folder import RunFolder, mask

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
    sweep: str | None = None,
) -> RunResult:
    """Run an experiment in its folder: data, model, evaluation, training, evaluation, report.

    Args:
        config: as `orpo_lab.config.load` returns it.
        folder: the run folder; it may exist, but hold no run other than the one to resume.
        choices: the option chosen in every config group, for the record.
        overrides: the command line's, for the record.
        sweep: the sweep this run belongs to, if any; the tracker's default group.

    Raises:
        UserError: something the user can put right; the folder's status says so too.
    """
    _use_one_device()
    silence_upstream()
    place = RunFolder(folder)
    record = place.begin(config, choices, overrides)
    with _said_in(place), _status_kept(place):
        return _train(config, place, record, sweep)


def _train(
    config: Config, place: RunFolder, record: dict[str, Any], sweep: str | None
) -> RunResult:
    # Seconds of imports, once the configuration is known to be good and the folder is ours
    from transformers import set_seed

    from orpo_lab import data, engine, model, report, tracker, trainer
    from orpo_lab.adapter import attach
    from orpo_lab.evaluate import evaluate

    # What can be refused is refused before anything heavy is loaded
    checkpoint = trainer.latest_checkpoint(place.path) if config.resume else None
    model_config = model.load_config(config.model)
    model.check_context(model_config, config.dataset)

    # Rows -> pairs -> token ids
    tokenizer = model.load_tokenizer(config.model, model_config)
    pairs = data.load(config.dataset, tokenizer)
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
        sweep=sweep,
    )
    exit_code = 1
    try:
        # Evaluation, training, evaluation
        measure = partial(evaluate, network, tokenizer, pairs, config.dataset, dtype=dtype)
        before = measure(desc="before")
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
        report.save_final(place, network, tokenizer, config, summary)
        report.publish(place, run, before, after, summary)
        exit_code = 0
    finally:
        run.finish(exit_code)
    return RunResult(place.path, summary)


@contextmanager
def _status_kept(place: RunFolder) -> Iterator[None]:
    """Keep `status.json` true, however the run ends."""
    try:
        yield
    except KeyboardInterrupt:
        place.set_status("stopped", "interrupted", exit_code=130)
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
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()


def _use_one_device() -> None:
    """See one GPU only, before torch is imported.

    With several in sight `transformers.Trainer` multiplies the batch by their number without a
    word; under torchrun each process would train in a folder of its own.

    Raises:
        UserError: the run was started under torchrun or the like.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a run uses one device: start it with python launch.py, not with torchrun")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]
