"""W&B through its real client: offline runs, and servers that do not behave."""

import fcntl
import http.server
import json
import os
import pty
import select
import shutil
import signal
import ssl
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orpo_lab import tracker
from orpo_lab.config.tracker import NoTracker, WandbTracker, chosen
from orpo_lab.errors import UserError
from orpo_lab.tracker.base import Run, Untracked
from orpo_lab.tracker.wandb import _answers
from tests.test_launch import _path
from tests.wandb_server import WandbServer

RECORD = {
    "beta": 0.3,
    "optimizer": {"learning_rate": 1e-3},
    "choices": {
        "model": "tiny",
        "dataset": "embedded",
        "method": "orpo",
        "optimizer": "galore",
        "beta_schedule": "linear",
    },
}
# The shape of a key, not one
KEY = "local" + "0" * 35


def settings(mode: str = "auto", **changes: Any) -> WandbTracker:
    values: dict[str, Any] = {
        "project": None,
        "entity": None,
        "group": None,
        "tags": ["mine"],
        "summary_run": False,
    }
    return WandbTracker(mode=mode, **(values | changes))


def start(
    folder: Path,
    mode: str = "auto",
    history: list[dict[str, float]] | None = None,
    name: str | None = "a-run",
    sweep: str | None = "a-sweep",
    **changes: Any,
) -> Run:
    return tracker.start(
        settings(mode, **changes),
        folder=folder,
        name=name,
        config=RECORD,
        sweep=sweep,
        history=history or [],
    )


def inspect(folder: Path, *options: str) -> str:
    """Read an offline run back as `wandb leet inspect` does, without its seconds of imports.

    W&B's process may write the end of a run a moment after it has said that the run is finished.
    """
    from wandb.util import get_core_path

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    command = [get_core_path(), "leet", "inspect", "--no-observability"]

    def read(*options: str) -> str:
        where = ["--run-file", str(file), str(file.parents[1])]
        done = subprocess.run([*command, *options, *where], capture_output=True, text=True)
        return done.stdout

    end = time.monotonic() + 10
    while "exit code" not in read("--summary"):
        assert time.monotonic() < end, "the run has no end"
        time.sleep(0.05)
    return read(*options)


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No key and no mode from the machine the tests run on; every test its own W&B process."""
    import wandb

    # First, since W&B's process of an earlier test is a variable too, to be put back by nobody
    wandb.teardown()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    yield
    wandb.teardown()


def test_without_a_key_a_run_is_offline_and_says_how_to_sync(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run = start(tmp_path)
    run.log(1, {"loss": 2.0, "beta": 0.3})
    run.log(5, {"loss": 1.0, "beta": 0.1})
    plot = tmp_path / "plot.png"
    from orpo_lab.records.plot import draw_training

    draw_training([{"step": 1, "loss": 2.0}], "a run", plot)
    sample = {"prompt": "p", "chosen": "c", "before": "b", "after": "a"}
    run.log_results({"after": {"preference_accuracy": 0.9}}, [plot], [sample])
    run.finish(0)
    assert "W&B: offline, no key is configured" in caplog.text
    assert "wandb sync" in caplog.text
    text = inspect(tmp_path, "--json")
    for expected in ("a-run", "a-sweep", "galore", "mine", "preference_accuracy", "samples"):
        assert expected in text
    assert "beta" in inspect(tmp_path, "--summary")


def test_a_comparison_is_a_run_of_its_own_where_it_is_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "a-sweep"
    (folder / "report").mkdir(parents=True)
    for name in ("report.html", "report.md", "report.json"):
        (folder / name).write_text("the report")
    from orpo_lab.records.plot import draw_training

    draw_training([{"step": 1, "loss": 2.0}], "a run", folder / "report" / "pareto.png")
    rows = [{"setting": "beta=0.1", "verdict": "winner"}]
    tracker.publish_comparison(settings(), folder, ["The winner"], rows)
    assert not (folder / "wandb").exists()
    tracker.publish_comparison(settings(summary_run=True), folder, ["The winner"], rows)
    text = inspect(folder, "--json")
    for expected in ("a-sweep-comparison", "The winner", "report.html", "pareto", "comparison-"):
        assert expected in text
    tracker.publish_comparison(NoTracker(), folder, ["The winner"], rows)


def seen_by_leet(folder: Path, names: list[str]) -> str:
    """Return what `wandb leet` writes to a terminal until it has shown all names."""
    from wandb.util import get_core_path

    child, terminal = pty.fork()
    if child == 0:
        command = [get_core_path(), "leet", "run", "--no-observability", str(folder)]
        os.execvpe(command[0], command, {**os.environ, "TERM": "xterm-256color"})
    size = struct.pack("HHHH", 50, 200, 0, 0)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)
    text, until = "", time.monotonic() + 30
    while time.monotonic() < until and not all(name in text for name in names):
        if select.select([terminal], [], [], 0.2)[0]:
            text += os.read(terminal, 65536).decode(errors="replace")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(terminal)
    return text


def test_leet_shows_all_runs_of_a_sweep_by_the_names_of_their_jobs(tmp_path: Path) -> None:
    jobs = ["0-beta=0.1", "1-beta=0.2"]
    for job in (*jobs, jobs[0]):  # the first job is started again
        run = start(tmp_path / job, name=None)
        run.log(1, {"beta": 0.1, "steepness": 2.0})
        run.finish(0)
    shown = {folder.name.split("-", 2)[2]: folder for folder in (tmp_path / "leet").iterdir()}
    assert len(list((tmp_path / "leet").iterdir())) == len(shown) == len(jobs)
    newest = max((tmp_path / jobs[0] / "wandb").glob("offline-run-*/*.wandb"))
    assert (shown[jobs[0]] / f"run-{jobs[0]}.wandb").resolve() == newest
    text = seen_by_leet(tmp_path / "leet", [*jobs, "steepness"])
    for expected in (*jobs, "steepness"):
        assert expected in text
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    links = list(moved.glob("leet/*/*"))
    assert len(links) == 2 * len(jobs)
    assert all(link.exists() for link in links)


def test_two_runs_in_one_process_stay_two(tmp_path: Path) -> None:
    for name in ("one", "two"):
        run = start(tmp_path / name)
        run.log(1, {"beta": 0.1})
        run.finish(0)
        assert len(list((tmp_path / name).glob("wandb/offline-run-*"))) == 1


class Failing(http.server.BaseHTTPRequestHandler):
    """A server that answers every request with an error: what a W&B outage looks like."""

    def _fail(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.dumps({"error": "out of order"}).encode()
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_HEAD = _fail  # noqa: N815  (http.server's names)

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""


@pytest.fixture
def failing_server() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Failing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_dead_server_means_offline_within_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    run = start(tmp_path)
    run.log(1, {"loss": 1.0})
    run.finish(0)
    assert "W&B: offline, http://127.0.0.1:9 does not answer within 3 s" in caplog.text


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_a_server_that_refuses_the_run_means_offline(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failing_server: str,
    mode: str,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", failing_server)
    run = start(tmp_path, mode)
    run.log(1, {"loss": 1.0})
    run.finish(0)
    assert "W&B: offline, the server does not take the run" in caplog.text
    assert "loss" in inspect(tmp_path, "--summary")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A server that takes runs, and the client's settings that lead to it."""
    running = WandbServer()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", running.url)
    monkeypatch.setattr(tracker.wandb, "FINISH_SECONDS", 4.0)
    yield running
    running.die()


def test_an_online_run_arrives_under_our_names(server: WandbServer, tmp_path: Path) -> None:
    run = start(tmp_path)
    for step in (1, 5, 9):
        run.log(step, {"loss": 1 / step, "beta": 0.3})
    run.finish(0)
    (arrived,) = server.runs.values()
    assert [line["loss"] for line in arrived["history"]] == [1, 1 / 5, 1 / 9]
    assert [line["_step"] for line in arrived["history"]] == [1, 5, 9]
    assert arrived["exit_code"] == 0
    first = arrived["upserts"][0]
    assert (first["groupName"], first["jobType"]) == ("a-sweep", "train")
    assert first["displayName"] == "a-run"
    assert json.loads(first["config"])["beta"]["value"] == 0.3


def test_an_offline_run_syncs_as_it_is(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(tmp_path, "offline")
    for step in (1, 5):
        run.log(step, {"loss": 1 / step})
    run.finish(0)
    assert not server.runs
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    environment = {**os.environ, "PATH": _path()}
    done = subprocess.run(
        ["wandb", "sync", str(folder)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (name,) = server.runs
    assert folder.name.endswith(name)
    assert [line["loss"] for line in server.runs[name]["history"]] == [1, 1 / 5]


def test_a_run_that_begins_anew_in_its_folder_is_one_run(
    server: WandbServer, tmp_path: Path
) -> None:
    for exit_code in (1, 0):
        run = start(tmp_path)
        run.log(1, {"loss": 1.0})
        run.finish(exit_code)
        (arrived,) = server.runs.values()
        assert arrived["exit_code"] == exit_code


def test_a_resumed_run_has_no_gap_and_no_step_twice(server: WandbServer, tmp_path: Path) -> None:
    first = start(tmp_path)
    for step in (1, 2, 4, 7):  # 3 was logged to the folder by a process that was killed then
        first.log(step, {"loss": 1 / step})
    first.finish(1)
    # Continued from step 5: after what the server has, and after what it lacks
    for begin in (5, 9):
        history = [{"step": step, "loss": 1 / step} for step in range(1, begin)]
        run = start(tmp_path, history=history)
        for step in range(begin, begin + 4):
            run.log(step, {"loss": 1 / step})
        run.finish(0)
    (arrived,) = server.runs.values()
    assert [line["_step"] for line in arrived["history"]] == [1, 2, 4, 7, 8, 9, 10, 11, 12]
    assert [line["loss"] for line in arrived["history"]][-1] == 1 / 12


def test_offline_segments_of_a_resumed_run_sync_into_one(
    server: WandbServer, tmp_path: Path
) -> None:
    first = start(tmp_path, mode="offline")
    for step in range(1, 7):
        first.log(step, {"loss": 1 / step})
    first.finish(75)
    second = start(
        tmp_path, mode="offline", history=[{"step": n, "loss": 1 / n} for n in range(1, 5)]
    )
    for step in range(5, 9):
        second.log(step, {"loss": 1 / step})
    second.finish(0)
    for segment in sorted(tmp_path.glob("wandb/offline-run-*")):
        subprocess.run(
            ["wandb", "sync", str(segment)],
            check=True,
            capture_output=True,
            cwd=tmp_path,
            env={**os.environ, "PATH": _path(), "WANDB_MODE": "online"},
        )
    (arrived,) = server.runs.values()
    assert [line["_step"] for line in arrived["history"]] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert arrived["exit_code"] == 0


@pytest.mark.parametrize("illness", ["errors", "waits", "dies"])
def test_a_server_that_falls_ill_in_mid_run_does_not_stop_it(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, illness: str
) -> None:
    monkeypatch.setattr(tracker.wandb, "FINISH_SECONDS", 1.0)
    run = start(tmp_path)
    run.log(1, {"loss": 1.0})
    if illness == "dies":
        server.die()
    else:
        server.health = illness
    begin = time.monotonic()
    for step in range(2, 50):
        run.log(step, {"loss": 1.0})
    assert time.monotonic() - begin < 2
    run.finish(0)
    assert time.monotonic() - begin < 25
    # W&B may not have written its last lines then; the run folder's metrics.jsonl has them all
    assert len(list(tmp_path.glob("wandb/run-*/run-*.wandb"))) == 1


def test_a_tracker_that_breaks_is_said_and_does_not_stop_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = start(tmp_path)
    run.finish(0)
    run.log(1, {"loss": 1.0})
    assert "the run goes on" in caplog.text


@pytest.mark.parametrize("run_id", ["../../../escaped", "a/b", "", "a\\b"])
def test_a_run_id_is_one_name(tmp_path: Path, run_id: str) -> None:
    (tmp_path / "wandb_id").write_text(run_id)
    with pytest.raises(UserError, match=r"wandb_id holds .* no W&B run id"):
        start(tmp_path)


def test_none_and_disabled_track_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(NoTracker()) == []
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert isinstance(start(tmp_path), Untracked)
    assert not (tmp_path / "wandb").exists()


OFFLINE = {
    "WANDB_MODE=offline": "offline",
    "WANDB_MODE=dryrun": "offline",
    "WANDB_MODE=disabled": "disabled",
    "WANDB_DISABLED=true": "disabled",
    "mode = offline": "offline",
    "mode = disabled": "disabled",
}


@pytest.mark.parametrize("said", OFFLINE)
def test_wandbs_own_mode_decides(
    server: WandbServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    said: str,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    if said.startswith("WANDB_"):
        monkeypatch.setenv(*said.split("=", 1))
    else:  # what `wandb offline` and `wandb disabled` write
        (tmp_path / "wandb").mkdir()
        (tmp_path / "wandb" / "settings").write_text(f"[default]\n{said}\n")
    run = start(tmp_path / "run", "online")
    run.log(1, {"loss": 1.0})
    run.finish(0)
    assert not server.runs
    assert isinstance(run, Untracked) == (OFFLINE[said] == "disabled")
    assert f"W&B: {OFFLINE[said]}, by its own settings" in caplog.text


def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PROJECT", "NAME", "JOB_TYPE", "NOTES", "RUN_GROUP", "RUN_ID"):
        monkeypatch.setenv(f"WANDB_{name}", f"their-{name.lower()}")
    monkeypatch.setenv("WANDB_TAGS", "theirs,others")


SENT = ("project", "displayName", "jobType", "notes", "groupName", "name")


def test_wandbs_own_names_hold_where_ours_leave_them_open(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables(monkeypatch)
    start(tmp_path, name=None, sweep=None).finish(0)
    sent = server.runs["their-run_id"]["upserts"][0]
    names = ("project", "name", "job_type", "notes", "run_group", "run_id")
    assert [sent[key] for key in SENT] == [f"their-{name}" for name in names]
    assert {"mine", "theirs", "others", "orpo", "galore"} <= set(sent["tags"])


def test_our_own_names_win_over_wandbs(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables(monkeypatch)
    tags = [f"hf_{'a' * 34}"]
    start(tmp_path, sweep=None, project="our-project", group="our-group", tags=tags).finish(0)
    sent = server.runs["their-run_id"]["upserts"][0]
    assert {"***", "theirs"} <= set(sent["tags"])
    assert not set(tags) & set(sent["tags"])
    assert [sent[key] for key in ("project", "displayName", "groupName")] == [
        "our-project",
        "a-run",
        "our-group",
    ]


def test_a_given_run_id_and_name_are_not_those_of_every_job_of_a_sweep(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables(monkeypatch)
    for job in ("first", "second"):
        start(tmp_path / job, name=None).finish(0)
    assert len(server.runs) == 2
    assert "their-run_id" not in server.runs
    names = [run["upserts"][0]["displayName"] for run in server.runs.values()]
    assert sorted(names) == ["first", "second"]


REFUSED: dict[str, tuple[Any, str]] = {
    "project": ("team/orpo", "tracker.project: .*'/'.*; a team goes to tracker.entity"),
    "tags": (["x" * 70], r"tracker.tags: .*70 characters"),
    "long project": ("x" * 140, "tracker.project: .*128 characters"),
    "empty tags": ([""], "tracker.tags: .*empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_wandb_would_not_take_is_refused_by_its_key(tmp_path: Path, case: str) -> None:
    value, says = REFUSED[case]
    with pytest.raises(UserError, match=says) as error:
        tracker.check(settings(**{case.split()[-1]: value}), folder=tmp_path, sweep=None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("WANDB_MODE", "Offline", "mode: Input should be"),
        ("WANDB_BASE_URL", "localhost:8080", "base_url: URL scheme"),
        ("WANDB_API_KEY", KEY + "\n", "whitespace"),
        ("WANDB_TAGS", "a,", "empty"),
        ("WANDB_PROJECT", "a/b", "Invalid project name"),
        ("WANDB_RUN_ID", "a\\b", "WANDB_RUN_ID holds"),
    ],
)
def test_wandbs_variables_that_it_does_not_take_are_refused_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says) as error:
        tracker.check(settings(), folder=tmp_path, sweep=None)
    assert "\n" not in str(error.value)
    assert KEY not in str(error.value)


def test_a_long_name_of_an_option_is_no_tag_that_wandb_refuses(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECORD["choices"], "model", "m" * 80)  # type: ignore[arg-type]
    start(tmp_path).finish(0)
    (arrived,) = server.runs.values()
    assert "m" * 64 in arrived["upserts"][0]["tags"]


def test_a_client_that_cannot_begin_does_not_end_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    def fails(**options: Any) -> None:
        raise RuntimeError("no service process")

    monkeypatch.setattr(wandb, "init", fails)
    rows = [{"setting": "beta=0.1", "verdict": "winner"}]
    tracker.publish_comparison(settings(summary_run=True), tmp_path, ["The winner"], rows)
    assert "W&B: no service process; the sweep's folder has its report" in caplog.text


def test_a_server_that_signed_its_own_certificate_is_asked_as_wandb_asks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl makes the certificate")
    made = ["-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
    files = ["-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "certificate")]
    subprocess.run([openssl, "req", *made, *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    running = WandbServer(context)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", running.url)
    assert not _answers(running.url, insecure=False)
    monkeypatch.setenv("WANDB_INSECURE_DISABLE_SSL", "true")
    run = start(tmp_path)
    run.log(1, {"loss": 1.0})
    run.finish(0)
    running.die()
    (arrived,) = running.runs.values()
    assert arrived["exit_code"] == 0
