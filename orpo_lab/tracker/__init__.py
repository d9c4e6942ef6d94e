"""Trackers: log a run in addition to its own folder. A tracker that fails never stops the run."""

from pathlib import Path
from typing import Any

from orpo_lab.config.tracker import NoTracker, Tracker, WandbTracker
from orpo_lab.tracker import wandb
from orpo_lab.tracker.base import Run, Untracked


def check(tracker: Tracker, *, folder: Path, sweep: str | None) -> None:
    """Refuse settings that the tracker does not accept, before anything heavy is loaded.

    Args:
        tracker: which tracker, and its settings.
        folder: the run folder.
        sweep: the name of the sweep that the run belongs to, if any.

    Raises:
        UserError: the tracker does not accept one of our keys, or one of its own settings.
    """
    if isinstance(tracker, WandbTracker):
        wandb.check(tracker, folder=folder, sweep=sweep)


def start(
    tracker: Tracker,
    *,
    folder: Path,
    name: str | None,
    config: dict[str, Any],
    sweep: str | None,
    history: list[dict[str, float]],
) -> Run:
    """Begin tracking a run.

    Args:
        tracker: which tracker, and its settings.
        folder: the run folder; a tracker keeps its files in it.
        name: the name of the run. None: the name in the tracker's own settings, or the folder's.
        config: the run's configuration, under our own names, with secrets redacted.
        sweep: the name of the sweep that the run belongs to, if any.
        history: for a run that goes on, its lines of metrics so far, with their `step`.

    Raises:
        UserError: see `check`.
        Exception: the tracker's client cannot even write to the disk, and raises any exception.
    """
    match tracker:
        case NoTracker():
            return Untracked()
        case WandbTracker():
            return wandb.start(
                tracker, folder=folder, name=name, config=config, sweep=sweep, history=history
            )
    raise TypeError(f"no tracker: {tracker!r}")


def publish_comparison(
    tracker: Tracker, folder: Path, verdict: list[str], settings: list[dict[str, str]]
) -> None:
    """Log a sweep's comparison as a separate run, if the tracker's settings ask for that.

    Args:
        tracker: which tracker, and its settings.
        folder: the sweep's folder, with the reports in it.
        verdict: the sentences of the verdict.
        settings: the table of settings, a row for each.
    """
    if isinstance(tracker, WandbTracker):
        wandb.publish_comparison(tracker, folder, verdict, settings)
