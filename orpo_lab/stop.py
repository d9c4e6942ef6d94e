"""Ending a run early on purpose: signals, and a budget of wall-clock time."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

# Of schedulers, terminals and people: kill and Slurm, Ctrl-C, a closed terminal, `sbatch --signal`,
# submitit's timeout
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# Seconds in which further signals are the same request: `timeout` and schedulers send one to a
# process and one to its group
MOMENT = 1.0
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


def _taken() -> list[signal.Signals]:
    """Return the signals to take: not SIGHUP where nohup has had it ignored."""
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in SIGNALS if number != signal.SIGHUP or not is_ignored]


class Stop:
    """What a run has been asked. While it `waits`, a first signal does not interrupt it.

    Args:
        max_hours: hours from now after which no further step begins; None: no such budget.
    """

    asked_at = -math.inf
    """When this process was last sent a signal; a run and its sweep are asked by the same one."""

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
        """Take `SIGNALS` meanwhile; in a thread beside the main one, nobody can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = self.listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def listen(self) -> dict[signal.Signals, Any]:
        """Take `SIGNALS` from now on, and return the handlers that did before."""
        return {number: signal.signal(number, self._receive) for number in _taken()}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        is_same, Stop.asked_at = time.monotonic() - Stop.asked_at < MOMENT, time.monotonic()
        first, self.signal = self.signal, self.signal or name
        if is_same:
            return
        if first:
            raise Stopped(f"{first}, then {name}", 128 + number)
        if not self.waits:
            raise Stopped(name)

    def check(self) -> None:
        """Stop here, if asked to: Python drops what is raised while it runs a finalizer.

        Raises:
            Stopped: a signal was received.
        """
        if self.signal:
            raise Stopped(self.signal)


class ProcessStop(Stop):
    """The signals that a process receives between its jobs; a job that runs has its own `Stop`.

    A sweep's jobs may run in processes of a launcher, joblib's or submitit's. There the first
    process passes every signal on and waits for the others, each of which lets its job end saved
    and begins no further one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_listening = False
        self.is_worker = False
        """Whether this is a launcher's process, not the one that a user has started."""

    def listen(self) -> dict[signal.Signals, Any]:
        """Take `SIGNALS` from now on; see `Stop.listen`."""
        self.is_listening = True
        return super().listen()

    def work_for_another(self) -> None:
        """Take the signals of a launcher's process, those that came before included."""
        if self.is_listening:
            return
        self.is_worker = self.waits = True
        self.listen()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def pass_on(self) -> None:
        """Pass signals on to the processes that are started from now on, instead of ending.

        Signals are blocked, and a thread waits for them. Processes inherit that: one that has yet
        to import what it needs is not killed, and finds the signal when it asks for it.
        """
        from multiprocessing import resource_tracker

        taken = _taken()
        self.waits = True
        resource_tracker.ensure_running()  # which unblocks signals when it starts (Python 3.11)
        signal.pthread_sigmask(signal.SIG_BLOCK, taken)
        threading.Thread(target=self._pass_on, args=(taken,), daemon=True).start()

    def _pass_on(self, taken: list[signal.Signals]) -> None:
        import psutil

        while True:
            number = signal.sigwait(taken)
            self.signal = self.signal or signal.Signals(number).name
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    process.send_signal(number)


PROCESS = ProcessStop()
