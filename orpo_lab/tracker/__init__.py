"""Trackers: log a run in addition to its own folder. A tracker that fails never stops the run."""

import importlib.util
from pathlib import Path
from typing import Any

from orpo_lab import program
from orpo_lab.config.tracker import (
    Chosen,
    MlflowTracker,
    TensorboardTracker,
    Tracker,
    TrackioTracker,
    WandbTracker,
    chosen,
)
from orpo_lab.errors import UserError
from orpo_lab.redaction import redact
from orpo_lab.tracker import wandb
from orpo_lab.tracker.background import Background, Line, Sink
from orpo_lab.tracker.base import Run
from orpo_lab.tracker.mlflow import MlflowRun
from orpo_lab.tracker.tensorboard import TensorboardRun
from orpo_lab.tracker.trackio import TrackioRun

# The packages of each tracker's extra, which has the tracker's name
EXTRAS: dict[type[Any], tuple[str, tuple[str, ...]]] = {
    TensorboardTracker: ("tensorboard", ("tensorboard",)),
    MlflowTracker: ("mlflow", ("mlflow", "sqlalchemy", "alembic")),
    TrackioTracker: ("trackio", ("trackio",)),
}


def check(tracker: Tracker, *, folder: Path, sweep: str | None) -> None:
    """Refuse settings that a tracker does not accept, before anything heavy is loaded.

    Args:
        tracker: which trackers, and their settings.
        folder: the run folder.
        sweep: the name of the sweep that the run belongs to, if any.

    Raises:
        UserError: a tracker does not accept one of our keys, or one of its own settings; or it is
            not installed.
    """
    for one in chosen(tracker):
        if isinstance(one, WandbTracker):
            wandb.check(one, folder=folder, sweep=sweep)
            continue
        extra, packages = EXTRAS[type(one)]
        for package in packages:
            if importlib.util.find_spec(package) is None:
                raise UserError(
                    f"tracker={extra}: {package} is not installed: {program.install(extra)}"
                )


def start(
    tracker: Chosen,
    *,
    folder: Path,
    name: str | None,
    config: dict[str, Any],
    sweep: str | None,
    history: list[Line],
) -> Run:
    """Begin tracking a run.

    Args:
        tracker: one of the chosen trackers, and its settings.
        folder: the run folder; a tracker keeps its files in it.
        name: the name of the run. None: the name in the tracker's own settings, or the folder's.
        config: the run's configuration, under our own names, with secrets redacted.
        sweep: the name of the sweep that the run belongs to, if any.
        history: for a run that goes on, its lines of metrics so far, with their `step`.

    Raises:
        UserError: see `check`.
        Exception: W&B's client cannot even write to the disk, and raises any exception.
    """
    if isinstance(tracker, WandbTracker):
        return wandb.start(
            tracker, folder=folder, name=name, config=config, sweep=sweep, history=history
        )
    shown = {"name": redact(name or folder.resolve().name), "sweep": redact(sweep)}

    def begin() -> Sink:
        match tracker:
            case TensorboardTracker():
                return TensorboardRun(folder, config, history)
            case MlflowTracker():
                return MlflowRun(tracker, folder=folder, config=config, **shown)
            case TrackioTracker():
                return TrackioRun(tracker, folder=folder, config=config, **shown)
        raise TypeError(f"no tracker: {tracker!r}")

    extra, _ = EXTRAS[type(tracker)]
    return Background(extra, begin, history)


def publish_comparison(
    tracker: Tracker, folder: Path, verdict: list[str], settings: list[dict[str, str]]
) -> None:
    """Log a sweep's comparison as a separate run, if the tracker's settings ask for that.

    Args:
        tracker: which trackers, and their settings.
        folder: the sweep's folder, with the reports in it.
        verdict: the sentences of the verdict.
        settings: the table of settings, a row for each.
    """
    if isinstance(tracker, WandbTracker):
        wandb.publish_comparison(tracker, folder, verdict, settings)
