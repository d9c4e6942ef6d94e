"""What is going on, and how far it is: one line in place on a terminal, some lines in a log.

A thread shows the progress. The work itself only counts, so no step waits for a terminal.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

log = logging.getLogger(__name__)

T = TypeVar("T")
# Seconds between two looks at the work
TICK = 0.5
# Seconds after which a log gets its first line. Each pause is as long as all pauses before, up to
# the longest
FIRST, LONGEST = 10.0, 60.0
# Columns of a terminal that does not say how many it has
WIDTH = 80
# {desc} has no colon, since the count follows at once
COUNTED = "{desc} {n_fmt}/{total_fmt} {bar} {elapsed}<{remaining}{postfix}"
UNCOUNTED = "{desc} {elapsed}"


class Work:
    """A part of a run that may take a while; its progress is shown inside this context.

    Parts may be nested: the innermost one is shown.

    Args:
        doing: what is going on, such as `before: score`.
        total: how much there is to do; None: this is not known.
        done: how much was done before.
        has_bar: whether a library shows a bar of its own on a terminal; a log still gets lines.
    """

    def __init__(
        self, doing: str, total: int | None = None, *, done: int = 0, has_bar: bool = False
    ) -> None:
        self.doing, self.total, self.begun_at, self.done = doing, total, done, done
        self.note = ""
        """Shown behind the progress on a terminal."""
        self.has_bar = has_bar
        self.start = self.last_said = time.monotonic()
        self._pause = FIRST
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Work":
        """Begin to show the progress."""
        self.begin()
        return self

    def __exit__(self, *error: object) -> None:
        """Show the progress no more."""
        self.end()

    def begin(self) -> None:
        """Begin to show the progress."""
        with _SCREEN.lock:
            _SCREEN.works.append(self)
            _SCREEN.draw()
        self._thread.start()

    def end(self) -> None:
        """Show the progress no more; its line on the terminal is cleared."""
        self._ended.set()
        with _SCREEN.lock:
            _SCREEN.works.remove(self)
            _SCREEN.clear()
        self._thread.join()  # last, since a signal may end the wait by an exception

    def say_later(self) -> None:
        """Put the next line in a log off, since the caller has just written one."""
        self.last_said = time.monotonic()

    def times(self) -> str:
        """Return the time that the work has taken, and an estimate of the time left, as text."""
        elapsed, new = time.monotonic() - self.start, self.done - self.begun_at
        spent = tqdm.format_interval(elapsed)
        if self.total is None or not new:
            return spent
        return f"{spent}<{tqdm.format_interval(elapsed / new * (self.total - self.done))}"

    def line(self, width: int | None = None) -> str:
        """Return the progress as text.

        Args:
            width: columns of the terminal, which the text does not exceed; None: a log.
        """
        doing = f"{title()}{self.doing}"
        if width is None:
            count = "" if self.total is None else f" {self.done}/{self.total}"
            return f"{doing}{count}  {self.times()}"
        text = tqdm.format_meter(
            self.done,
            self.total or 0,
            time.monotonic() - self.start,
            ncols=width,
            prefix=doing,
            ascii=None if "utf" in (sys.stderr.encoding or "").lower() else True,
            bar_format=UNCOUNTED if self.total is None else COUNTED,
            postfix=self.note or None,
            initial=self.begun_at,
        )
        return str(text)[:width]

    def _watch(self) -> None:
        while not self._ended.wait(TICK):
            if on_terminal():
                with _SCREEN.lock:
                    _SCREEN.draw()
            elif time.monotonic() - self.last_said >= self._pause and _SCREEN.works[-1:] == [self]:
                log.info("%s", self.line())
                self.say_later()
                self._pause = min(LONGEST, time.monotonic() - self.start)


class _Screen:
    """The line of this process on the terminal."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.works: list[Work] = []
        self.title = ""
        self.is_shared = False
        self.width = 0
        """Number of columns that are written to."""

    def draw(self) -> None:
        """Write the progress of the innermost work over the last line."""
        if not self.works or not on_terminal():
            return
        work = self.works[-1]
        text = "" if work.has_bar else work.line(columns() - 1)
        self._write(text)

    def clear(self) -> None:
        """Clear the line."""
        self._write("")

    def _write(self, text: str) -> None:
        if text or self.width:
            back = "" if text else "\r"
            print(f"\r{text}{' ' * (self.width - len(text))}{back}", end="", file=sys.stderr)
            sys.stderr.flush()
            self.width = len(text)


_SCREEN = _Screen()
# A process that tokenizes is forked, and has nothing to show; the lock may be held at that moment
os.register_at_fork(after_in_child=lambda: _Screen.__init__(_SCREEN))


def on_terminal() -> bool:
    """Return whether the progress can be shown in place, on a terminal of this process alone."""
    is_terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    return is_terminal and not _SCREEN.is_shared


def columns() -> int:
    """Return the width of the terminal; COLUMNS decides, where it is set."""
    given = os.environ.get("COLUMNS", "")
    try:
        width = int(given) if given.isdecimal() else os.get_terminal_size(sys.stderr.fileno())[0]
    except (OSError, ValueError):
        width = 0
    return width or WIDTH


def counted(items: Collection[T], doing: str) -> Iterator[T]:
    """Yield the items, and show how many of them are done."""
    with Work(doing, len(items)) as work:
        for item in items:
            yield item
            work.done += 1


def title() -> str:
    """Return the title of all lines, with a space behind it; empty: there is none."""
    return _SCREEN.title


@contextmanager
def titled(name: str, *, is_shared: bool = False) -> Iterator[None]:
    """Inside this context, put a title in front of every line, such as the number of a job.

    Args:
        name: what stands in front; empty: nothing.
        is_shared: whether other processes write to the same terminal; then no line is in place.
    """
    _SCREEN.title, _SCREEN.is_shared = f"{name} ".lstrip(), is_shared
    try:
        yield
    finally:
        _SCREEN.title, _SCREEN.is_shared = "", False


class Handler(logging.StreamHandler):
    """Writes lines of a log to a stream, above the line of the progress."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line where the progress was, and the progress below it."""
        with _SCREEN.lock:
            _SCREEN.clear()
            super().emit(record)
            _SCREEN.draw()
