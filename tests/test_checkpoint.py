"""Checkpoints: sealed, verified, rotated; runs that were killed or stopped go on as if never."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from faults import inside, processes
from faults.processes import Done
from orpo_lab.errors import UserError
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.training import checkpoint
from orpo_lab.training.checkpoint import Made, Spent
from orpo_lab.training.files import Files
from orpo_lab.training.trainer import TrainStats
from tests.conftest import ROOT
from tests.test_run_folder import start

Launch = Callable[..., subprocess.CompletedProcess[str]]
SMALL = (
    "tracker=none",
    "dataset.num_train=64",
    "dataset.num_eval=8",
    "dataset.num_generations=2",
    "dataset.max_new_tokens=4",
    "train.batch_size=8",
    "train.logging_steps=1",
    "beta_schedule=linear",
)
GALORE = "optimizer=galore optimizer.update_proj_gap=3"


def signal_after(
    step: int, numbers: list[int], folder: Path, *overrides: str, pause: float = 0.02
) -> Done:
    """Start a run, send it signals once it has taken a step, and wait for its end.

    Between two signals are `pause` seconds.
    """
    said = folder.with_name(f"{folder.name}-said")
    running = processes.start(said, [*overrides, f"hydra.run.dir={folder}"])
    metrics = folder / "metrics.jsonl"
    running.wait_for(
        lambda: f'{{"step": {step},' in (metrics.read_text() if metrics.exists() else "")
    )
    for number in numbers:
        running.signal(number)
        time.sleep(pause)
    return running.wait()


def assert_same(folder: Path, other: Path) -> None:
    """Two runs came to the same: weights, held-out metrics and every line of metrics."""
    weights = [load_file(next((run / "final").glob("*.safetensors"))) for run in (folder, other)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    after = [json.loads((run / "summary.json").read_text())["after"] for run in (folder, other)]
    assert after[0] == after[1]
    assert (folder / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        "optimizer=qlora",
        "optimizer=lora",
        "optimizer=adamw",
        GALORE,
        f"{GALORE} optimizer.bits=8 optimizer.layerwise=true model.dtype=bf16",
        f"{GALORE} optimizer.bits=8",
        f"{GALORE} optimizer.implementation=galore_torch",
        "method=dpo optimizer=qlora",
        f"method=sft {GALORE}",
        "beta_schedule=adaptive optimizer=lora",
    ],
)
def test_a_killed_run_resumed_equals_an_uninterrupted_one_bit_for_bit(
    launch: Launch, tmp_path: Path, optimizer: str
) -> None:
    # Step 4 is in the middle of GaLore's periods of 3
    common = [*SMALL, *optimizer.split(), "train.max_steps=8", "train.save_steps=4"]
    launch(*common, "hydra.run.dir=whole")
    killed = signal_after(5, [signal.SIGKILL], tmp_path / "half", *common)
    assert killed.code == -signal.SIGKILL
    assert RunFolder(tmp_path / "half").status()["state"] == "running"
    done = launch(*common, "resume=half")
    assert "resuming from step" in done.stdout
    assert_same(tmp_path / "whole", tmp_path / "half")


@pytest.mark.slow
def test_a_signal_lets_the_step_end_and_saves(launch: Launch, tmp_path: Path) -> None:
    common = ["optimizer=lora", *SMALL, "train.max_steps=6"]
    launch(*common, "hydra.run.dir=whole")
    half = tmp_path / "half"
    for step, number in ((2, signal.SIGTERM), (4, signal.SIGINT)):
        sent = partial(inside.in_step, step, partial(inside.send, number))
        done = launch(*common, "hydra.run.dir=half", "resume=auto", prepare=sent, expect=75)
        assert done.stderr == f"stopped by {number.name}\n"
        assert [line["step"] for line in RunFolder(half).metrics()] == list(range(1, step + 1))
        status = RunFolder(half).status()
        assert (status["state"], status["exit_code"]) == ("stopped", 75)
        assert status["reason"] == number.name
        assert not (half / "final").exists()
    launch(*common, "hydra.run.dir=half", "resume=auto")
    assert_same(tmp_path / "whole", half)
    summary = json.loads((half / "summary.json").read_text())
    assert (summary["train"]["steps"], summary["changes"]) == (6, [{}, {}, {}])


@pytest.mark.slow
@pytest.mark.usefixtures("_server")
def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    # Steps of several seconds: within one second a second signal is the same request
    common = ["optimizer=lora", *SMALL, "train.max_steps=5000", "train.batch_size=800"]
    common.append("dataset.num_train=800")
    done = signal_after(1, [signal.SIGTERM] * 2, tmp_path / "run", *common, pause=1.2)
    assert (done.code, done.stderr) == (143, "stopped by SIGTERM, then SIGTERM\n")
    assert RunFolder(tmp_path / "run").status()["state"] == "stopped"


@pytest.mark.slow
def test_a_run_ends_when_its_time_is_up_and_goes_on_in_the_next_one(
    launch: Launch, tmp_path: Path
) -> None:
    common = ["optimizer=lora", *SMALL, "train.max_steps=4", "hydra.run.dir=run", "resume=auto"]
    for _ in range(4):
        done = launch(*common, "train.max_hours=1e-9", expect=75)
        assert "stopped by train.max_hours" in done.stderr
    assert [line["step"] for line in RunFolder(tmp_path / "run").metrics()] == [1, 2, 3, 4]
    launch(*common)
    assert (tmp_path / "run" / "final").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, _server: None) -> Path:
    """A finished run with checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("run")
    done = processes.start(folder / "said", [*RUN, f"hydra.run.dir={folder / 'run'}"]).wait()
    assert done.code == 0, done.stderr
    return folder / "run"


# Of a method whose checkpoints hold a reference
RUN = (
    "method=dpo",
    "optimizer=lora",
    *SMALL,
    "train.max_steps=6",
    "train.save_steps=2",
    "train.num_checkpoints=3",
)


def copy(finished: Path, tmp_path: Path) -> RunFolder:
    """The run, as it would be if it had been killed while it was evaluated."""
    place = RunFolder(tmp_path / "run")
    shutil.copytree(finished, place.path)
    for name in ("final", "plots"):
        shutil.rmtree(place.path / name)
    (place.path / "summary.json").unlink()
    place.set_status("running")
    return place


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["state.pt", "adapter_model.safetensors", "reference.pt"])
def test_a_damaged_checkpoint_is_rejected_and_the_one_before_it_is_taken(
    finished: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    place = copy(finished, tmp_path)
    newest = place.path / "checkpoints" / "checkpoint-6"
    for harm, said in {
        "flip": f"{name} is damaged",
        "cut": f"{name} is damaged",
        "unlink": f"{name} is missing",
    }.items():
        shutil.rmtree(newest)
        shutil.copytree(finished / "checkpoints" / "checkpoint-6", newest)
        if harm == "flip":
            flip(newest / name)
        elif harm == "cut":
            os.truncate(newest / name, 10)
        else:
            (newest / name).unlink()
        start = checkpoint.newest_valid(place, "")
        assert start is not None
        assert start.step == 4
        assert f"checkpoint-6 rejected: {said}" in caplog.text
        caplog.clear()


def test_what_else_makes_a_checkpoint_invalid(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = copy(finished, tmp_path)
    folders = place.path / "checkpoints"
    (folders / "checkpoint-6" / "manifest.json").write_text('{"step": 6')
    (folders / "checkpoint-4" / "manifest.json").unlink()
    shutil.copytree(folders / "checkpoint-2", folders / "checkpoint-8")
    (folders / "checkpoint-2" / "more.bin").write_text("not of it")
    assert checkpoint.newest_valid(place, "") is None
    for said in (
        "checkpoint-8 rejected: it is of step 2",
        "checkpoint-6 rejected: its manifest cannot be read",
        "checkpoint-4 rejected: it was never finished",
        "checkpoint-2 rejected: more.bin is not of it",
    ):
        assert said in caplog.text
    (folders / "checkpoint-2" / "more.bin").unlink()
    shutil.rmtree(folders / "checkpoint-8")
    segments = json.loads((place.path / "segments.json").read_text())
    place.write_json("segments.json", [segments[0] | {"config_hash": "another"}])
    assert checkpoint.newest_valid(place, "") is None
    assert "checkpoint-2 rejected: another run made it" in caplog.text


def test_rotation_counts_sealed_checkpoints_only(tmp_path: Path) -> None:
    place = RunFolder(tmp_path)
    place.append_metrics(1, {"loss": 1.0})
    for step in (1, 2, 3, 10):
        path = tmp_path / "checkpoints" / f"checkpoint-{step}"
        path.mkdir(parents=True)
        (path / "weights").write_text("w")
        if step != 10:  # killed while it was written
            checkpoint.seal(Files(path), place, Made("", "", ""), Spent())
    checkpoint.rotate(place, 2)
    assert [checkpoint.step_of(path) for path in checkpoint.folders(place)] == [2, 3, 10]


def test_a_figure_that_json_has_none_of_seals_no_checkpoint(tmp_path: Path) -> None:
    place, path = RunFolder(tmp_path), tmp_path / "checkpoints" / "checkpoint-1"
    place.append_metrics(1, {"loss": 1.0})
    path.mkdir(parents=True)
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.seal(Files(path), place, Made("", "", ""), Spent(wall_seconds=math.nan))
    assert not (path / "manifest.json").exists()


def begun(folder: Path, *config_hashes: str) -> RunFolder:
    """The folder of a run that has begun under these identities, and has a line of metrics."""
    place = RunFolder(folder)
    place.append_metrics(1, {"loss": 1.0})
    place.write_json("segments.json", [{"config_hash": digest} for digest in config_hashes])
    return place


def sealed(place: RunFolder, name: str, config_hash: str, **spent: int) -> Path:
    """Write a checkpoint, sealed."""
    path = place.file("checkpoints") / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "weights").write_text("w")
    (path / checkpoint.STATE).write_text("s")
    checkpoint.seal(Files(path), place, Made(config_hash, "", ""), Spent(**spent))
    return path


def test_the_newest_trained_model_of_this_configuration_goes_before_checkpoints(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = begun(tmp_path, "before", "now")
    for name, config_hash in (
        ("checkpoint-9", "before"),
        ("checkpoint-10", "now"),
        ("trained-9", "now"),
        ("trained-10", "now"),
        ("trained-11", "before"),
    ):
        sealed(place, name, config_hash)
    found = checkpoint.newest_valid(place, "now")
    assert found is not None
    assert found.path.name == "trained-10"
    assert (
        "trained-11 rejected: it is the end of the run as it was configured before" in caplog.text
    )
    checkpoint.remove_trained(place)
    found = checkpoint.newest_valid(place, "now")
    assert found is not None
    assert found.path.name == "checkpoint-10"


def test_a_trained_model_has_all_that_training_has_cost(tmp_path: Path) -> None:
    place, made = begun(tmp_path, "now"), Made("now", "data", "model")
    stats = TrainStats(
        steps=7,
        wall_seconds=3.5,
        tokens_per_second=1.0,
        pairs_per_second=2.0,
        peak_memory_bytes=11,
        skipped_steps=2,
        device="cpu",
        galore_memory_bytes=None,
        reference_seconds=4.5,
    )
    checkpoint.keep_trained(
        place, None, lambda files: files.folder.mkdir(parents=True), made, stats
    )
    found = checkpoint.newest_valid(place, "now")
    assert found is not None
    assert (found.step, found.made) == (7, made)
    expected = Spent(3.5, peak_memory_bytes=11, num_skipped=2, reference_seconds=4.5)
    assert found.spent == expected


def test_a_checkpoint_in_the_form_of_an_earlier_version_is_rejected_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = begun(tmp_path, "now")
    path = sealed(place, "checkpoint-3", "now")
    assert checkpoint.newest_valid(place, "now") is not None
    (path / checkpoint.STATE).rename(path / "optimizer.pt")
    checkpoint.seal(Files(path), place, Made("now", "", ""), Spent())
    assert checkpoint.newest_valid(place, "now") is None
    assert "checkpoint-3 rejected: an earlier version of orpo_lab wrote it" in caplog.text


def test_a_manifest_of_an_earlier_version_is_read_and_one_of_an_unknown_hash_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = begun(tmp_path, "now")
    path = sealed(place, "checkpoint-3", "now")
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    del manifest["hash"]
    for name in manifest["files"]:
        manifest["files"][name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    RunFolder(path).write_json(checkpoint.MANIFEST, manifest)
    assert checkpoint.newest_valid(place, "now") is not None
    RunFolder(path).write_json(checkpoint.MANIFEST, manifest | {"hash": "of tomorrow"})
    assert checkpoint.newest_valid(place, "now") is None
    assert "checkpoint-3 rejected: its manifest cannot be read ('of tomorrow')" in caplog.text
    RunFolder(path).write_json(checkpoint.MANIFEST, manifest)
    flip(path / checkpoint.STATE)
    assert checkpoint.newest_valid(place, "now") is None
    assert f"checkpoint-3 rejected: {checkpoint.STATE} is damaged" in caplog.text


def test_half_a_checkpoint_is_taken_away_and_said(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-3"

    def save() -> None:
        path.mkdir()
        (path / "weights").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="checkpoint-3 cannot be written"), checkpoint.written(path):
        save()
    assert not path.exists()


@pytest.mark.slow
def test_all_checkpoints_damaged_is_refused_or_begun_anew(
    finished: Path, tmp_path: Path, launch: Launch
) -> None:
    place = copy(finished, tmp_path)
    for path in checkpoint.folders(place):
        flip(path / "state.pt")
    refused = launch(*RUN, "resume=run", expect=1)
    assert refused.stderr.startswith("error: resume=run: no valid checkpoint in it")
    assert refused.stdout.count("rejected: state.pt is damaged") == 3
    launch(*RUN, "resume=auto", "hydra.run.dir=run")
    assert_same(finished, place.path)


def test_resuming_another_run_is_refused_with_the_difference(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = copy(finished, tmp_path)
    before = {path: path.read_bytes() for path in place.path.rglob("*") if path.is_file()}
    for changes, said in {
        ("beta=0.5",): "beta: 0.1 -> 0.5",
        ("beta_schedule=cosine",): "beta_schedule: linear -> cosine",
        ("train.max_steps=9",): "train.max_steps: 6 -> 9",
        ("optimizer=adamw", "accept_changes=true"): "optimizer: lora -> adamw",
        ("optimizer.r=4", "accept_changes=true"): "no checkpoint fits another optimizer.r",
    }.items():
        with pytest.raises(UserError) as refusal:
            start(*RUN, *changes, "resume=run")
        assert said in str(refusal.value)
        assert "\n" not in str(refusal.value)
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_that_cannot_be_gone_on_with_is_refused_in_one_line(
    tmp_path: Path, launch: Launch
) -> None:
    done = launch(*RUN, "resume=nowhere", expect=1)
    assert done.stderr.startswith("error: resume=nowhere is not a run folder")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "nowhere").exists()


def test_accepted_changes_take_effect_and_are_recorded(
    finished: Path, tmp_path: Path, launch: Launch
) -> None:
    place = copy(finished, tmp_path)
    shutil.rmtree(place.path / "checkpoints" / "checkpoint-6")
    changes = [
        "beta=0.5",
        "optimizer.learning_rate=1e-3",
        "train.lr_scheduler_type=constant",
        "train.max_steps=8",
        "train.save_steps=1",
    ]
    launch(*RUN, *changes, "resume=run", "accept_changes=true")
    recorded = json.loads((place.path / "summary.json").read_text())["changes"]
    assert recorded[0] == {}
    assert recorded[1]["beta"] == [0.1, 0.5]
    assert recorded[1]["train.max_steps"] == [6, 8]
    lines = place.metrics()
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [line["learning_rate"] for line in lines[4:]] == [1e-3] * 4
    # Linear from 0.5 to 0 over 8 steps, of which 4 were taken at another
    assert lines[4]["beta"] == pytest.approx(0.5 * (1 - 4 / 7))
    # The checkpoint's own intervals would have saved steps 6 and 8
    assert [checkpoint.step_of(path) for path in checkpoint.folders(place)] == [6, 7, 8]


@pytest.mark.slow
def test_a_base_model_or_data_that_changed_meanwhile_are_refused(
    tmp_path: Path, launch: Launch
) -> None:
    shutil.copytree(ROOT / "orpo_lab" / "tiny", tmp_path / "model")
    rows = [
        {"prompt": f"{i}?", "chosen": f" {i} is good", "rejected": f" {i} is bad"}
        for i in range(40)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [
        "optimizer=lora",
        "model=local",
        "model.path=model",
        "dataset=jsonl",
        "dataset.train_path=pairs.jsonl",
        "dataset.max_length=128",
        "dataset.max_prompt_length=64",
        "dataset.num_eval=4",
        "dataset.num_generations=0",
        "tracker=none",
        "train.batch_size=4",
        "train.max_steps=2",
        "hydra.run.dir=run",
        "resume=auto",
    ]
    launch(*common, "train.max_hours=1e-9", expect=75)
    rows[0]["chosen"] += "!"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = launch(*common, expect=1)
    assert "the pairs are not those" in done.stderr
    # The same things elsewhere
    shutil.move(tmp_path / "model", tmp_path / "moved")
    moved = [*common, "model.path=moved", "accept_changes=true"]
    weights = load_file(tmp_path / "moved" / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    from safetensors.torch import save_file

    whole = weights[name].clone()
    weights[name] += 1
    save_file(weights, tmp_path / "moved" / "model.safetensors", metadata={"format": "pt"})
    done = launch(*moved, expect=1)
    assert "the base model is not the one" in done.stderr
    weights[name] = whole
    save_file(weights, tmp_path / "moved" / "model.safetensors", metadata={"format": "pt"})
    launch(*moved)
    assert (tmp_path / "run" / "final").exists()


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(
    tmp_path: Path, launch: Launch
) -> None:
    """A limit on the size of files (EFBIG) stands for a full disk where none can be mounted."""
    common = [*RUN, "optimizer=adamw", "resume=auto"]
    command = [sys.executable, str(ROOT / "launch.py"), *common, f"hydra.run.dir={tmp_path}/run"]
    launch(*common, "hydra.run.dir=run", "train.max_hours=1e-9", expect=75)
    size = (tmp_path / "run" / "checkpoints" / "checkpoint-1" / "state.pt").stat().st_size
    limited = f"ulimit -f {size // 1024 - 1000}; exec " + " ".join(command)
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert "cannot be written" in done.stderr
    assert done.stderr.count("\n") == 1
    names = [folder.name for folder in checkpoint.folders(RunFolder(tmp_path / "run"))]
    assert names == ["checkpoint-1"]
    launch(*common, "hydra.run.dir=run")
    assert (tmp_path / "run" / "final").exists()


def test_two_processes_do_not_share_a_run_folder(tmp_path: Path, launch: Launch) -> None:
    with RunFolder(tmp_path / "run").held() as is_free:
        assert is_free
        done = launch(*RUN, "hydra.run.dir=run", expect=1)
    assert "another process is running in run" in done.stderr


def test_a_run_that_has_taken_its_last_step_takes_no_other(
    finished: Path, tmp_path: Path, launch: Launch
) -> None:
    place = copy(finished, tmp_path)
    os.truncate(place.path / "metrics.jsonl", 100)
    done = launch(*RUN, "resume=run")
    assert "resuming from step 6" in done.stdout
    assert_same(finished, place.path)
