"""One run, from a checked configuration to its results. Read this file first."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo_lab import environment, progress
from orpo_lab.config import Config
from orpo_lab.config.checks import AUTO
from orpo_lab.config.evaluation import Harness, NoEvaluation
from orpo_lab.config.identity import hash_of, identity, name_of, road, start_of
from orpo_lab.config.judge import NoJudge
from orpo_lab.config.tracker import Tracker, chosen
from orpo_lab.errors import NonFiniteError, UserError, one_line
from orpo_lab.records.run_folder import DISK_TROUBLE, ReadOnlyRunFolder, RunFolder, groups
from orpo_lab.redaction import RedactingFormatter, redact
from orpo_lab.stop import Stop, Stopped
from orpo_lab.sweep.folder import CACHE, Sweep
from orpo_lab.sweep.forks import Forks
from orpo_lab.tracker.base import Run, Several
from orpo_lab.training import checkpoint
from orpo_lab.upstream import import_libraries

if TYPE_CHECKING:
    from orpo_lab.data import Data
    from orpo_lab.engine.reference import References
    from orpo_lab.evaluate import Evaluation
    from orpo_lab.evaluation.reached import Reached
    from orpo_lab.records.results import Missing
    from orpo_lab.training.files import Files

log = logging.getLogger("orpo_lab")

# Groups and keys of the configuration that change what steps do, and nothing else
OF_STEPS = ("method", "beta", "beta_end", "beta_schedule", "optimizer", "seed")


@dataclass(frozen=True)
class RunResult:
    """The result of a finished run; `summary` has the content of the run's `summary.json`."""

    folder: Path
    summary: dict[str, Any]
    missing: "Missing"
    """What could not be made after the last step, and why."""


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
        config: the configuration, as `orpo_lab.config.load` returns it.
        folder: the run folder. The folder may exist, but may hold no run other than this one.
        choices: the option chosen in every config group, for the record.
        overrides: the overrides of the command line, for the record.
        sweep: the sweep that the run belongs to, if any. Its name is the tracker's default group.
            Its runs share tokenized data and the untrained model's evaluation. Each of its
            processes claims one of the visible GPUs.

    Raises:
        UserError: the user can put something right. If the run has begun, `status.json` in the
            folder says what, too.
        Stopped: a signal or the time budget ended the run. All steps so far are saved, unless a
            second signal ended the run at once.
    """
    unread = environment.settle()
    environment.use_one_device(sweep.folder / CACHE if sweep else None)
    place, stop = RunFolder(folder), Stop(config.train.max_hours)
    with _said_in(place), _disk_trouble_said(place), stop.listening():
        with _status_kept(place, stop):
            chosen = groups(choices)
            segment = place.check(
                config,
                overrides,
                resume=AUTO if sweep else config.resume,
                started=sweep.started() if sweep else None,
            )
            # A run that the folder holds is only read until its next step is about to be taken
            if place.is_untrained():
                place.begin(config, chosen, segment)
            for line in unread:
                log.warning("%s", line)
            with progress.Work("import torch"):
                import_libraries()
            from orpo_lab import memory
            from orpo_lab.training import devices

            with memory.given_back(), memory.trouble_said(config), devices.joined():
                devices.from_first((place.path.absolute(), segment, chosen))
                result = _train(config, place, segment, chosen, sweep, stop)
        _finish(place, result.missing)
        if sweep:
            Forks(sweep).release()
            stop.check()
        return result


def follow(config: Config) -> RunResult:
    """Take part in a run as one of its processes, but not as the first, which calls `train`.

    This process computes as the first one does, and writes nothing: no file of the run folder, no
    tracker, no line on the terminal but its errors. The summary of its result is empty.

    Args:
        config: the configuration, as `orpo_lab.config.load` returns it.

    Raises:
        UserError: the user can put something right.
        Stopped: a signal or the time budget ended the run.
    """
    environment.settle()
    environment.use_one_device(None)
    untracked = Tracker(tensorboard=None, mlflow=None, trackio=None)
    config = replace(config, tracker=untracked, evaluation=NoEvaluation(), judge=NoJudge())
    log.addHandler(logging.NullHandler())
    log.propagate = False
    stop = Stop(config.train.max_hours)
    with (
        stop.listening(),
        progress.titled("", is_shared=True),
        open(os.devnull, "w") as nowhere,
        redirect_stdout(nowhere),
    ):
        import_libraries()
        from orpo_lab import memory
        from orpo_lab.training import devices

        with memory.given_back(), memory.trouble_said(config), devices.joined():
            told: tuple[Path, dict[str, Any], dict[str, str]] = devices.from_first((Path(), {}, {}))
            folder, segment, choices = told
            return _train(config, ReadOnlyRunFolder(folder), segment, choices, None, stop)


def _train(
    config: Config,
    place: RunFolder,
    segment: dict[str, Any],
    choices: dict[str, str],
    sweep: Sweep | None,
    stop: Stop,
) -> RunResult:
    # These imports take seconds, so they wait until the configuration and the folder are checked
    from transformers import set_seed

    from orpo_lab import data, engine, evaluation, methods, tracker
    from orpo_lab.engine import mismatched, reference
    from orpo_lab.evaluate import evaluate
    from orpo_lab.evaluation import reached
    from orpo_lab.evaluation.harness import judge_all
    from orpo_lab.judge import at_end
    from orpo_lab.model import quantization
    from orpo_lab.model.precision import resolve_device, resolve_dtype
    from orpo_lab.model.source import load_config
    from orpo_lab.model.start import origin_of
    from orpo_lab.model.tokenizer import check_context, check_ids, load_tokenizer
    from orpo_lab.plan import check
    from orpo_lab.records import results
    from orpo_lab.training import devices, sharded, steps, trainer

    # Refuse what can be refused before anything heavy is loaded
    sweep_name = sweep.folder.name if sweep else None
    tracker.check(config.tracker, folder=place.path, sweep=sweep_name)
    at_end.check(config.judge)
    start = _find_start(config, place, segment["config_hash"])
    origin = origin_of(config)
    model_config = load_config(origin.base.model)
    check_context(model_config, config.dataset)
    quantization.check(origin.base, model_config)
    tasks = evaluation.load(config.evaluation)

    # Rows -> pairs -> token ids
    tokenizer = load_tokenizer(config.model, model_config)
    origin.check_tokenizer(tokenizer)
    started = date.fromisoformat(segment["started"][:10])
    pairs = _load_data(config, tokenizer, sweep, today=started)
    check_ids(tokenizer, model_config, pairs)
    method = methods.build(config)
    if not method.reads_rejected:
        pairs = data.without_undesirable(pairs)
    if method.needs_divergence:
        pairs = mismatched.attach(pairs, reference.splits_of(config), config.dataset.max_length)
    steps.say_length(config, len(pairs.train))
    steps.check_dealt(config, len(pairs.held_out), devices.num_processes())
    num_steps = steps.count_steps(config, len(pairs.train))
    _check_steps_left(start, num_steps, segment["changes"])

    # Refuse what does not fit
    planned = check.before_loading(config, model_config, pairs, devices.num_processes())

    # Weights, quantization, adapter
    set_seed(config.seed)
    device = resolve_device()
    dtype = resolve_dtype(config.model.dtype, device)
    sharded.check(config, dtype, is_merged=origin.is_merged)
    load_on = sharded.load_device(config, device)
    with progress.Work("load the model", has_bar=True):
        network, begun_from = origin.load(tokenizer, dtype, load_on)
    made = checkpoint.Made(
        config_hash=segment["config_hash"],
        data="-".join(pairs.report[split]["fingerprint"] for split in ("train", "held_out")),
        model=begun_from,
    )
    devices.check_same("weights, pairs or settings", asdict(made))
    devices.check_same("kind of device", device.type)
    if sharded.is_asked(config):
        sharded.shard(network, device)
    _check_made(start, made, accept_changes=config.accept_changes)
    fork_steps: frozenset[int] = frozenset()
    if sweep:
        forks = Forks(sweep)
        start = forks.begin(config, place, made, start, num_steps, stop)
        fork_steps = forks.steps(config)
        forks.release()
    engine.check(config, network, dtype)
    stop.check()

    # Evaluation, training, evaluation
    measure = partial(evaluate, network, tokenizer, pairs, config, dtype=dtype)
    before = _measure_before(config, measure, pairs, sweep)
    stop.check()
    try_tasks = partial(judge_all, tasks, network, tokenizer, config, dtype=dtype)
    judged_before = _try_tasks_before(config, place, try_tasks, made, sweep)
    before = before.joined(reached.figures_of(judged_before), reached.seconds_of(judged_before))
    stop.check()
    reference_seconds = 0.0
    if start is None or start.step < num_steps:
        compute = partial(reference.compute, config, network, tokenizer, dtype=dtype)
        pairs, reference_seconds = _with_reference(config, pairs, compute, start, made, sweep)
        stop.check()
    metrics = start.path / checkpoint.METRICS if start else None
    missing = results.Missing(place)
    stages = road(choices.get("method", ""), segment["start"])
    with _tracked(config, place, choices, metrics, sweep_name, missing, stages) as run:
        if not place.has_begun:
            place.begin(config, choices, segment, metrics=metrics)
        place.write_json("data_report.json", pairs.report)
        reached.keep(place, "before", judged_before)
        try:
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
                forks=fork_steps,
                untrained=reached.figures_of(judged_before),
                reference_seconds=reference_seconds,
            )

            # Save the model first: what follows may fail or be stopped
            if (
                devices.num_processes() > 1
            ):  # which measure the model together; one process saves it
                results.round_weights(network, model_config.dtype)
            plain = sharded.whole_model(network)

            def save(files: "Files") -> None:
                results.save_model(plain, tokenizer, files, dtype=model_config.dtype)
                origin.save_base(plain, files, place.file("final"))

            trained = checkpoint.folder(place, checkpoint.TRAINED, stats.steps)
            if devices.is_first():
                with progress.Work("save the model"):
                    trained = checkpoint.keep_trained(place, start, save, made, stats)
        finally:
            stop.waits = False
        stop.check()
        after = _measure_after(measure, network, trained, missing)
        stop.check()
        judged = _try_tasks_after(try_tasks, place, run, trained, missing)
        if after:
            after = after.joined(reached.figures_of(judged), reached.seconds_of(judged))
        stop.check()
        stop.waits = True
        if not devices.is_first():
            return RunResult(place.path, {}, missing)

        # Write the results to the run folder and to the tracker
        summary = results.leave(
            config,
            place,
            run,
            trained=trained,
            before=before,
            after=after,
            stats=stats,
            data=pairs,
            missing=missing,
            judge=partial(at_end.ask, config.judge, place.path, stop),
            start=origin.words,
            planned=check.record(planned),
        )
    return RunResult(place.path, summary, missing)


@contextmanager
def _tracked(
    config: Config,
    place: RunFolder,
    choices: dict[str, str],
    metrics: Path | None,
    sweep: str | None,
    missing: "Missing",
    stages: str = "",
) -> Iterator[Run]:
    """Track the run inside this context by every chosen tracker; none that fails ends the run.

    Args:
        config: the run's configuration.
        place: the run folder.
        choices: the option chosen in every config group.
        metrics: the metrics file of the checkpoint to go on from, if any.
        sweep: the name of the sweep that the run belongs to, if any.
        missing: notes what the tracker failed to take.
        stages: the run's `identity.road`; a tracker groups runs by it.

    Raises:
        UserError: the tracker's settings are wrong; nothing has been written then.
    """
    from orpo_lab import tracker

    runs: list[Run] = []
    for one in chosen(config.tracker):
        with missing.noted("tracker", let_through=UserError):
            begun = tracker.start(
                one,
                folder=place.path,
                name=config.name,
                config={**redact(asdict(config)), "choices": choices, "road": stages},
                sweep=sweep,
                history=RunFolder(metrics.parent).metrics() if metrics else [],
            )
            runs.append(begun)
    run, exit_code = Several(runs), 1
    try:
        yield run
        exit_code = 0
    except Stopped as error:
        exit_code = error.exit_code
        raise
    finally:
        with missing.noted("tracker"):
            run.finish(exit_code)


def _find_start(config: Config, place: RunFolder, config_hash: str) -> checkpoint.Checkpoint | None:
    """Return the checkpoint to continue from; None: the run begins with its first step.

    Raises:
        UserError: the run has no valid checkpoint, although `resume` names the run or the run has
            results.
    """
    start = checkpoint.newest_valid(place, config_hash)
    if start is not None:
        log.info("resuming from step %d (%s)", start.step, start.path)
        return start
    if place.has_results():
        raise UserError(
            f"{place.path} holds the results of a run that has finished, and no valid checkpoint "
            "to go on from; choose another folder with hydra.run.dir"
        )
    if config.resume not in (None, AUTO):
        raise UserError(
            f"resume={place.path}: no valid checkpoint in it; set train.save_steps to write "
            "some, or begin it anew with resume=auto hydra.run.dir=..."
        )
    return None


def _check_made(
    start: checkpoint.Checkpoint | None, made: checkpoint.Made, *, accept_changes: bool
) -> None:
    """Check that a run goes on with the base model and the data that it began with.

    Raises:
        UserError: the base model or the result in `start_from` has changed; or the data have
            changed, and `accept_changes` is false or the run is trained to its end.
    """
    if start is None:
        return
    if start.made.model != made.model:
        raise UserError(
            "the base model is not the one that the checkpoint was trained from (its files, or "
            "the result in start_from, have changed); put back the old one, or start a new run"
        )
    if start.made.data == made.data:
        return
    if start.is_trained:
        raise UserError(
            "the pairs are not those that the run was trained on to its end (their files or the "
            "tokenizer have changed); put back the old ones, or start a new run"
        )
    if not accept_changes:
        raise UserError(
            "the pairs are not those that the checkpoint was trained on (their files or the "
            "tokenizer have changed); put back the old ones, start a new run, or say "
            "accept_changes=true"
        )


def _check_steps_left(
    start: checkpoint.Checkpoint | None, num_steps: int, changes: Iterable[str]
) -> None:
    """Check that settings of training have not changed after the run's last step.

    Raises:
        UserError: they have, so the run's results would name settings that trained nothing.
    """
    late = [key for key in changes if key.split(".")[0] in OF_STEPS]
    if start is not None and start.step >= num_steps and late:
        raise UserError(
            f"{', '.join(late)} cannot change any more: the run has taken its {start.step} steps; "
            "raise train.max_steps to train on, or begin another run from this one with start_from"
        )


def _load_data(config: Config, tokenizer: Any, sweep: Sweep | None, *, today: date) -> "Data":
    """Return the tokenized pairs; a sweep tokenizes once for all jobs with the same data.

    Args:
        config: the run's configuration.
        tokenizer: the model's tokenizer.
        sweep: the sweep that the run belongs to, if any.
        today: the day of the run's first start, for chat templates that ask for a date.
    """
    from orpo_lab import data

    def load() -> "Data":
        makes_pairs = not config.method.reads_unpaired
        return data.load(config.dataset, tokenizer, today=today, makes_pairs=makes_pairs)

    if sweep is None:
        return load()
    parts = ("dataset", "model")
    # Jobs with other methods may train on pairs that are made of the same completions
    name = f"data-{config.unit}-{identity(config, *parts)}"
    pairs = sweep.once(name, load, data.Data.save, data.Data.restore)
    fingerprints = {split: pairs.report[split]["fingerprint"] for split in ("train", "held_out")}
    key = f"{config.unit} {name_of(config, *parts)}"
    sweep.check_data(key, fingerprints, accept_changes=config.accept_changes)
    return pairs


def _measure_before(
    config: Config, measure: Callable[..., "Evaluation"], pairs: "Data", sweep: Sweep | None
) -> "Evaluation":
    """Return the untrained model's evaluation, which jobs of a sweep share.

    A sweep makes one for each base model, start, data, quantization, kind of optimizer and kind of
    engine. Adapters of any rank and seed share it: new adapters do not change what the base model
    computes. An earlier run's adapter is the exception: its shape decides whether it is merged.
    Engines do not share it: each reads pairs in its own way, before and after training. The guesses
    by length are the run's own: methods read other training pairs of the same rows.
    """
    from orpo_lab.evaluate import Evaluation

    if sweep is None:
        return measure(desc="before")
    name = f"before-{start_of(config)}"
    make = partial(measure, desc="before")
    found = sweep.once(name, make, Evaluation.save, Evaluation.restore)
    return found.guessed(pairs.length_guess)


def _try_tasks_before(
    config: Config,
    place: RunFolder,
    try_tasks: "Callable[..., dict[str, Reached]]",
    made: checkpoint.Made,
    sweep: Sweep | None,
) -> "dict[str, Reached]":
    """Return what the untrained model reaches on tasks beside the held-out pairs; empty: not asked.

    A run that goes on keeps the figures, and jobs of a sweep share them, as in `_measure_before`.

    Raises:
        UserError: see `judge_all`.
    """
    from orpo_lab.evaluation import reached

    if not (isinstance(config.evaluation, Harness) and config.evaluation.before):
        return {}
    which = f"{start_of(config)}-{made.model}"
    make = partial(try_tasks, which=which, when="before", kept=reached.kept(place, "before"))
    if sweep is None:
        return make()
    asked = hash_of(asdict(config.evaluation))
    return sweep.once(f"harness-{start_of(config)}-{asked}", make, reached.save, reached.restore)


def _try_tasks_after(
    try_tasks: "Callable[..., dict[str, Reached]]",
    place: RunFolder,
    run: Run,
    trained: Path,
    missing: "Missing",
) -> "dict[str, Reached]":
    """Return what the trained model reaches on tasks beside the held-out pairs, and keep that.

    Empty: no task was asked for, or the harness failed, as `missing` says.
    """
    from orpo_lab.evaluation import reached

    step, judged = checkpoint.step_of(trained), {}
    # What lies there belongs to another model
    reached.keep(place, "after", {})
    with missing.noted(reached.FILES["after"]):
        judged = try_tasks(which=f"step {step}", when="after")
    if judged:
        reached.keep(place, "after", judged)
        figures = reached.figures_of(judged)
        place.append_metrics(step, figures)
        run.log(step, figures)
    return judged


def _with_reference(
    config: Config,
    pairs: "Data",
    compute: "Callable[[Data], References]",
    start: checkpoint.Checkpoint | None,
    made: checkpoint.Made,
    sweep: Sweep | None,
) -> "tuple[Data, float]":
    """Return the pairs with what the method compares the model with; see `engine.reference`.

    A checkpoint's reference is that of its own pairs and method. If these have changed since, the
    reference is computed again. Jobs of a sweep share a reference.

    Returns:
        The pairs, and the seconds in which their reference was computed, by this job or by the job
        that shares it: 0 if there is no reference, or if it is a checkpoint's.
    """
    import torch

    from orpo_lab import methods
    from orpo_lab.engine import reference

    if not methods.build(config).needs_reference:
        return pairs, 0.0
    if start is not None and start.made.data == made.data:
        kept = reference.kept(start.path, config, pairs)
        if kept is not None:
            return reference.attach(pairs, kept), 0.0

    def make() -> "tuple[References, float]":
        begin = time.perf_counter()
        computed = compute(pairs)
        seconds = time.perf_counter() - begin
        num = sum(map(len, computed.values()))
        log.info("reference: computed for %d %s in %.1f s", num, config.unit, seconds)
        return computed, seconds

    if sweep is None:
        found, seconds = make()
    else:
        load = partial(torch.load, map_location="cpu", weights_only=True)
        found, seconds = sweep.once(reference.name_of(config), make, torch.save, load)
    return reference.attach(pairs, found), seconds


def _measure_after(
    measure: Callable[..., "Evaluation"], network: Any, trained: Path, missing: "Missing"
) -> "Evaluation | None":
    """Return the trained model's evaluation; None: the evaluation failed.

    Raises:
        NonFiniteError: the last update has ruined the weights; the trained model is deleted.
    """
    from orpo_lab.training import devices
    from orpo_lab.training.finite import check_weights

    after = None
    try:
        with missing.noted("evaluation after training"):
            after = measure(desc="after")
        if after is None:
            check_weights(network, checkpoint.step_of(trained))
    except NonFiniteError:
        if devices.is_first():
            checkpoint.remove(trained)
        raise
    return after


@contextmanager
def _status_kept(place: RunFolder, stop: Stop) -> Iterator[None]:
    """Write to `status.json` if the run is stopped or fails inside this context.

    A run that has not begun to write to its folder writes no status. A signal does not break the
    writing off: a launcher sends signals to all its processes when it loses one, while the others
    fail already since they have lost their peer.
    """
    try:
        yield
    except Stopped as error:
        stop.waits = True
        if place.has_begun:
            place.set_status("stopped", error.reason, exit_code=error.exit_code)
        raise
    except BaseException as error:
        stop.waits = True
        if place.has_begun:
            with suppress(OSError):  # a full disk does not take the status either
                reason = one_line(f"{type(error).__name__}: {error}")
                place.set_status("failed", reason, exit_code=1)
        raise


def _finish(place: RunFolder, missing: "Missing") -> None:
    """Write the final status of the run, and log which results are missing.

    If results are missing, the trained model is kept, and the next start makes the results from it.
    """
    if not missing:
        place.set_status("finished", exit_code=0)
        checkpoint.remove_trained(place)
        return
    place.set_status("finished", str(missing), exit_code=0, missing=dict(missing))
    log.warning("warning: %s has finished %s; resume=auto tries that again", place.path, missing)


@contextmanager
def _disk_trouble_said(place: RunFolder) -> Iterator[None]:
    """Inside this context, turn a disk error that the user can put right into a `UserError`.

    Raises:
        UserError: a file cannot be written or read. The text names the file, if the error of the
            operating system does; otherwise the places where the file may be.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_TROUBLE:
            raise
        where = str(place.path)
        if error.filename is None:
            where = f"a file of {place.path}, of the caches or of the temporary folder"
        elif not place.is_in_trouble(error):
            where = str(error.filename)
        raise UserError(
            f"{where} cannot be written to or read ({one_line(error)}); what is in {place.path} is "
            "intact: put that right, then go on with resume="
        ) from error


class _Log(logging.FileHandler):
    """The log file of a run. A full disk costs lines of the log, but never ends the run.

    Lines wait until the run has begun to write to its folder. If the run is refused before that,
    the lines are dropped.
    """

    def __init__(self, place: RunFolder) -> None:
        super().__init__(place.path / "run.log", encoding="utf-8", delay=True)
        self.place = place
        self.waiting: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line after the lines that have waited, or let it wait too."""
        self.waiting.append(record)
        if self.place.has_begun:
            for line in self.waiting:
                super().emit(line)
            self.waiting.clear()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (logging's name)
        """Leave the line out of the file; the terminal shows it."""


@contextmanager
def _said_in(place: RunFolder) -> Iterator[None]:
    """Inside this context, send our log lines to the terminal and to the run's `run.log`."""
    handlers: list[logging.Handler] = [progress.Handler(sys.stdout), _Log(place)]
    for handler in handlers:
        handler.setFormatter(RedactingFormatter())
        log.addHandler(handler)
    level, propagates = log.level, log.propagate
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.setLevel(level)
        log.propagate = propagates
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()
