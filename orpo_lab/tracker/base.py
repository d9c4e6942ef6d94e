"""The interface through which a run calls a tracker, and what all trackers share."""

import math
from pathlib import Path
from typing import Any, Protocol

from orpo_lab.config.identity import flat
from orpo_lab.stop import EXIT_CODE

# The project, or the experiment, if neither our keys nor a tracker's own settings name one
PROJECT = "orpo_lab"


class Run(Protocol):
    """One tracked run."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of an optimizer step."""

    def finish(self, exit_code: int) -> None:
        """Close the run as finished (0) or failed."""

    def log_results(
        self, summary: dict[str, Any], plots: list[Path], samples: list[dict[str, str]]
    ) -> None:
        """Log the results of a finished run: summary, plots and samples."""


class Untracked:
    """A run that no tracker logs: only the run folder holds its logs."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Do nothing."""

    def finish(self, exit_code: int) -> None:
        """Do nothing."""

    def log_results(self, *parts: Any) -> None:
        """Do nothing."""


class Several:
    """A run that several trackers log, or none."""

    def __init__(self, runs: list[Run]) -> None:
        self._runs = runs

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of an optimizer step."""
        for run in self._runs:
            run.log(step, metrics)

    def finish(self, exit_code: int) -> None:
        """Close the run as finished (0) or failed."""
        for run in self._runs:
            run.finish(exit_code)

    def log_results(
        self, summary: dict[str, Any], plots: list[Path], samples: list[dict[str, str]]
    ) -> None:
        """Log the results of a finished run: summary, plots and samples."""
        for run in self._runs:
            run.log_results(summary, plots, samples)


def figures(summary: dict[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a summary by flat names, such as `after.exact_match`."""
    return {
        name: float(value)
        for name, value in flat(summary).items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def state(exit_code: int) -> str:
    """Return the state in which a run with this exit code has ended, as `status.json` names it."""
    return {0: "finished", EXIT_CODE: "stopped"}.get(exit_code, "failed")
