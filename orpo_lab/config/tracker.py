"""Keys of `tracker`: where a run is logged in addition to its own folder."""

from dataclasses import dataclass

from orpo_lab.config.checks import one_of
from orpo_lab.config.policy import free


@dataclass(kw_only=True)
class Tracker:
    """Base class of the trackers: where a run is logged in addition to its own folder."""


@dataclass(kw_only=True)
class WandbTracker(Tracker):
    """Weights & Biases."""

    mode: str = free()
    project: str | None = free()
    entity: str | None = free()
    group: str | None = free()
    tags: list[str] = free()
    summary_run: bool = free()

    def __post_init__(self) -> None:
        one_of(("auto", "online", "offline"), tracker__mode=self.mode)


@dataclass(kw_only=True)
class NoTracker(Tracker):
    """The run folder only."""
