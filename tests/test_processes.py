"""Several processes of one run: what each takes, what they exchange, and how they end."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks import processes as bench
from benchmarks.plan import own_config
from orpo_lab import api, config
from orpo_lab.errors import UserError
from orpo_lab.plan import several
from orpo_lab.plan.shapes import skeleton
from orpo_lab.records.run_folder import ReadOnlyRunFolder, RunFolder
from orpo_lab.training.devices import dealt
from orpo_lab.training.steps import check_dealt
from tests.conftest import ROOT

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
LONG = (
    *("train.max_steps=400", "train.save_steps=2", "optimizer=adamw"),
    # The length of a run does not change its first steps
    "train.lr_scheduler_type=constant",
)
TIMES = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Seconds after which a run counts as stuck
PATIENCE = 240


@pytest.mark.parametrize("num", [1, 2, 3, 8])
def test_pairs_are_dealt_by_their_tokens_each_once(num: int) -> None:
    sizes = [5, 90, 17, 3, 3, 61, 12, 44, 8, 30]
    hands = dealt(sizes, num)
    assert sorted(i for hand in hands for i in hand) == list(range(len(sizes)))
    assert all(hand == sorted(hand) != [] for hand in hands)
    tokens = [sum(sizes[i] for i in hand) for hand in hands]
    assert max(tokens) - min(tokens) <= max(sizes)


def test_pairs_without_tokens_are_dealt_too() -> None:
    assert dealt([0, 0, 0, 0], 4) == [[0], [1], [2], [3]]
    assert dealt([7], 3) == [[0], [], []]


@pytest.mark.parametrize(
    ("overrides", "num_held_out", "said"),
    [
        (["train.batch_size=3"], 400, "train.batch_size=3 is below the 4 processes"),
        ([], 3, r"the number of held-out pairs \(3\) is below the 4 processes"),
        (["engine=trl"], 400, "engine=trl trains in one process"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(
    load: Any, overrides: list[str], num_held_out: int, said: str
) -> None:
    loaded: config.Config = load(*overrides)
    check_dealt(loaded, num_held_out, 1)
    with pytest.raises(UserError, match=said):
        check_dealt(loaded, num_held_out, 4)


def test_a_process_that_reads_a_run_folder_changes_nothing_in_it(tmp_path: Path, load: Any) -> None:
    place, reader = RunFolder(tmp_path), ReadOnlyRunFolder(tmp_path)
    place.append_metrics(1, {"loss": 1.0})
    place.write_json("summary.json", {"a": 1})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    reader.begin(load(), {}, {"config_hash": "", "overrides": []})
    reader.append_metrics(2, {"loss": 2.0})
    reader.write_json("summary.json", {"a": 2})
    reader.set_status("failed")
    reader.remove("summary.json")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert reader.metrics() == [{"step": 1, "loss": 1.0}]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num"),
    [
        ("qlora", 2),
        ("galore", 2),
        pytest.param("galore layerwise 8 bits", 4, marks=pytest.mark.long),
        pytest.param("kto", 2, marks=pytest.mark.long),
    ],
)
def test_several_processes_train_what_one_trains(tmp_path: Path, name: str, num: int) -> None:
    for each in (1, num):
        bench.run(tmp_path / str(each), each, *bench.RUNS[name])
    assert bench.difference(tmp_path / "1", tmp_path / str(num)) < 1e-5
    alone, together = (
        json.loads((tmp_path / str(each) / "summary.json").read_text()) for each in (1, num)
    )
    assert together["train"]["num_processes"] == num
    for figure, value in alone["after"].items():
        if isinstance(value, float):
            assert together["after"][figure] == pytest.approx(value, abs=1e-4), figure
    lines = [RunFolder(tmp_path / str(each)).metrics() for each in (1, num)]
    for ours, theirs in zip(*lines, strict=True):
        assert ours.keys() == theirs.keys()
        # Without layerwise, several processes know only the norm of projected gradients
        differ = {"grad_norm"} if name == "galore" else set()
        for figure in ours.keys() - TIMES - differ:
            assert theirs[figure] == pytest.approx(ours[figure], rel=1e-4, abs=1e-5), figure
        if differ and "grad_norm" in ours:
            assert 0 < theirs["grad_norm"] <= ours["grad_norm"]
    if name != "kto":  # whose meter of preference averages more gradients
        given = sum(bench.sent(tmp_path / str(num))) / 10
        loaded = api.compose(*bench.SHORT, *bench.RUNS[name]).config
        model = skeleton(loaded, own_config(loaded), torch.float32)
        assert several.gradient_bytes(loaded, model, 10) == pytest.approx(given, rel=0.01)
    if name.startswith("galore"):
        check_bytes(tmp_path / str(num), rank=4)


def check_bytes(run: Path, rank: int) -> None:
    """Compare what a process gave away with the shapes of the weights.

    A projected gradient of a matrix [m, n], m <= n, has r / m of the gradient's bytes.
    """
    shapes = {name: list(weight.shape) for name, weight in bench.weights(run).items()}
    # In the model's order: layer by layer
    names = [name for name in shapes if name.endswith("_proj.weight")]
    names.sort(key=lambda name: (int(name.split(".")[2]), ORDER.index(name.split(".")[4])))
    projected = {name: shapes[name] for name in names}
    full = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
    low = sum(full[name] * rank / min(shape) for name, shape in projected.items())
    others = sum(size for name, size in full.items() if name not in projected)
    num_steps, gap = 10, 2
    # The first step takes every basis; of the later steps each takes the bases of its turn
    turns = sum(
        full[name]
        for place, name in enumerate(projected)
        for step in range(num_steps)
        if step == 0 or step % gap == place * gap // len(projected)
    )
    given = sum(bench.sent(run))
    assert given - turns - num_steps * others <= 1.2 * num_steps * low
    assert given >= num_steps * others


def start(place: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [*TORCHRUN, str(ROOT / "launch.py"), *bench.SHORT, *LONG, *overrides]
    return subprocess.Popen(
        [*command, f"hydra.run.dir={place}"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_checkpoint(run: subprocess.Popen[str], place: Path) -> None:
    until = time.monotonic() + PATIENCE
    while not list(place.glob("checkpoints/*/manifest.json")):
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "what",
    [
        "a process is killed",
        pytest.param("the launcher is asked to stop", marks=pytest.mark.long),
    ],
)
def test_a_run_that_ends_early_goes_on_in_one_process(tmp_path: Path, what: str) -> None:
    place = tmp_path / "run"
    run = start(place)
    wait_for_checkpoint(run, place)
    if what == "a process is killed":
        workers = psutil.Process(run.pid).children()
        ranks = {process.environ()["RANK"]: process for process in workers}
        ranks["1"].send_signal(signal.SIGKILL)
    else:
        run.send_signal(signal.SIGTERM)
    said, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode, said
    status = RunFolder(place).status()
    assert status["state"] in ("failed", "stopped"), said
    if what == "the launcher is asked to stop":
        assert (status["state"], status["reason"]) == ("stopped", "SIGTERM"), said
    steps = max(line["step"] for line in RunFolder(place).metrics())
    last = f"train.max_steps={steps + 4}"
    bench.run(place, 1, *LONG, last, "resume=auto", "accept_changes=true")
    bench.run(tmp_path / "whole", 1, *LONG, last)
    assert bench.difference(tmp_path / "whole", place) < 1e-5
