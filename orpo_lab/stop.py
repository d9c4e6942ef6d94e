"""Ending a run early on purpose: signals, and a budget of wall-clock time."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# EX_TEMPFAIL of sysexits.h: nothing is wrong, start it again; Slurm can requeue by it (RequeueExit)
EXIT_CODE = 75
# The key that holds the budget
BUDGET = "train.max_hours"


class Stopped(KeyboardInterrupt):
    """A run or a sweep ends because it was asked to; what is done so far is kept.

    Args:
        reason: who asked: a signal's name, or the key that holds the budget.
        exit_code: the process's: `EXIT_CODE`, or 128 plus the signal that would not wait.
    """

    def __init__(self, reason: str, exit_code: int = EXIT_CODE) -> None:
        super().__init__(reason)
        self.reason, self.exit_code = reason, exit_code


class Stop:
    """What a run has been asked. While it `waits`, a first signal does not interrupt it.

    Args:
        max_hours: hours from now after which no further step begins; None: no such budget.
    """

    def __init__(self, max_hours: float | None = None) -> None:
        self.deadline = math.inf if max_hours is None else time.monotonic() + 3600 * max_hours
        self.waits = False
        """Whether what is being done now is finished first: a step, or the writing of results."""
        self.signal = ""
        """The first that was received."""

    def reason(self) -> str:
        """Return why the run should end after this step; empty: it should not."""
        if not self.signal and time.monotonic() > self.deadline:
            return BUDGET
        return self.signal

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT meanwhile; in a thread beside the main one, nobody can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.signal:
            raise Stopped(f"{self.signal}, then {name}", 128 + number)
        self.signal = name
        if not self.waits:
            raise Stopped(name)

    def check(self) -> None:
        """Stop here, if asked to: Python drops what is raised while it runs a finalizer.

        Raises:
            Stopped: a signal was received.
        """
        if self.signal:
            raise Stopped(self.signal)
