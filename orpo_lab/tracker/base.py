"""What a run asks of a tracker."""

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
        """Log what a finished run came to."""


class Untracked:
    """`tracker=none`: the run folder has it all."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Do nothing."""

    def finish(self, exit_code: int) -> None:
        """Do nothing."""

    def log_results(self, *parts: Any) -> None:
        """Do nothing."""
