"""The tracker MLflow: a server, a database, or the file `mlflow.db`."""

import contextlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from orpo_lab.config.identity import flat
from orpo_lab.config.tracker import MlflowTracker
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.redaction import redact
from orpo_lab.tracker import base
from orpo_lab.tracker.background import Line

# The file of the run folder that holds MLflow's id of the run
ID_FILE = "mlflow_id"
# MLflow's own default, where `mlflow ui` in the same folder finds the runs
STORE = "sqlite:///mlflow.db"
# The most metrics, and the most parameters, that MLflow takes at once
MAX_METRICS, MAX_PARAMS = 1000, 100
# The largest number of characters of a parameter
MAX_PARAM = 6000
STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
# Where the user has said nothing else: no telemetry, no lines on the terminal, and a server that
# does not answer is given up soon (MLflow would try for minutes)
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}


class MlflowRun:
    """A run in MLflow; a run that goes on is the same run there.

    MLflow cannot take a figure back. So a figure that MLflow has at a step already is not sent
    again.

    Args:
        tracker: the settings.
        folder: the run folder, which keeps MLflow's id of the run.
        name: the name of the run.
        config: the run's configuration, under our own names, with secrets redacted.
        sweep: the name of the sweep that the run belongs to, if any.

    Raises:
        Exception: the store or the server does not take the run.
    """

    def __init__(
        self,
        tracker: MlflowTracker,
        *,
        folder: Path,
        name: str,
        config: dict[str, Any],
        sweep: str | None,
    ) -> None:
        for variable, value in QUIET.items():
            os.environ.setdefault(variable, value)
        from mlflow import MlflowClient
        from mlflow.entities import Param, RunTag

        uri = tracker.uri or os.environ.get("MLFLOW_TRACKING_URI") or STORE
        make_store(uri)
        self._client = MlflowClient(uri)
        known = self._find(folder)
        if known is None:
            own = tracker.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME")
            experiment = self._experiment(redact(own) or sweep or base.PROJECT)
            known = self._client.create_run(experiment, run_name=name)
            RunFolder(folder).write(ID_FILE, known.info.run_id)
        self.id = known.info.run_id
        self.where = f"run {self.id} of experiment {known.info.experiment_id} at {uri}"
        self._client.update_run(self.id, status="RUNNING")
        if sweep is not None:
            self._client.log_batch(self.id, tags=[RunTag("sweep", sweep)])
        # MLflow takes no other value for a parameter that it has
        params = [
            Param(key, str(value)[:MAX_PARAM])
            for key, value in flat(config).items()
            if key not in known.data.params
        ]
        for begin in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(self.id, params=params[begin : begin + MAX_PARAMS])
        self._client.log_dict(self.id, config, "config.json")
        self._sent = {
            (key, figure.step)
            for key in known.data.metrics
            for figure in self._client.get_metric_history(self.id, key)
        }

    def _find(self, folder: Path) -> Any:
        """Return the run that the run folder names; None: MLflow has no such run, or no longer."""
        from mlflow.exceptions import MlflowException

        file = folder / ID_FILE
        if not file.exists():
            return None
        try:
            run = self._client.get_run(file.read_text().strip())
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
        return run if run.info.lifecycle_stage == "active" else None

    def _experiment(self, name: str) -> str:
        """Return the id of an experiment, which is made if there is none of that name."""
        from mlflow.exceptions import MlflowException

        if found := self._client.get_experiment_by_name(name):
            return found.experiment_id
        try:
            return self._client.create_experiment(name)
        except MlflowException:
            # Another job of the sweep may have made it at the same time
            if found := self._client.get_experiment_by_name(name):
                return found.experiment_id
            raise

    def log(self, lines: list[Line]) -> None:
        """Log the figures that MLflow does not have yet."""
        self._send(
            [
                (name, int(line["step"]), value)
                for line in lines
                for name, value in line.items()
                if name != "step"
            ]
        )

    def _send(self, figures: list[tuple[str, int, float]]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = [figure for figure in figures if figure[:2] not in self._sent]
        for begin in range(0, len(new), MAX_METRICS):
            part = new[begin : begin + MAX_METRICS]
            metrics = [Metric(name, value, now, step) for name, step, value in part]
            self._client.log_batch(self.id, metrics=metrics)
            self._sent.update(figure[:2] for figure in part)

    def log_results(
        self, step: int, summary: dict[str, Any], plots: list[Path], samples: list[dict[str, str]]
    ) -> None:
        """Log the figures of the summary, and summary, plots and samples as artifacts."""
        self._send([(name, step, value) for name, value in base.figures(summary).items()])
        self._client.log_dict(self.id, summary, "summary.json")
        self._client.log_dict(self.id, {"samples": samples}, "samples.json")
        for path in plots:
            self._client.log_artifact(self.id, str(path), "plots")

    def finish(self, step: int, exit_code: int) -> None:
        """Close the run as FINISHED, FAILED or KILLED."""
        self._client.set_terminated(self.id, STATUS[base.state(exit_code)])


def make_store(uri: str) -> None:
    """Make a new SQLite database with all of MLflow's tables, or none.

    MLflow makes the tables one after another, which takes seconds. A database in which some are
    missing is never read again. So two jobs of a sweep would spoil the database of both, and a
    killed one that of all later runs.

    Args:
        uri: the store's; nothing is done for any other store, or if the database exists.

    Raises:
        Exception: the database cannot be made.
    """
    from mlflow import MlflowClient
    from sqlalchemy import make_url

    url = make_url(uri) if uri.startswith("sqlite") else None
    if url is None or not url.database or url.database == ":memory:":
        return
    store = Path(url.database)
    if store.exists():
        return
    store.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=store.parent, prefix=f".{store.name}-") as folder:
        new = Path(folder).resolve() / store.name
        MlflowClient(url.set(database=str(new)).render_as_string(hide_password=False))
        # Another job was first, or the file system has no links: then MLflow makes the tables
        with contextlib.suppress(OSError):
            store.hardlink_to(new)
