"""Where a run is logged beside its own folder. A run never stops because its tracker does."""

from pathlib import Path
from typing import Any

from orpo_lab.config.tracker import NoTracker, Tracker, WandbTracker
from orpo_lab.tracker import wandb
from orpo_lab.tracker.base import Run, Untracked


def check(tracker: Tracker, *, folder: Path, sweep: str | None) -> None:
    """Refuse what the tracker would not take, before anything heavy is loaded.

    Args:
        tracker: which tracker, and its settings.
        folder: the run folder.
        sweep: the name of the sweep that the run belongs to, if any.

    Raises:
        UserError: a key of the tracker, or a setting of its own, is not what the tracker takes.
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
        name: what the run is called; None: as the tracker's own settings say, or as the folder.
        config: our own configuration, under our own names, secrets redacted.
        sweep: the name of the sweep that the run belongs to, if any.
        history: the lines of metrics of a run that goes on, with their `step`.

    Raises:
        UserError: see `check`.
        Exception: whatever a tracker's client raises where it cannot even write to the disk.
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
    """Log a sweep's comparison as a run of its own, where the tracker is asked for it.

    Args:
        tracker: which tracker, and its settings.
        folder: the sweep's, with the reports in it.
        verdict: what the comparison says, in sentences.
        settings: the table of settings.
    """
    if isinstance(tracker, WandbTracker):
        wandb.publish_comparison(tracker, folder, verdict, settings)
