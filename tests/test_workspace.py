"""The W&B workspace and the example for `wandb agent`, as far as a loopback server goes."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from orpo_lab import config
from orpo_lab.metrics import MARGINS, PREFERENCE
from orpo_lab.tracker import workspace
from tests.conftest import ROOT, compose_config
from tests.wandb_server import WandbServer

KEY = "local" + "0" * 35


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orpo_lab", "workspace", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), **environment}
    )


def test_the_saved_view_groups_by_beta_and_shows_only_metrics_that_compare(tmp_path: Path) -> None:
    server = WandbServer()
    environment = {"HOME": str(tmp_path), "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
    done = run(environment, "--project", "mine")
    server.die()
    assert done.returncode == 0, done.stderr
    assert "mine" in done.stdout
    (view,) = server.views
    assert (view["projectName"], view["entityName"]) == ("mine", "me")
    spec = json.dumps(json.loads(view["spec"]))
    for shown in ("after.preference_accuracy", "after.exact_match", "logp_margin", "nll_loss"):
        assert shown in spec
    assert "rewards/" not in spec
    grouping = re.search(r'"grouping": (\[.*?\])', spec)
    assert grouping is not None
    for key in ("road", "beta", "beta_schedule"):
        assert key in grouping.group(1)
    bars = re.findall(
        r'"summary_metrics\.(after\.\w+)"\], "vertical": \w+, "groupBy": "(.*?)"', spec
    )
    assert bars == [(f"after.{name}", "road.value") for name in (PREFERENCE, *MARGINS)]


@pytest.mark.slow
def test_a_dead_server_and_a_missing_key_are_one_line(tmp_path: Path) -> None:
    dead = {"HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": KEY}
    for environment in (dead, {"HOME": str(tmp_path)}):
        done = run(environment, "--entity", "me")
        assert done.returncode == 1
        assert done.stderr.strip().splitlines()[-1].startswith("error: W&B does not take")
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_what_an_agent_passes_on_is_a_configuration(schedule: str) -> None:
    example: dict[str, Any] = yaml.safe_load((ROOT / "docs" / "wandb_sweep.yaml").read_text())
    fixed = [argument for argument in example["command"] if "=" in argument]
    chosen = {"beta": 0.3, "beta_schedule": schedule, "seed": 1}
    assert chosen.keys() == example["parameters"].keys()
    loaded = config.load(compose_config(*fixed, *(f"{k}={v}" for k, v in chosen.items())))
    assert loaded.beta == 0.3


def test_the_charts_show_metrics_that_are_documented() -> None:
    text = (ROOT / "docs" / "reading_curves.md").read_text()
    for metric in (metric for metrics in workspace.CURVES.values() for metric in metrics):
        assert f"`{metric.removeprefix('eval_')}`" in text
