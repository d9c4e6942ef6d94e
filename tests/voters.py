"""Annotators who vote on the page in a real Chromium, and a server that may be killed."""

import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from playwright.sync_api import BrowserContext, Page, Playwright

from tests.conftest import ROOT

SERVE = (
    "import argparse; from orpo_lab.curate import server; p = argparse.ArgumentParser(); "
    "server.add_arguments(p); server.run(p.parse_args())"
)
CHROMIUM = shutil.which("chromium")
READY = "body[data-busy='false']"
# What votes for the left answer, and for the right one
ACTS = (("1", "ArrowLeft", "[data-choice=left]"), ("2", "ArrowRight", "[data-choice=right]"))


class Server:
    """`curate votes` in a process of its own, on the same port after every start."""

    def __init__(self, folder: Path, *given: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self._command = [sys.executable, "-c", SERVE, str(folder), f"--port={self._port}", *given]
        self.links: dict[str, str] = {}
        self.said = ""
        self.start()

    def start(self) -> None:
        """Start, and wait for the links."""
        self._process = subprocess.Popen(
            self._command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.said += line
            if "/enter/" in line:
                name, link = line.split()
                self.links[name] = link
            if "Ctrl+C" in line:
                return
        raise AssertionError(self.said)

    def kill(self) -> None:
        """Kill the process (SIGKILL)."""
        self._process.kill()
        assert self._process.stdout is not None
        self.said += self._process.stdout.read()
        self._process.stdout.close()
        self._process.wait()


@contextmanager
def served(folder: Path, *given: str) -> Iterator[Server]:
    """Serve a folder inside this context."""
    server = Server(folder, *given)
    try:
        yield server
    finally:
        server.kill()


def open_browser(playwright: Playwright, profile: Path, **rest: Any) -> BrowserContext:
    """Start a Chromium whose cookies and storage are in a folder."""
    return playwright.chromium.launch_persistent_context(
        profile, executable_path=CHROMIUM, args=["--no-sandbox"], **rest
    )


def kill_browser(profile: Path) -> None:
    """Kill every process of the Chromium that has this folder."""
    for process in psutil.process_iter(["cmdline"]):
        if f"--user-data-dir={profile}" in (process.info["cmdline"] or []):
            for child in process.children(recursive=True):
                child.kill()
            process.kill()


class Voter:
    """An annotator who prefers the answer with the word "good", but for a known rate of errors.

    The choice for a comparison and round is the same however often it is asked.
    """

    def __init__(self, name: str, error_rate: float) -> None:
        self.name, self._error_rate = name, error_rate

    def prefers_good(self, comparison: str, round_: int) -> bool:
        """Return whether the voter votes for the good answer."""
        drawn = random.Random(f"{self.name} {comparison} {round_}").random()
        return drawn >= self._error_rate

    def vote(self, page: Page) -> bool:
        """Vote on the pair that is shown; return whether there was one."""
        shown = shown_on(page)
        if shown is None:
            return False
        good = next(place for place, text in enumerate(shown["texts"]) if "good" in text)
        wants_good = self.prefers_good(shown["comparison"], int(shown["round"]))
        choose(page, shown, good if wants_good else 1 - good)
        return True


def shown_on(page: Page) -> dict[str, Any] | None:
    """Return the pair on the page, with its `texts` from left to right; None: there is none."""
    page.wait_for_selector(READY)
    shown = page.evaluate(
        "() => ({...document.getElementById('pair').dataset,"
        " texts: [...document.querySelectorAll('.answer .text')].map(e => e.innerText)})"
    )
    return shown if shown["comparison"] else None


def choose(page: Page, shown: dict[str, Any], place: int) -> None:
    """Vote for the answer at a place (0: left), by a key or a click, as the comparison draws."""
    act = ACTS[place][random.Random(shown["comparison"]).randrange(3)]
    page.click(act) if act.startswith("[") else page.keyboard.press(act)


def wait_for(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not come to hold"
        time.sleep(0.05)
