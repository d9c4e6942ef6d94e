"""End a run early on purpose: because of a signal, or of a budget of wall-clock time."""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

# Sent by, in this order: kill and Slurm, Ctrl-C, a closed terminal, `sbatch --signal`, the timeout
# of submitit
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# Seconds within which a further signal counts as the same request: `timeout` and schedulers send
# one signal to a process and another to its group
MOMENT = 1.0
# EX_TEMPFAIL of sysexits.h: nothing is wrong, start the run again. Slurm can requeue a job that
# exits with this code (RequeueExit)
EXIT_CODE = 75
# The key that holds the budget
BUDGET = "train.max_hours"
# The variable by which jobs on the sweep's machine know the number of the sweep's process
SWEEP_PROCESS = "ORPO_LAB_SWEEP_PROCESS"
# Seconds between two looks of a job at whether the sweep's process is there
LOOK = 1.0


class Stopped(KeyboardInterrupt):
    """A run or a sweep ends because it was asked to; what is done so far is kept.

    Args:
        reason: the name of a signal, or the key that holds the time budget.
        exit_code: of the process: `EXIT_CODE`, or 128 plus the number of a second signal.
    """

    def __init__(self, reason: str, exit_code: int = EXIT_CODE) -> None:
        super().__init__(reason)
        self.reason, self.exit_code = reason, exit_code


def _taken() -> list[signal.Signals]:
    """Return the signals to handle; SIGHUP is left out if nohup makes the process ignore it."""
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in SIGNALS if number != signal.SIGHUP or not is_ignored]


class Stop:
    """Whether a run has been asked to stop. While `waits` is true, a first signal only sets a flag.

    Args:
        max_hours: hours from now after which no further step begins; None: no time budget.
    """

    asked_at = -math.inf
    """Time of the last signal to this process, by `time.monotonic`.

    All instances share it, since one signal is for a run and for its sweep.
    """

    def __init__(self, max_hours: float | None = None) -> None:
        self.deadline = math.inf if max_hours is None else time.monotonic() + 3600 * max_hours
        self.waits = False
        """Whether the current work (a step, or the writing of results) is finished first."""
        self.signal = ""
        """Name of the first signal that was received; empty: none."""

    def reason(self) -> str:
        """Return the reason to end the run after this step; empty: the run should go on."""
        if not self.signal and time.monotonic() > self.deadline:
            return BUDGET
        return self.signal

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle `SIGNALS` inside this context; does nothing outside the main thread.

        Python lets only the main thread set signal handlers.
        """
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
        """Handle `SIGNALS` from now on, and return the handlers before."""
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
        """Raise `Stopped` if a signal was received.

        The signal handler raises it too, unless `waits` is true. But Python drops an exception that
        is raised while a finalizer runs, so this method repeats it.

        Raises:
            Stopped: a signal was received.
        """
        if self.signal:
            raise Stopped(self.signal)


class ProcessStop(Stop):
    """Handles the signals of a process between its jobs; a running job has its own `Stop`.

    The jobs of a sweep may run in processes of a launcher (joblib or submitit). Then the first
    process passes every signal on to these processes, and waits for them. Each of them lets its job
    save and end, and begins no further job. So do they if the first process is killed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_listening = False
        self.is_worker = False
        """Whether this process was started by a launcher, not by the user."""
        self.at_work = threading.Lock()
        """Held while a job runs."""

    def listen(self) -> dict[signal.Signals, Any]:
        """Handle `SIGNALS` from now on; see `Stop.listen`."""
        self.is_listening = True
        return super().listen()

    def work_for_another(self) -> None:
        """Handle signals in a process that a launcher started, also those blocked before this call.

        In the process that the user started, this does nothing.
        """
        if self.is_listening:
            return
        self.is_worker = self.waits = True
        self.listen()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if number := os.environ.get(SWEEP_PROCESS):
            threading.Thread(target=self._end_with, args=(int(number),), daemon=True).start()

    def pass_on(self) -> None:
        """From now on pass signals on to child processes, instead of ending this process.

        Signals are blocked, and a thread waits for them. Child processes inherit the blocked
        signals: a child that is still importing is not killed, and gets the signal when it unblocks
        signals (`work_for_another`).
        """
        from multiprocessing import resource_tracker

        taken = _taken()
        self.waits = True
        os.environ[SWEEP_PROCESS] = str(os.getpid())
        resource_tracker.ensure_running()  # now, since its start unblocks signals (Python 3.11)
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

    def _end_with(self, number: int) -> None:
        """Once another process has ended, let the job of this process stop, and end this process.

        A process of joblib would wait for another job for minutes, with its GPU's memory.
        """
        import psutil

        with suppress(psutil.NoSuchProcess):
            other = psutil.Process(number)
            while other.is_running() and other.status() != psutil.STATUS_ZOMBIE:
                time.sleep(LOOK)
        os.kill(os.getpid(), signal.SIGTERM)
        with self.at_work:
            os._exit(EXIT_CODE)


PROCESS = ProcessStop()
