"""Runs of launch.py as real processes, which get real signals.

Most are forked from a server that has imported torch and its friends once (`multiprocessing`'s
forkserver): two seconds a run instead of nine. The others are fresh: the command line as users type
it. Both begin in a session and a folder of their own, and run the same `launch.py` from its top.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAUNCH = str(ROOT / "launch.py")
# Seconds after which a run that has not ended hangs. Where W&B's server keeps it waiting it takes
# more than a minute on an idle machine, and twice that on a busy one.
PATIENCE = 300.0

# For every run: this checkout, no hub, one thread
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Done:
    """How a process ended."""

    code: int | None
    """The exit code; minus the number of a signal that ended it; None: it hung, and was killed."""
    stdout: str
    stderr: str


class Running:
    """A run in progress."""

    def __init__(self, process: "subprocess.Popen[bytes] | _Forked", out: Path, err: Path) -> None:
        self._process, self._out, self._err = process, out, err
        self.pid = process.pid

    def signal(self, number: int) -> None:
        """Send it a signal; it may have ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def is_alive(self) -> bool:
        """Return whether it has not ended."""
        return self._process.poll() is None

    @property
    def stdout(self) -> str:
        """What it has said so far."""
        return self._out.read_text(errors="replace")

    def wait_for(self, condition: Callable[[], object], patience: float = PATIENCE) -> None:
        """Wait until a condition holds.

        Raises:
            TimeoutError: it does not, in time or before the run has ended.
        """
        deadline = time.monotonic() + patience
        while not condition():
            if not self.is_alive():
                raise TimeoutError(f"the run ended first: {self._err.read_text()[-300:]}")
            if time.monotonic() > deadline:
                raise TimeoutError("it did not come to that")
            time.sleep(0.005)

    def wait(self, patience: float = PATIENCE) -> Done:
        """Wait for its end; kill it and its children where that does not come."""
        deadline = time.monotonic() + patience
        while self.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        code = self._process.poll()
        if code is None:
            os.killpg(self.pid, signal.SIGKILL)
            while self.is_alive():
                time.sleep(0.01)
        return Done(code, self.stdout, self._err.read_text(errors="replace"))


def start(
    folder: Path,
    arguments: list[str],
    *,
    at: Path | None = None,
    fresh: bool = False,
    environment: dict[str, str | None] | None = None,
    prepare: Callable[[], None] | None = None,
) -> Running:
    """Start `launch.py` with these arguments.

    Args:
        folder: stdout and stderr go to files in it.
        arguments: of the command line.
        at: the working directory; None: the same folder.
        fresh: in a new interpreter, rather than forked from the server.
        environment: beside `ENVIRONMENT`; None takes a variable away.
        prepare: what a forked run does in its process before it begins.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.glob("stdout-*")))
    out, err = (folder / f"{name}-{number}" for name in ("stdout", "stderr"))
    out.touch()  # a forked run needs a moment to make it
    err.touch()
    variables = {**os.environ, **ENVIRONMENT, **(environment or {})}
    environ = {key: value for key, value in variables.items() if value is not None}
    process: subprocess.Popen[bytes] | _Forked
    if fresh:
        assert prepare is None, "a fresh interpreter begins with launch.py"
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, LAUNCH, *arguments],
                cwd=at or folder,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
                preexec_fn=_default_signals,
            )
    else:
        process = _Forked((arguments, at or folder, environ, out, err, prepare))
    return Running(process, out, err)


def _default_signals() -> None:
    """Undo what a process inherits: where the suite runs in the background SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Forked:
    """A process forked from the server, with the part of Popen's interface that is used here."""

    # multiprocessing polls all its children from every thread that starts one
    lock = threading.Lock()
    context = multiprocessing.get_context("forkserver")

    def __init__(self, parts: tuple[object, ...]) -> None:
        with self.lock:
            self._process = self.context.Process(target=_in_child, args=parts, daemon=True)
            self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        with self.lock:
            return self._process.exitcode


@contextlib.contextmanager
def server() -> Iterator[None]:
    """Have what `preload` imports ready to be forked; forked runs end with it."""
    os.environ.update(ENVIRONMENT)
    # A run that is killed leaves tqdm's semaphore to be taken away, which is said
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"
    _Forked.context.set_forkserver_preload([f"{__package__}.preload"])
    try:
        yield
    finally:
        for process in multiprocessing.active_children():
            process.kill()


def _in_child(
    arguments: list[str],
    folder: Path,
    environ: dict[str, str],
    out: Path,
    err: Path,
    prepare: Callable[[], None] | None,
) -> None:
    """Become the command line: everything a fresh interpreter would have, then launch.py."""
    assert "torch" in sys.modules, "the server could not import what it should"
    os.setsid()
    os.chdir(folder)
    for file, number in ((out, 1), (err, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environ)
    _default_signals()
    if prepare:
        prepare()
    sys.argv = [LAUNCH, *arguments]
    code = 0
    try:
        runpy.run_path(LAUNCH, run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    # As an interpreter ends, which a child of multiprocessing does not
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
