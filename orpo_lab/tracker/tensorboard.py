"""The tracker TensorBoard: event files in the folder `tensorboard/` of the run folder.

Events are written through TensorBoard's format of records, not through its writer. That writer
waits up to two minutes before it writes, and prints the traceback of a full disk.
"""

import io
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from orpo_lab.config.identity import flat
from orpo_lab.tracker import base
from orpo_lab.tracker.background import Line

FOLDER = "tensorboard"


class TensorboardRun:
    """A run as TensorBoard shows it.

    A run that goes on has a further file, which begins where TensorBoard's files and `history`
    part: TensorBoard forgets what the earlier files have from that step on.

    Args:
        folder: the run folder.
        config: the run's configuration, under our own names, with secrets redacted.
        history: for a run that goes on, its lines of metrics so far.

    Raises:
        OSError: the files cannot be read or written.
    """

    def __init__(self, folder: Path, config: dict[str, Any], history: list[Line]) -> None:
        place = folder / FOLDER
        self.where = f"tensorboard --logdir {place}"
        self._begin = _first_missing(place, history)
        place.mkdir(exist_ok=True)
        # The names of files sort by the time, to which TensorBoard reads them
        name = f"events.out.tfevents.{time.time():020.6f}.{os.getpid()}"
        self._file = (place / name).open("xb", buffering=0)
        self._write(_opening(self._begin, config))

    def log(self, lines: list[Line]) -> None:
        """Log the lines of metrics that no file has yet."""
        self._write(
            _event(_scalar(name, value), step=int(line["step"]))
            for line in lines
            if line["step"] >= self._begin
            for name, value in line.items()
            if name != "step"
        )

    def log_results(
        self, step: int, summary: dict[str, Any], plots: list[Path], samples: list[dict[str, str]]
    ) -> None:
        """Log the summary as figures and as text, the plots, and the samples as a table."""
        values = [
            *(_scalar(name, value) for name, value in base.figures(summary).items()),
            _json("summary", summary),
            *(_image(f"plots/{path.stem}", path) for path in plots),
            *([_table("samples", samples)] if samples else []),
        ]
        self._write(_event(value, step=step) for value in values)

    def finish(self, step: int, exit_code: int) -> None:
        """Log in which state the run has ended, and close the file."""
        self._write([_event(_text("state", base.state(exit_code)), step=step)])
        self._file.close()

    def _write(self, events: Iterable[Any]) -> None:
        """Write events whole; after an error the file ends as before, and can be written again."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        written = io.BytesIO()
        records = RecordWriter(written)
        for event in events:
            records.write(event.SerializeToString())
        end, size = self._file.tell(), len(written.getvalue())
        try:
            if self._file.write(written.getvalue()) < size:
                raise OSError(f"{FOLDER}/ takes no more; is the disk full?")
        except OSError:
            self._file.seek(end)
            self._file.truncate()
            raise


def _first_missing(place: Path, history: list[Line]) -> int:
    """Return the first step of `history` with a figure that the files do not have.

    If they have all of them: the step after the last. 0: there are no files, or no history.
    """
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    if not history or not place.is_dir():
        return 0
    # It would print that it forgets what a run has computed again
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    read = EventAccumulator(str(place), size_guidance={SCALARS: 0}).Reload()
    known = {(tag, each.step) for tag in read.Tags()[SCALARS] for each in read.Scalars(tag)}
    for line in history:
        if any((name, line["step"]) not in known for name in line.keys() - {"step"}):
            return int(line["step"])
    return int(history[-1]["step"]) + 1


def _opening(begin: int, config: dict[str, Any]) -> Iterator[Any]:
    """Yield the events of a file's beginning, with the configuration as text and as hparams."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb

    yield Event(wall_time=time.time(), file_version="brain.Event:2")
    # What earlier files have from this step on counts no more
    start = SessionLog(status=SessionLog.START)
    yield Event(wall_time=time.time(), step=begin, session_log=start)
    yield _event(_json("config", config), step=begin)
    named = {name: _hparam(value) for name, value in flat(config).items()}
    yield Event(wall_time=time.time(), step=begin, summary=hparams_pb(named))


def _hparam(value: Any) -> bool | float | str:
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)


def _event(value: Any, *, step: int) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Event(wall_time=time.time(), step=step, summary=Summary(value=[value]))


def _scalar(name: str, value: float) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary.Value(tag=name, simple_value=value)


def _text(name: str, text: str) -> Any:
    """Return a text, which TensorBoard shows as Markdown."""
    from tensorboard.plugins.text.summary_v2 import text_pb

    return text_pb(name, text).value[0]


def _json(name: str, value: Any) -> Any:
    return _text(name, f"```json\n{json.dumps(value, indent=2)}\n```")


def _table(name: str, rows: list[dict[str, str]]) -> Any:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return _text(name, "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines))


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", "<br>")


def _image(name: str, path: Path) -> Any:
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    with Image.open(path) as image:
        width, height = image.size
    # 4: the colours are red, green, blue and opacity
    shown = Summary.Image(
        height=height, width=width, colorspace=4, encoded_image_string=path.read_bytes()
    )
    return Summary.Value(tag=name, image=shown)
