"""TensorBoard, MLflow and trackio: written through their libraries, read by their own readers."""

import importlib
import json
import logging
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from faults.inside import at_call, die_once_tracked, note_connections
from orpo_lab import tracker
from orpo_lab.config.tracker import (
    Chosen,
    MlflowTracker,
    TensorboardTracker,
    TrackioTracker,
    nowhere,
)
from orpo_lab.errors import UserError
from orpo_lab.tracker import background
from orpo_lab.tracker.background import Background, Line
from orpo_lab.tracker.base import Run
from tests import tracker_readers as read
from tests.tracker_readers import Series

CONFIG = {"beta": 0.3, "name": None, "model": {"path": "a"}, "choices": {"method": "orpo"}}
SUMMARY: dict[str, Any] = {
    "after": {"preference_accuracy": 0.75},
    "git_commit": None,
    "changes": [{}],
}
SAMPLES = [{"prompt": "a | b\nc", "after": "d"}]
# Steps of two lines each, as where an evaluation is due
LINES: list[Line] = [
    line
    for step in range(1, 5)
    for line in (
        {"step": step, "loss": 1 / step, "a/b": 0.1},
        {"step": step, "eval_loss": 2.0 * step},
    )
]


@dataclass
class Store:
    """Where a test's runs are kept, and how they are read back."""

    name: str
    folder: Path
    uri: str

    def settings(self) -> Chosen:
        match self.name:
            case "tensorboard":
                return TensorboardTracker()
            case "mlflow":
                return MlflowTracker(uri=self.uri, experiment=None)
        return TrackioTracker(project=self.folder.parent.name, group=None)

    def start(self, history: list[Line] | None = None, sweep: str | None = None) -> Run:
        self.folder.mkdir(exist_ok=True)
        return tracker.start(
            self.settings(),
            folder=self.folder,
            name=None,
            config=CONFIG,
            sweep=sweep,
            history=history or [],
        )

    def series(self) -> Series:
        match self.name:
            case "tensorboard":
                return read.of_tensorboard(self.folder)
            case "mlflow":
                return read.of_mlflow(self.folder, self.uri)
        return read.of_trackio(self.folder, self.folder.parent.name)

    def wanted(self, lines: list[Line]) -> Series:
        series = read.of_lines(lines)
        return read.as_float32(series) if self.name == "tensorboard" else series

    def about(self) -> tuple[str, Any, Any]:
        """Return the state of the run, the configuration's beta, and the samples."""
        match self.name:
            case "tensorboard":
                text = {
                    tag: read.accumulated(self.folder).Tensors(tag)[-1].tensor_proto.string_val[0]
                    for tag in ("state", "config", "samples")
                }
                beta = json.loads(text["config"].decode().strip("`json\n"))["beta"]
                return text["state"].decode().upper(), beta, text["samples"].decode()
            case "mlflow":
                from mlflow import MlflowClient

                client = MlflowClient(self.uri)
                run = client.get_run((self.folder / "mlflow_id").read_text())
                place = client.download_artifacts(run.info.run_id, "samples.json")
                return run.info.status, float(run.data.params["beta"]), Path(place).read_text()
        lines, config = read.in_trackio(self.folder, self.folder.parent.name)
        (samples,) = (line["samples"]["_value"] for line in lines if "samples" in line)
        return config["state"].upper(), config["beta"], str(samples)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the stores that this module's tests share: to make MLflow's takes seconds."""
    made = tmp_path_factory.mktemp("stores")
    os.environ["TRACKIO_DIR"] = str(made / "trackio")  # read once, as trackio is imported
    return made


@pytest.fixture(params=["tensorboard", "mlflow", "trackio"])
def store(
    request: pytest.FixtureRequest, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Store:
    monkeypatch.chdir(place)
    return Store(request.param, tmp_path / "run", "sqlite:///mlflow.db")


def log_all(run: Run, lines: list[Line]) -> None:
    for line in lines:
        run.log(int(line["step"]), {name: line[name] for name in line if name != "step"})


@pytest.fixture(autouse=True)
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return what was said of failures so far."""
    caplog.set_level(logging.INFO)
    return lambda: [text for text in caplog.messages if "the run goes on" in text]


def test_a_run_arrives_under_our_names(
    store: Store, tmp_path: Path, said: Callable[[], list[str]]
) -> None:
    from orpo_lab.records.plot import draw_training

    plot = tmp_path / "training.png"
    draw_training([{"step": 1, "loss": 2.0}], "a run", plot)
    run = store.start()
    log_all(run, LINES)
    run.log_results(SUMMARY, [plot], SAMPLES)
    run.finish(0)
    assert said() == []
    series = store.series()
    assert series.pop("after.preference_accuracy") == [(4, 0.75)]
    assert series == store.wanted(LINES)
    state, beta, samples = store.about()
    assert (state, beta) == ("FINISHED", 0.3)
    assert "a " in samples
    if store.name == "tensorboard":
        (image,) = read.accumulated(store.folder).Images("plots/training")
        assert image.encoded_image_string == plot.read_bytes()
        assert samples == "| prompt | after |\n| --- | --- |\n| a \\| b<br>c | d |"


def test_a_run_that_goes_on_has_every_point_once(
    store: Store, said: Callable[[], list[str]]
) -> None:
    """From an older checkpoint, and with a line that a killed process has not sent."""
    run = store.start()
    log_all(run, [line for line in LINES if line["step"] != 2])
    run.finish(75)
    for begin in (3, 5):  # before what the tracker has, and after it
        again: list[Line] = [{"step": step, "loss": 1 / step} for step in range(5, begin + 3)]
        run = store.start(history=LINES[: 2 * begin - 2])
        log_all(run, LINES[2 * begin - 2 :] + again)
        run.finish(0)
    assert said() == []
    ordered = {name: sorted(points) for name, points in store.series().items()}
    assert ordered == store.wanted(LINES + again)


def test_tensorboard_forgets_what_a_run_computes_otherwise_the_second_time(tmp_path: Path) -> None:
    store = Store("tensorboard", tmp_path / "run", "")
    run = store.start()
    log_all(run, LINES)
    run.finish(75)
    other: list[Line] = [{"step": 3, "loss": 9.0}]
    run = store.start(history=LINES[:4])
    log_all(run, other)
    run.finish(0)
    assert store.series() == store.wanted(LINES[:4] + other)
    run = store.start()  # anew
    log_all(run, other)
    run.finish(0)
    assert store.series() == store.wanted(other)


@pytest.fixture
def in_mlflow(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.chdir(place)
    return Store("mlflow", tmp_path / "run", "sqlite:///mlflow.db")


def found_in_mlflow(store: Store) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(store.uri).get_run((store.folder / "mlflow_id").read_text())


def test_mlflow_is_told_how_a_run_has_ended(in_mlflow: Store) -> None:
    for code, status in ((75, "KILLED"), (1, "FAILED"), (0, "FINISHED")):
        in_mlflow.start().finish(code)
        assert found_in_mlflow(in_mlflow).info.status == status


def test_a_run_that_mlflow_no_longer_has_is_a_new_one_there(in_mlflow: Store) -> None:
    from mlflow import MlflowClient

    in_mlflow.start().finish(75)
    first = (in_mlflow.folder / "mlflow_id").read_text()
    MlflowClient(in_mlflow.uri).delete_run(first)
    for unknown in (first, "0" * 32):
        (in_mlflow.folder / "mlflow_id").write_text(unknown)
        run = in_mlflow.start(history=LINES)
        run.finish(0)
        assert (in_mlflow.folder / "mlflow_id").read_text() != unknown
        assert in_mlflow.series() == in_mlflow.wanted(LINES)


def test_the_runs_of_a_sweep_belong_together(
    in_mlflow: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    in_mlflow.start(sweep="a-sweep").finish(0)
    run = found_in_mlflow(in_mlflow)
    client = MlflowClient(in_mlflow.uri)
    assert client.get_experiment(run.info.experiment_id).name == "a-sweep"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    (in_mlflow.folder / "mlflow_id").unlink()
    in_mlflow.start(sweep="a-sweep").finish(0)
    run = found_in_mlflow(in_mlflow)
    assert client.get_experiment(run.info.experiment_id).name == "mine"
    assert run.data.tags["sweep"] == "a-sweep"
    other = Store("trackio", tmp_path / "run", "")
    other.start(sweep="a-sweep").finish(0)
    _, config = read.in_trackio(other.folder, tmp_path.name)
    assert config["_Group"] == "a-sweep"


def test_a_database_whose_making_is_cut_short_does_not_exist(
    in_mlflow: Store,
    tmp_path: Path,
    said: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlflow.store.db import utils

    def cut_short(engine: object) -> None:
        raise OSError("cut short")

    monkeypatch.setattr(utils, "_upgrade_db", cut_short)
    in_mlflow.uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    in_mlflow.start().finish(0)
    assert "cut short" in said()[0]
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.slow
def test_two_jobs_that_begin_at_once_share_a_new_database(tmp_path: Path) -> None:
    code = """
from mlflow import MlflowClient
from orpo_lab.tracker.mlflow import make_store
make_store("sqlite:///mlflow.db")
MlflowClient("sqlite:///mlflow.db").create_run("0")
"""
    jobs = [subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path) for _ in range(2)]
    assert [job.wait() for job in jobs] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


def test_a_tracker_that_cannot_begin_is_said_in_one_line(
    store: Store, tmp_path: Path, said: Callable[[], list[str]]
) -> None:
    store.folder.mkdir()
    (tmp_path / "broken.db").write_text("no database" * 1000)
    (store.folder / "tensorboard").write_text("no folder")
    store.uri = f"sqlite:///{tmp_path}/broken.db"
    # trackio reads TRACKIO_DIR once, and an earlier test of this process may have imported it
    trackio = Path(importlib.import_module("trackio.utils").TRACKIO_DIR)
    trackio.mkdir(parents=True, exist_ok=True)
    (trackio / f"{tmp_path.name}.db").write_text("no database" * 1000)
    run = store.start()
    log_all(run, LINES)
    run.log_results(SUMMARY, [], SAMPLES)
    run.finish(0)
    (line,) = said()
    assert line.startswith(f"{store.name}: ")
    assert "\n" not in line


def test_a_full_disk_costs_tensorboard_no_line_once_there_is_room_again(
    tmp_path: Path, said: Callable[[], list[str]]
) -> None:
    store = Store("tensorboard", tmp_path / "run", "")
    run = store.start()
    log_all(run, LINES[:1])
    wait_for(lambda: (store.folder / "tensorboard").is_dir() and store.series())
    (file,) = (store.folder / "tensorboard").iterdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 100, limits[1]))
    try:
        log_all(run, LINES[1:5])
        wait_for(said)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log_all(run, LINES[5:])
    run.finish(0)
    assert len(said()) == 1
    assert store.series() == store.wanted(LINES)


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture
def hanging_server() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_server_that_never_answers_delays_nothing(
    hanging_server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: Callable[[], list[str]],
) -> None:
    monkeypatch.setattr(background, "FINISH_SECONDS", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    begin = time.monotonic()
    run = Store("mlflow", tmp_path / "run", hanging_server).start()
    log_all(run, LINES * 100)
    run.finish(0)
    assert time.monotonic() - begin < 1.5
    assert said() == [
        "mlflow: not everything was taken within 0.5 s; the run goes on, its folder has everything"
    ]
    assert isinstance(run, Background)
    run._thread.join()  # it would write into the next test's log


class Moody:
    """Takes no line while it is ill."""

    where = "here"

    def __init__(self) -> None:
        self.is_ill = True
        self.lines: list[Line] = []
        self.calls: list[str] = []

    def log(self, lines: list[Line]) -> None:
        if self.is_ill:
            raise ConnectionError("no server at http://user:secretword@host")
        self.lines += lines

    def log_results(self, *parts: Any) -> None:
        raise ValueError("no artifacts")

    def finish(self, step: int, exit_code: int) -> None:
        self.calls.append(f"{step} {exit_code}")


def test_a_server_that_comes_back_gets_every_line(said: Callable[[], list[str]]) -> None:
    moody = Moody()
    run = Background("moody", lambda: moody, LINES[:2])
    log_all(run, LINES[2:4])
    wait_for(said)
    moody.is_ill = False
    log_all(run, LINES[4:])
    run.log_results(SUMMARY, [], [])
    run.finish(1)
    assert moody.lines == LINES
    assert moody.calls == ["4 1"]
    (line,) = said()
    assert "moody: ConnectionError: no server at http://***@host" in line


def test_a_package_that_is_missing_is_said_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorboard", "mlflow", "trackio"):
        settings = nowhere()
        setattr(settings, name, Store(name, tmp_path, "").settings())
        tracker.check(settings, folder=tmp_path, sweep=None)
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError) as error:
            tracker.check(settings, folder=tmp_path, sweep=None)
        assert str(error.value) == (
            f'tracker={name}: {name} is not installed: pip install -e ".[{name}]"'
        )


SHORT = (
    "optimizer=lora",
    "train.max_steps=6",
    "train.logging_steps=1",
    "train.eval_steps=3",
    "train.save_steps=2",
    "dataset.num_train=96",
    "dataset.num_eval=8",
    "dataset.num_generations=2",
)
OF_RESULTS = ("before.", "after.", "train.", "evaluation_seconds.")


@pytest.mark.slow
@pytest.mark.usefixtures("place")
def test_a_killed_run_goes_on_in_every_tracker_and_is_the_run_without_any(
    launch: Callable[..., Any], tmp_path: Path
) -> None:
    here = (*SHORT, "hydra.run.dir=run", "resume=auto")
    env = {"TRACKIO_DIR": os.environ["TRACKIO_DIR"]}
    launch(
        *here,
        "tracker=[wandb,tensorboard,mlflow,trackio]",
        env=env,
        # As line 7 is about to be written, of step 6; the newest checkpoint is of step 4
        prepare=partial(at_call, "orpo_lab.training.lines", "_finite", 7, die_once_tracked),
        expect=-9,
    )
    connections = tmp_path / "connections"
    done = launch(
        *here,
        "tracker=[tensorboard,mlflow,trackio]",
        env=env,
        prepare=partial(note_connections, str(connections)),
    )
    assert "resuming from step 4" in done.stdout
    assert done.stderr == ""
    assert not connections.exists(), connections.read_text()
    place, uri = tmp_path / "run", f"sqlite:///{tmp_path}/mlflow.db"
    lines = read.of_file(place)
    assert [step for step, _ in lines["loss"]] == [1, 2, 3, 4, 5, 6]
    found = {
        "tensorboard": read.of_tensorboard(place),
        "mlflow": read.of_mlflow(place, uri),
        "trackio": read.of_trackio(place, "orpo_lab"),
    }
    for name, series in found.items():
        kept = {key: series[key] for key in series if not key.startswith(OF_RESULTS)}
        wanted = read.as_float32(lines) if name == "tensorboard" else lines
        if name == "mlflow":
            # Two lines of a step have an epoch, and MLflow gets a figure of a step once
            wanted = {key: list(dict.fromkeys(points)) for key, points in lines.items()}
        assert kept == wanted, name
        assert series["after.preference_accuracy"][0][0] == 6, name
    launch(*SHORT, "hydra.run.dir=other", "tracker=none")
    untracked = read.of_file(tmp_path / "other")
    for name in ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second"):
        del untracked[name], lines[name]
    assert untracked == lines
    weights = [tmp_path / name / "final" / "adapter_model.safetensors" for name in ("run", "other")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
