"""One fault, planted in a copy of the working tree, and what its tests say.

Trials are forked from a process that has imported torch and its friends but nothing of this
repository, so that one costs little more than its tests do.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from faults.planted.catalogue import ROOT, Mutant

# Where the packages of this repository would be found, if not in a copy of it
OURS = ("benchmarks", "faults", "orpo_lab", "tests")
# A test that raises one of these has met a mistake in the list, not the fault that was meant
SLIPS = (NameError, ImportError, SyntaxError)

Verdict = Literal["caught", "survived", "unclear"]


@dataclass(frozen=True)
class Outcome:
    """What came of a trial."""

    verdict: Verdict
    """`unclear`: no test judged the fault, and it counts as one that has survived."""
    detail: str = ""
    """The test that went red, or why it is unclear."""


def copy_tree(folder: Path) -> None:
    """Copy what git tracks, and new files that it does not ignore, as they are now."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "-co", "--exclude-standard"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)


class Trial:
    """Tests that run in a process of their own, on a copy of the tree."""

    def __init__(
        self, folder: Path, tests: Sequence[str], fault: Mutant | None, seconds: float
    ) -> None:
        """Start them.

        Args:
            folder: to be made; the copy lies in it, and what the tests say.
            tests: files, or `file::test`; of those marked slow none is run.
            fault: to be planted; None: the tree as it is, and every test is run.
            seconds: the time they have.
        """
        self.folder, self.fault = folder, fault
        self._deadline = time.monotonic() + seconds
        self._code: int | None = None
        tree = folder / "tree"
        copy_tree(tree)
        if fault:
            file = tree / fault.file
            file.write_text(fault.planted(file.read_text(encoding="utf-8")), encoding="utf-8")
        self._pid = os.fork()
        if self._pid == 0:
            _run_tests(folder, tests, stop_at_first=fault is not None)

    def has_ended(self) -> bool:
        """Return whether the tests have ended; they are killed where their time is up."""
        if self._code is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
                self.kill()
            elif time.monotonic() > self._deadline:
                self.kill()
        return self._code is not None

    def kill(self) -> None:
        """Kill whatever is left of the trial's session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
            return
        if self._code is None:  # it has no session of its own yet
            os.kill(self._pid, signal.SIGKILL)

    def outcome(self) -> Outcome:
        """Return what came of it; its copy of the tree is deleted."""
        shutil.rmtree(self.folder / "tree", ignore_errors=True)
        said = self.folder / "said.json"
        if not said.exists():
            late = time.monotonic() > self._deadline
            return Outcome("unclear", "time is up" if late else f"it ended with {self._code}")
        return _judge(json.loads(said.read_text()))

    def red(self) -> list[str]:
        """Return the tests that went red."""
        said = self.folder / "said.json"
        red = json.loads(said.read_text())["red"] if said.exists() else []
        return [test["test"] for test in red]


def _judge(said: dict[str, Any]) -> Outcome:
    if said["not_collected"]:
        return Outcome("unclear", f"tests cannot be collected: {said['not_collected'][0]}")
    if said["red"]:
        first = said["red"][0]
        if first["is_slip"]:
            return Outcome("unclear", f"{first['test']}: {first['error']}")
        return Outcome("caught", first["test"])
    if not said["num_passed"]:
        return Outcome("unclear", "no test has run")
    return Outcome("survived")


class _Listener:
    """Writes down what pytest says of tests."""

    def __init__(self) -> None:
        self.num_passed = 0
        self.red: list[dict[str, Any]] = []
        self.not_collected: list[str] = []
        self.running = ""

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running = nodeid

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Take what pytest is interrupted by for a red test: a run that is stopped raises it."""
        self.red.append({"test": self.running, "error": excinfo.exconly(), "is_slip": False})

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            lines = report.longreprtext.splitlines()
            self.not_collected.append(f"{report.nodeid}: {lines[-1] if lines else ''}")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = yield
        if report.failed:
            error = call.excinfo
            self.red.append(
                {
                    "test": item.nodeid,
                    "error": error.exconly() if error else "",
                    "is_slip": error is not None and isinstance(error.value, SLIPS),
                }
            )
        self.num_passed += report.passed and report.when == "call"
        return report


def _run_tests(folder: Path, tests: Sequence[str], *, stop_at_first: bool) -> None:
    """Become the process of the tests, which never returns."""
    try:
        os.setsid()
        said = os.open(folder / "pytest.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(said, 1)
        os.dup2(said, 2)
        tree = folder / "tree"
        os.chdir(tree)
        os.environ["PYTHONPATH"] = str(tree)
        sys.path[:] = [str(tree), *(path for path in sys.path if path not in ("", str(ROOT)))]
        for name in list(sys.modules):
            if name.partition(".")[0] in OURS:
                del sys.modules[name]
        listener = _Listener()
        options = ["-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow"]
        # Plugins that are imported already: what they assert is not ours
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        if stop_at_first:
            options.append("-x")
        code = pytest.main([*options, f"--rootdir={tree}", *tests], plugins=[listener])
        _check_place(tree)
        if listener.red or listener.not_collected or code == pytest.ExitCode.OK:
            part = folder / "said.json.part"
            part.write_text(json.dumps(vars(listener)))
            part.rename(folder / "said.json")
        os._exit(code)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(70)


def _check_place(tree: Path) -> None:
    """Check that what was tested is the copy."""
    for module in filter(None, map(sys.modules.get, OURS)):
        file = module.__file__
        assert file is None or Path(file).is_relative_to(tree), f"{file} is not of the copy"
