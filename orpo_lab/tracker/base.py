"""The interface through which a run calls a tracker."""

from pathlib import Path
from typing import Any, Protocol


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
    """A run with `tracker=none`: only the run folder holds its logs."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Do nothing."""

    def finish(self, exit_code: int) -> None:
        """Do nothing."""

    def log_results(self, *parts: Any) -> None:
        """Do nothing."""
