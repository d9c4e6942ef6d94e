"""Read what a comparison needs from run folders; nothing is written."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml

from orpo_lab.compare.verdict import Array
from orpo_lab.config import identity
from orpo_lab.errors import UserError, one_line
from orpo_lab.evaluation.reached import Reached, kept
from orpo_lab.records.run_folder import RunFolder, natural_order


@dataclass(frozen=True)
class Run:
    """What was read from one run folder."""

    folder: Path
    values: dict[str, Any]
    """The configuration, flat, and for every group the kind of the chosen option."""
    contents: dict[str, str]
    """What was at the run's locations at its last start; see `identity.contents`."""
    choices: dict[str, str]
    """The option chosen in every group, by the name that the user gave."""
    overrides: list[str]
    """The overrides of the run's last start, with secrets redacted."""
    state: str
    reason: str
    summary: dict[str, Any] | None
    metrics: list[dict[str, float]]
    scores: dict[str, Array] | None
    """Columns of `scores.parquet` after training, [N] each; NaN: no value. None: no such file."""
    scores_before: dict[str, Array] | None
    """The same columns before training."""
    samples: list[dict[str, str]]
    """The content of `samples.json`; empty: no such file."""
    max_seeds: int | None = None
    """The largest number of seeds of the race that the run comes from; None: it was no race."""
    reached_before: dict[str, Reached] = field(default_factory=dict)
    """What the untrained model has reached on tasks of the harness; empty: it was not judged."""
    reached_after: dict[str, Reached] = field(default_factory=dict)
    """The same of the trained model."""

    start: dict[str, Any] | None = None
    """What the run has recorded of its start; see `RunFolder.start`."""

    @property
    def is_complete(self) -> bool:
        """Whether the run has finished, and its folder holds what a comparison needs."""
        return self.state == "finished" and self.summary is not None and self.scores is not None

    @property
    def seeds(self) -> list[int]:
        """The run's seed, then those of the runs that it started from, as far as it knows them."""
        return [self.values["seed"], *(self.start["seeds"] if self.start else [])]

    @property
    def seeds_text(self) -> str:
        """The run's seed, with the seeds of its start if these are others."""
        own, *earlier = self.seeds
        others = ", ".join(map(str, earlier))
        return f"{own} (start {others})" if {own, *earlier} != {own} else f"{own}"

    @property
    def seconds(self) -> float:
        """The run's wall time of reference, training and evaluation, in seconds."""
        assert self.summary is not None
        train, evaluation = self.summary["train"], self.summary["evaluation_seconds"].values()
        # Runs of before the reference was measured have no seconds of it
        reference = train.get("reference_seconds", 0.0)
        return float(reference + train["wall_seconds"] + sum(evaluation))


def find_runs(folders: Iterable[Path]) -> list[Run]:
    """Read the run folders among `folders` and directly in them, each run folder once.

    Raises:
        UserError: a folder is not a run folder and holds none, or a file in a run folder cannot be
            read.
    """
    found: dict[Path, Run] = {}
    for folder in folders:
        inside = (
            [folder]
            if _is_run(folder)
            else sorted(filter(_is_run, _children(folder)), key=natural_order)
        )
        if not inside:
            raise UserError(f"{folder} is not a run folder, and no run folder is in it")
        for place in inside:
            found.setdefault(place.resolve(), read_run(place))
    return list(found.values())


def _children(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: a file in the run folder cannot be read.
    """
    place = RunFolder(folder)
    try:
        chosen = place.read_yaml("choices.yaml")
        choices = chosen["choices"]
        started = (place.segments() or [{}])[-1]
        values = identity.flat(place.read_yaml("config.yaml")) | started.get("kinds", choices)
        status = place.status()
        has_summary = (folder / "summary.json").is_file()
        return Run(
            folder=folder,
            values=values,
            # An earlier version of orpo_lab kept no contents
            contents=started.get("contents") or {"model.path": str(values.get("model.path"))},
            choices=choices,
            overrides=chosen["overrides"],
            state=status["state"],
            reason=status["reason"],
            summary=json.loads((folder / "summary.json").read_text()) if has_summary else None,
            metrics=place.metrics(),
            scores=_read_scores(folder / "scores.parquet", "after"),
            scores_before=_read_scores(folder / "scores.parquet", "before"),
            samples=place.read_json("samples.json") or [],
            reached_before=kept(place, "before"),
            reached_after=kept(place, "after"),
            max_seeds=_max_seeds(RunFolder(folder.parent)),
            start=place.start(),
        )
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(
            f"{folder} cannot be read as a run folder: {type(error).__name__}: {one_line(error)}"
        ) from error


def _max_seeds(parent: RunFolder) -> int | None:
    sweep = parent.read_json("sweep.json")
    return sweep.get("max_seeds") if isinstance(sweep, dict) else None


def _read_scores(file: Path, when: str) -> dict[str, Array] | None:
    if not file.is_file():
        return None
    # Older releases of pyarrow would take a folder's name, `0-beta=0.1`, for one more column
    table = pq.read_table(file, filters=[("when", "=", when)], partitioning=None)
    table = table.drop_columns(["pair", "when"])
    columns = {name: table[name].to_pylist() for name in table.column_names}
    return {name: np.array(column, dtype=np.float64) for name, column in columns.items()}
