"""Read tracked runs back as the trackers' own readers do."""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

Series = dict[str, list[tuple[int, float]]]
"""For each name its points, a step and a value, by their steps."""


def of_lines(lines: Iterable[dict[str, float]]) -> Series:
    """Return the series of lines of metrics."""
    found = defaultdict(list)
    for line in lines:
        for name in line.keys() - {"step"}:
            found[name].append((int(line["step"]), line[name]))
    return dict(found)


def of_file(folder: Path) -> Series:
    """Return the series of a run's metrics.jsonl."""
    return of_lines(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))


def accumulated(folder: Path) -> Any:
    """Return all that TensorBoard reads in a run folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()


def of_tensorboard(folder: Path) -> Series:
    """Return the series that TensorBoard shows; it keeps values as float32."""
    read = accumulated(folder)
    found = {
        name: [(point.step, point.value) for point in read.Scalars(name)]
        for name in read.Tags()["scalars"]
    }
    # The name of a series stays where all its points are forgotten
    return {name: points for name, points in found.items() if points}


def of_mlflow(folder: Path, uri: str) -> Series:
    """Return the series that MLflow's client lists for the run of a folder."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    run_id = (folder / "mlflow_id").read_text()
    return {
        name: [(point.step, point.value) for point in client.get_metric_history(run_id, name)]
        for name in client.get_run(run_id).data.metrics
    }


def in_trackio(folder: Path, project: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the lines and the configuration that trackio's store has of the run of a folder."""
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    run_id = (folder / "trackio_id").read_text()
    (run,) = (run for run in trackio.Api().runs(project) if run.id == run_id)
    assert run.config is not None
    return SQLiteStorage.get_logs(project, run.name, run_id=run_id), run.config


def of_trackio(folder: Path, project: str) -> Series:
    """Return the series in trackio's store for the run of a folder."""
    lines, _ = in_trackio(folder, project)
    kept = ({key: line[key] for key in line if _is_number(line[key])} for line in lines)
    return of_lines(kept)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def as_float32(series: Series) -> Series:
    """Return the series with the values that are left of them in float32."""
    return {
        name: [(step, float(np.float32(value))) for step, value in points]
        for name, points in series.items()
    }
