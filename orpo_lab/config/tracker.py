"""Keys of `tracker`: where a run is logged in addition to its own folder.

Several trackers are a list, `tracker=[wandb,tensorboard]`. The keys of W&B stand at `tracker`
itself; those of another tracker stand below its name, as `tracker.mlflow.uri`.
"""

from dataclasses import dataclass
from typing import Any

from orpo_lab.config.checks import one_of
from orpo_lab.config.policy import free


@dataclass(kw_only=True)
class TensorboardTracker:
    """TensorBoard: event files in the run folder. It has no keys."""


@dataclass(kw_only=True)
class MlflowTracker:
    """MLflow: a server, a database, or a file on this machine."""

    uri: str | None = free()
    experiment: str | None = free()


@dataclass(kw_only=True)
class TrackioTracker:
    """trackio: its store on this machine."""

    project: str | None = free()
    group: str | None = free()


# Trackers with keys below their name; each is a field of `Tracker`
BELOW: dict[str, type[Any]] = {
    "tensorboard": TensorboardTracker,
    "mlflow": MlflowTracker,
    "trackio": TrackioTracker,
}


@dataclass(kw_only=True)
class Tracker:
    """Where a run is logged in addition to its own folder; None: not there.

    The fields have no value of their own, and so keep the values of options that come earlier in
    the list. They begin as None, as `Config` says.
    """

    tensorboard: TensorboardTracker | None = free()
    mlflow: MlflowTracker | None = free()
    trackio: TrackioTracker | None = free()


@dataclass(kw_only=True)
class WandbTracker(Tracker):
    """Weights & Biases, and any other."""

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


Chosen = WandbTracker | TensorboardTracker | MlflowTracker | TrackioTracker


def nowhere() -> Tracker:
    """Return the tracker with which every list of options begins."""
    return Tracker(**dict.fromkeys(BELOW))


def chosen(tracker: Tracker) -> list[Chosen]:
    """Return each of the chosen trackers, W&B first; empty: the run folder only."""
    given = (tracker, *(getattr(tracker, name) for name in BELOW))
    return [one for one in given if isinstance(one, Chosen)]
