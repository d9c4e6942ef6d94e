"""What is going on is shown on a real terminal of 80 columns, and in lines of a log."""

import fcntl
import logging
import os
import re
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pytest

from orpo_lab import progress
from orpo_lab.progress import Handler, Work
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.tracker.base import Untracked
from orpo_lab.training.lines import Lines
from orpo_lab.upstream import silence

Terminal = Callable[[], str]


def rows_of(written: str, width: int = 80) -> list[str]:
    """Return what a terminal shows after it was written to: `\\r` goes back, nothing is erased.

    Raises:
        AssertionError: a line is wider than the terminal.
    """
    rows, at = [""], 0
    for character in written.replace("\r\n", "\n"):
        if character == "\n":
            rows.append("")
            at = 0
        elif character == "\r":
            at = 0
        else:
            row = rows[-1].ljust(at)
            rows[-1] = row[:at] + character + row[at + 1 :]
            at += 1
            assert at <= width, f"wider than {width} columns: {rows[-1]!r}"
    return [row.rstrip() for row in rows]


@contextmanager
def terminal(
    monkeypatch: pytest.MonkeyPatch, width: int = 80, term: str = "xterm"
) -> Iterator[Terminal]:
    """Inside this context, stderr and stdout are a terminal; yield what reads what was written."""
    read, write = os.openpty()
    fcntl.ioctl(write, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    written: list[bytes] = []

    def listen() -> None:
        try:
            while some := os.read(read, 65536):
                written.append(some)
        except OSError:  # all that write have closed it
            pass

    listening = threading.Thread(target=listen)
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(progress, "TICK", 0.01)
    # Other tests of this process may have left parts that never end
    monkeypatch.setattr(progress, "_SCREEN", progress._Screen())
    with os.fdopen(write, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(sys, "stdout", stream)
        listening.start()

        def ends() -> str:
            monkeypatch.undo()
            stream.close()
            listening.join()
            return b"".join(written).decode()

        yield ends
    os.close(read)


def test_a_line_is_drawn_in_place_and_cleared_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as ends:
        for _ in progress.counted(range(3), "before: score"):
            time.sleep(0.03)
        written = ends()
    assert re.search(r"before: score 2/3 \S+ +00:00<00:00", written)
    assert "\n" not in written
    assert rows_of(written) == [""]


def test_time_goes_on_within_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as ends:
        with Work("load the model") as work:
            work.start -= 59.9
            time.sleep(0.2)
        written = ends()
    assert "load the model 00:59" in written
    assert "load the model 01:00" in written


def test_a_long_run_of_a_sweep_fits_in_80_columns(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with terminal(monkeypatch) as ends:
        with progress.titled("job 12/100"):
            lines = Lines(RunFolder(tmp_path), Untracked(), 0, 54_321)
            lines.work.done, lines.work.start = 12_345, time.monotonic() - 99 * 3600
            metrics = {"loss": 12.3456, "preference_accuracy": 0.5, "logp_margin": -1.2345}
            lines.write(12_345, metrics)
            time.sleep(0.05)
            lines.close()
        written = ends()
    assert re.search(r"job 12/100 train 12345/54321 .*99:00:00<336:\d\d:\d\d, loss=12", written)
    assert rows_of(written) == [""], "no line is wider, and the last one is cleared"


@pytest.mark.parametrize(("width", "given", "most"), [(40, "", 39), (0, "", 79), (80, "30", 29)])
def test_a_line_fits_in_the_terminal_or_in_what_columns_says(
    monkeypatch: pytest.MonkeyPatch, width: int, given: str, most: int
) -> None:
    with terminal(monkeypatch, width) as ends:
        monkeypatch.setenv("COLUMNS", given)
        with Work("a part with a name that is a little longer than others", 1000):
            pass
        written = ends()
    first = written.split("\r")[1]
    assert len(first) == most


def test_a_line_of_the_log_stands_above_the_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as ends:
        handler = Handler(sys.stdout)
        with Work("save the model"):
            handler.emit(logging.makeLogRecord({"msg": "a line"}))
            time.sleep(0.05)
        written = ends()
    assert written.count("save the model") >= 2
    assert rows_of(written) == ["a line", ""]


def test_of_nested_parts_the_inner_one_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as ends:
        with Work("train", 9), Work("evaluate", 7):
            time.sleep(0.05)
        written = ends()
    # The outer part may be drawn again between the ends of both
    inner = written[written.index("evaluate 0/7") : written.rindex("evaluate 0/7")]
    assert inner
    assert "train" not in inner
    assert rows_of(written) == [""]


@pytest.mark.parametrize(
    ("term", "is_shared", "has_bar"),
    [("dumb", False, False), ("xterm", True, False), ("xterm", False, True)],
    ids=["dumb", "shared", "library"],
)
def test_nothing_is_drawn_where_a_line_would_disturb(
    monkeypatch: pytest.MonkeyPatch, term: str, is_shared: bool, has_bar: bool
) -> None:
    with terminal(monkeypatch, term=term) as ends:
        with progress.titled("", is_shared=is_shared), Work("train", 9, has_bar=has_bar):
            time.sleep(0.05)
        written = ends()
    assert written.strip("\r") == ""


def draw_library_bar() -> None:
    """Map a dataset with a bar of its own, as tokenizing does."""
    rows = datasets.Dataset.from_dict({"x": [1, 2]})
    rows.map(lambda row: row, desc="tokenize", load_from_cache_file=False)


def test_a_librarys_bar_has_the_number_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    silence()
    silence()
    with terminal(monkeypatch) as ends:
        with progress.titled("job 2/8"):
            draw_library_bar()
        draw_library_bar()
        written = ends()
    assert re.findall(r"(?:job \d/\d )*tokenize: 100%", written)[0] == "job 2/8 tokenize: 100%"
    assert written.rstrip().rsplit("\r", 1)[1].startswith("tokenize: 100%")


@pytest.mark.parametrize(("term", "is_shared"), [("dumb", False), ("xterm", True)])
def test_a_librarys_bar_is_hidden_where_it_would_disturb(
    monkeypatch: pytest.MonkeyPatch, term: str, is_shared: bool
) -> None:
    silence()
    with terminal(monkeypatch, term=term) as ends:
        with progress.titled("job 2/8", is_shared=is_shared):
            draw_library_bar()
        written = ends()
    assert written == ""


def test_a_librarys_bar_is_hidden_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    silence()
    with progress.titled("job 2/8"):
        draw_library_bar()
    assert capsys.readouterr() == ("", "")


def test_a_log_gets_lines_at_growing_intervals_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(progress, "TICK", 0.001)
    monkeypatch.setattr(progress, "FIRST", 0.05)
    monkeypatch.setattr(progress, "LONGEST", 0.2)
    caplog.set_level(logging.INFO, "orpo_lab")
    with progress.titled("job 2/5"), Work("train", 120, done=20) as work:
        work.done = 70
        time.sleep(0.75)
    lines = [record.getMessage() for record in caplog.records]
    # After 0.05, 0.1, 0.2, 0.4 and 0.6 seconds
    assert 3 <= len(lines) <= 5
    assert lines[0] == "job 2/5 train 70/120  00:00<00:00"
    gaps = [b.created - a.created for a, b in zip(caplog.records, caplog.records[1:], strict=False)]
    assert gaps[0] >= 0.05
    assert max(gaps) >= 0.2 > gaps[0]
    assert capsys.readouterr().err == ""


def test_a_log_gets_no_line_just_after_the_caller_has_written_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "TICK", 0.001)
    monkeypatch.setattr(progress, "FIRST", 0.1)
    caplog.set_level(logging.INFO, "orpo_lab")
    with Work("train", 120) as work:
        for _ in range(10):
            work.say_later()
            time.sleep(0.03)
    assert not caplog.records


def test_the_time_left_is_that_of_what_this_start_has_done() -> None:
    work = Work("train", 120, done=100)
    work.start -= 60
    assert work.times() == "01:00"
    work.done = 110
    assert work.times() == "01:00<01:00"
