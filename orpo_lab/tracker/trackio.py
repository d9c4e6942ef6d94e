"""The tracker trackio: its store on this machine, in the folder that TRACKIO_DIR names.

Lines go to trackio's store itself, not through `trackio.init`. That prints to the terminal, asks
the hub for the user's name, measures the machine, and hides errors. No server is started and
nothing is sent; `trackio show` shows the store, `trackio sync` uploads it.
"""

import secrets
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orpo_lab.config.identity import flat
from orpo_lab.config.tracker import TrackioTracker
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.redaction import redact
from orpo_lab.tracker import base
from orpo_lab.tracker.background import Line

# The file of the run folder that holds trackio's id of the run
ID_FILE = "trackio_id"


class TrackioRun:
    """A run in trackio; a run that goes on is the same run there.

    Every line has an id that its run, its step and its names make. trackio ignores a line whose id
    it has.

    Args:
        tracker: the settings.
        folder: the run folder, which keeps trackio's id of the run.
        name: the name of the run.
        config: the run's configuration, under our own names, with secrets redacted.
        sweep: the name of the sweep that the run belongs to, if any.

    Raises:
        Exception: the store cannot be read or written.
    """

    def __init__(
        self,
        tracker: TrackioTracker,
        *,
        folder: Path,
        name: str,
        config: dict[str, Any],
        sweep: str | None,
    ) -> None:
        file = folder / ID_FILE
        if not file.exists():
            RunFolder(folder).write(ID_FILE, secrets.token_hex(16))
        self.id = file.read_text()
        self.project = redact(tracker.project or base.PROJECT)
        self.name = name
        self.where = f"trackio show --project {self.project}"
        # Names with a _ are trackio's own
        own = {
            "_Group": redact(tracker.group) or sweep,
            "_Created": datetime.now(UTC).isoformat(),
            "_Username": None,
        }
        self._config = flat(config) | own

    def log(self, lines: list[Line]) -> None:
        """Log the lines of metrics that trackio does not have yet."""
        if lines:
            metrics = [{name: line[name] for name in line if name != "step"} for line in lines]
            self._write("running", [int(line["step"]) for line in lines], metrics)

    def log_results(
        self, step: int, summary: dict[str, Any], plots: list[Path], samples: list[dict[str, str]]
    ) -> None:
        """Log the figures of the summary, the plots, and the samples as a table."""
        from trackio import Image, Table

        row: dict[str, Any] = dict(base.figures(summary))
        for path in plots:
            image = Image(str(path))
            image._save(self.project, self.name, step)
            row[f"plots/{path.stem}"] = image._to_dict()
        if samples:
            table = Table(columns=list(samples[0]), data=[list(each.values()) for each in samples])
            row["samples"] = table._to_dict(self.project, self.name, step)
        self._write("running", [step], [row])

    def finish(self, step: int, exit_code: int) -> None:
        """Log in which state the run has ended, as a key of its configuration."""
        self._write(base.state(exit_code), [step], [{}])

    def _write(self, state: str, steps: list[int], metrics: list[dict[str, Any]]) -> None:
        from trackio.sqlite_storage import SQLiteStorage

        SQLiteStorage.bulk_log(
            project=self.project,
            run=self.name,
            run_id=self.id,
            metrics_list=metrics,
            steps=steps,
            log_ids=[self._line_id(*line) for line in zip(steps, metrics, strict=True)],
            config={"state": state, **self._config},
        )

    def _line_id(self, step: int, metrics: dict[str, Any]) -> str:
        return f"{self.id}-{step}-{zlib.crc32(' '.join(sorted(metrics)).encode()):08x}"
