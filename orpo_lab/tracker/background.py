"""Run a tracker in a thread of its own: a run neither waits for the tracker nor fails with it."""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from orpo_lab.errors import one_line

log = logging.getLogger(__name__)
# Seconds that a run waits at its end for a tracker; the run folder has what is not taken by then
FINISH_SECONDS = 30.0

Line = dict[str, float]
"""A line of metrics.jsonl, with its `step`."""


class Sink(Protocol):
    """A tracked run whose methods may fail, and may take their time."""

    where: str
    """Where the user finds the run."""

    def log(self, lines: list[Line]) -> None:
        """Log lines of metrics; none may be given.

        After an error the same lines are given again, with those that have come since.
        """

    def log_results(
        self, step: int, summary: dict[str, Any], plots: list[Path], samples: list[dict[str, str]]
    ) -> None:
        """Log the results of a finished run under its last step."""

    def finish(self, step: int, exit_code: int) -> None:
        """Close the run after its last step as finished (0) or failed."""


Call = Callable[[Sink], None] | Line | None
"""What a run asks of its tracker; None: there is no further call."""


class Background:
    """A run that a tracker logs in a thread of its own.

    An error is said once, in one line. After an error the thread goes on: the lines that were not
    taken are sent again together with the next line, so a server that comes back gets them all.

    Args:
        name: what the tracker is called.
        start: begins the tracked run; called again after an error.
        history: for a run that goes on, its lines of metrics so far.
    """

    def __init__(self, name: str, start: Callable[[], Sink], history: list[Line]) -> None:
        self._name, self._start = name, start
        self._lines, self._step = list(history), 0
        self._sink: Sink | None = None
        self._has_failed = False
        self._is_given_up = False
        self._calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self._calls.put(lambda sink: None)  # begin at once
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of an optimizer step."""
        self._calls.put({"step": step, **metrics})

    def log_results(
        self, summary: dict[str, Any], plots: list[Path], samples: list[dict[str, str]]
    ) -> None:
        """Log the results of a finished run: summary, plots and samples."""
        self._calls.put(lambda sink: sink.log_results(self._step, summary, plots, samples))

    def finish(self, exit_code: int) -> None:
        """Close the run as finished (0) or failed; wait at most `FINISH_SECONDS`."""
        self._calls.put(lambda sink: sink.finish(self._step, exit_code))
        self._calls.put(None)
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            self._is_given_up = True
            self._say(f"not everything was taken within {FINISH_SECONDS:g} s")

    def _work(self) -> None:
        while not self._is_given_up:
            calls = self._next_calls()
            self._lines += [call for call in calls if isinstance(call, dict)]
            with self._failures_said():
                self._send_lines(self._begun())
            for call in filter(callable, calls):
                if self._sink is not None:
                    with self._failures_said():
                        call(self._sink)
            if calls[-1] is None:
                return

    def _next_calls(self) -> list[Call]:
        """Wait for a call, and return it with all that wait behind it."""
        calls = [self._calls.get()]
        while not self._calls.empty():
            calls.append(self._calls.get())
        return calls

    def _begun(self) -> Sink:
        """Return the tracked run, which is begun if it has not begun yet."""
        if self._sink is None:
            self._sink = self._start()
            log.info("%s: %s", self._name, self._sink.where)
        return self._sink

    def _send_lines(self, sink: Sink) -> None:
        if self._lines:
            self._step = max(self._step, int(self._lines[-1]["step"]))
        sink.log(self._lines)
        self._lines.clear()

    @contextlib.contextmanager
    def _failures_said(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever the tracker's client raises
            self._say(one_line(f"{type(error).__name__}: {error}")[:200])

    def _say(self, why: str) -> None:
        if not self._has_failed:
            log.warning("%s: %s; the run goes on, its folder has everything", self._name, why)
        self._has_failed = True
