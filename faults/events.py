"""Every change that a run makes to files, as a point at which something can happen to it.

Python tells of them through audit events, and a run opens every file of its checkpoints in Python.
Two kinds of point for each: `before` it happens, and for a file that is written, `torn`: half of
what was to be written is there.

What is in this module runs in the process of the run.
"""

import builtins
import functools
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults import inside

WRITER = "open"
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")


@dataclass(frozen=True)
class Event:
    """One change: what is done, to which file in the watched folder, for the how-manieth time."""

    kind: str
    path: str
    number: int

    def __str__(self) -> str:
        return f"{self.kind} {self.path}" + f" ({self.number})" * (self.number > 1)


@dataclass(frozen=True)
class Point:
    """When something happens."""

    event: Event
    torn: bool = False

    def __str__(self) -> str:
        return f"{'torn' if self.torn else 'before'} {self.event}"


@dataclass
class Watch:
    """What to watch, where to note what is seen, and what happens when."""

    folder: Path
    log: Path
    at: Point | None = None
    do: Callable[[], None] = inside.die
    seen: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __call__(self) -> None:
        """Watch this process from now on."""
        _arm(self)


def read(log: Path) -> list[Event]:
    """Return what a watched run has noted."""
    return [Event(**json.loads(line)) for line in log.read_text().splitlines()]


def points(found: list[Event]) -> list[Point]:
    """Return every point of a run with these events."""
    return [
        Point(event, torn)
        for event in found
        for torn in ((False, True) if event.kind == WRITER else (False,))
    ]


def _arm(watch: Watch) -> None:
    log = os.open(watch.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    root = str(watch.folder.resolve())

    def place(path: Any, directory: Any = None) -> str | None:
        """Return a path's place in the watched folder; None: it is elsewhere."""
        if not isinstance(path, str | os.PathLike):
            return None
        full = os.fspath(path)
        if isinstance(directory, int) and directory >= 0:  # relative to an open directory
            full = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), full)
        full = os.path.abspath(full)
        return os.path.relpath(full, root) if f"{full}/".startswith(f"{root}/") else None

    def happens(kind: str, path: str) -> bool:
        """Note an event; do what is to be done before it, or return that it is to be torn."""
        watch.seen[kind, path] += 1
        event = Event(kind, path, watch.seen[kind, path])
        os.write(log, f"{json.dumps(vars(event))}\n".encode())
        if watch.at is None or watch.at.event != event:
            return False
        if not watch.at.torn:
            watch.do()
        return watch.at.torn

    def tear(path: Any, kept: int) -> None:
        """Leave half of what was written after the first `kept` bytes, and die."""
        descriptor = os.open(path, os.O_WRONLY)  # by number it is no event
        os.ftruncate(descriptor, kept + (os.path.getsize(path) - kept) // 2)
        watch.do()

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if name not in CHANGES:
            return
        # The last argument of all but one is the folder that the path is relative to
        where = place(arguments[0], None if name == "os.truncate" else arguments[-1])
        if where is not None:
            happens(name, where)

    def torn_at_close(file: Any, path: Any, size: int) -> Any:
        close = file.close

        def close_torn() -> None:
            close()
            tear(path, size)

        file.close = close_torn  # `with` asks the instance
        return file

    def watched_open(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def opened(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
            where = place(file) if set(mode) & set("wax+") else None
            if where is None or not happens(WRITER, where):
                return original(file, mode, *rest, **named)
            size = os.path.getsize(file) if "a" in mode and os.path.exists(file) else 0
            return torn_at_close(original(file, mode, *rest, **named), file, size)

        return opened

    sys.addaudithook(hook)
    builtins.open = io.open = watched_open(open)
