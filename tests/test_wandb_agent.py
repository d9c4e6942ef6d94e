"""W&B's own sweeps: its real command line and agent, against a server of the tests."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from tests.wandb_server import SWEEP, WandbServer

SHORT = (
    "dataset.num_train=32",
    "dataset.num_eval=8",
    "dataset.num_generations=0",
    "train.max_steps=2",
    "train.batch_size=4",
    "train.logging_steps=1",
)


@pytest.fixture
def server() -> Iterator[WandbServer]:
    running = WandbServer()
    yield running
    running.die()


@pytest.mark.slow
def test_an_agent_starts_runs_with_the_sweeps_values(server: WandbServer, tmp_path: Path) -> None:
    example = yaml.safe_load((ROOT / "docs" / "wandb_sweep.yaml").read_text())
    example["program"] = str(ROOT / "launch.py")
    example["command"] += SHORT
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(example))
    values: list[dict[str, Any]] = [
        {"beta": 0.05, "beta_schedule": "cosine", "seed": 3},
        {"beta": 0.5, "seed": 1},
    ]
    server.commands = [
        {
            "type": "run",
            "run_id": f"given-{number}",
            "program": example["program"],
            "args": {key: {"value": value} for key, value in setting.items()},
        }
        for number, setting in enumerate(values)
    ]
    server.commands.append({"type": "exit"})
    env = {
        **os.environ,
        "WANDB_MODE": "online",
        "WANDB_BASE_URL": server.url,
        "WANDB_API_KEY": "0123456789" * 4,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    env.pop("WANDB_SILENT")
    for command in (
        ["wandb", "sweep", "sweep.yaml"],
        ["wandb", "agent", f"me/orpo_lab/{SWEEP}"],
    ):
        done = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert server.commands == []
    assert yaml.safe_load(server.sweeps[SWEEP]["config"])["parameters"] == example["parameters"]
    for number, setting in enumerate(values):
        run = server.runs[f"given-{number}"]
        assert run["exit_code"] == 0
        assert [line["_step"] for line in run["history"]][:2] == [1, 2]
        assert SWEEP in {upsert.get("sweep") for upsert in run["upserts"]}
        sent = json.loads(run["upserts"][0]["config"])
        assert {key: sent[key]["value"] for key in ("beta", "seed")} == {
            key: setting[key] for key in ("beta", "seed")
        }
    assert len(list((tmp_path / "outputs").iterdir())) == 2
