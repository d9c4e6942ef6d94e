"""From the seed to the report: a real sweep, whose every figure is computed again by hand.

Nothing of `orpo_lab.compare` is used: what the report says is read from its text, and compared with
what the runs' `scores.parquet` and `summary.json` hold. Batches do not divide the pairs, and fewer
prompts are answered than pairs are held out.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from faults import processes
from orpo_lab import tracker
from orpo_lab.config.tracker import NoTracker
from orpo_lab.sweep.folder import Sweep

BETAS, SEEDS = (0.05, 1.0), (3, 8)
NUM_EVAL, NUM_ANSWERED = 37, 23
SWEEP = (
    "-m",
    f"beta={','.join(map(str, BETAS))}",
    f"seed={','.join(map(str, SEEDS))}",
    "optimizer=lora",
    # So high that the seeds come to figures that differ
    "optimizer.learning_rate=3e-2",
    "dataset.num_train=70",
    f"dataset.num_eval={NUM_EVAL}",
    f"dataset.num_generations={NUM_ANSWERED}",
    "train.batch_size=12",
    "train.max_steps=8",
    "train.logging_steps=4",
    "tracker=none",
    "hydra.sweep.dir=sweep",
)

Row = dict[str, str]

# A sweep of four runs; what each part does is held by quick tests of its own
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, _server: None) -> Path:
    """The folder of a sweep over two settings and two seeds."""
    folder = tmp_path_factory.mktemp("seed_to_report")
    done = processes.start(folder / "said", list(SWEEP), at=folder).wait()
    assert done.code == 0, done.stdout + done.stderr
    (folder / "said.txt").write_text(done.stdout)
    return folder / "sweep"


def tables(report: str) -> list[list[Row]]:
    """Return the rows of every table of a Markdown page."""
    found = []
    for table in re.findall(r"(?:^\|.*\|\n)+", report, flags=re.MULTILINE):
        head, _, *rows = [
            [cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()
        ]
        found.append([dict(zip(head, row, strict=True)) for row in rows])
    return found


class Folder:
    """What one run has left, read without the lab."""

    def __init__(self, path: Path) -> None:
        self.path = path
        config = yaml.safe_load((path / "config.yaml").read_text())
        self.beta, self.seed = config["beta"], config["seed"]
        self.summary = json.loads((path / "summary.json").read_text())
        rows = pq.read_table(path / "scores.parquet").to_pylist()
        self.before, self.after = (
            [row for row in rows if row["when"] == when] for when in ("before", "after")
        )

    def figures(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Return the held-out figures that rows of `scores.parquet` come to."""
        answered = [row for row in rows if row["generated_tokens"] is not None]
        tokens = sum(row["chosen_tokens"] for row in rows)
        return {
            "preference_accuracy": mean(row["chosen_logp"] > row["rejected_logp"] for row in rows),
            "length_guess_accuracy": mean(row["length_guess"] for row in rows),
            "chosen_nll": -sum(row["chosen_logp"] * row["chosen_tokens"] for row in rows) / tokens,
            "exact_match": mean(row["correct"] for row in answered),
            "generated_tokens": mean(row["generated_tokens"] for row in answered),
            "repetition": mean(row["repetition"] for row in answered),
        }


@pytest.fixture(scope="module")
def runs(sweep: Path) -> list[Folder]:
    return [Folder(file.parent) for file in sorted(sweep.glob("*/scores.parquet"))]


def interval(cell: str) -> tuple[float, float, float]:
    """Return estimate, low and high of `0.800 [0.700, 0.900]`."""
    estimate, low, high = map(float, re.findall(r"-?\d+\.\d+", cell))
    return estimate, low, high


def of_beta(runs: list[Folder], beta: float) -> Iterator[Folder]:
    return (run for run in runs if run.beta == beta)


def test_every_setting_has_the_means_of_its_runs(sweep: Path, runs: list[Folder]) -> None:
    (*settings, untrained, guess), _ = tables((sweep / "report.md").read_text())
    assert [row["setting"] for row in settings] == ["beta=0.05", "beta=1"]
    right = runs[0].figures(runs[0].after)["length_guess_accuracy"]
    assert float(guess["preference_accuracy"].split()[0]) == pytest.approx(right, abs=5.1e-4)
    before = runs[0].figures(runs[0].before)
    for key in ("preference_accuracy", "exact_match", "chosen_nll", "generated_tokens"):
        assert float(untrained[key].split()[0]) == pytest.approx(before[key], abs=5.1e-4), key
    for row, beta in zip(settings, BETAS, strict=True):
        assert row["seeds"] == "2"
        figures = [run.figures(run.after) for run in of_beta(runs, beta)]
        means = {key: mean(values[key] for values in figures) for key in figures[0]}
        for key in ("chosen_nll", "generated_tokens", "repetition"):
            assert float(row[key]) == pytest.approx(means[key], abs=5.1e-4), key
        for key in ("preference_accuracy", "exact_match"):
            estimate, low, high = interval(row[key])
            assert estimate == pytest.approx(means[key], abs=5.1e-4), key
            assert 0 <= low <= estimate <= high <= 1
            assert low < high, key


def test_every_run_has_its_own_figures_and_cost(sweep: Path, runs: list[Folder]) -> None:
    _, rows = tables((sweep / "report.md").read_text())
    by_name = {row["run"]: row for row in rows}
    assert by_name.keys() == {run.path.name for run in runs}
    for run in runs:
        row = by_name[run.path.name]
        assert (row["seed"], row["state"]) == (str(run.seed), "finished")
        figures = run.figures(run.after)
        for key in ("preference_accuracy", "exact_match", "chosen_nll"):
            assert float(row[key]) == pytest.approx(figures[key], abs=5.1e-4), key
        train, measured = run.summary["train"], run.summary["evaluation_seconds"]
        seconds = train["wall_seconds"] + measured["before"] + measured["after"]
        assert float(row["wall time (s)"]) == pytest.approx(seconds, abs=0.051)
        tokens = train["tokens_per_second"] * train["wall_seconds"]
        assert float(row["tokens"]) == pytest.approx(tokens, abs=0.51)
        memory = train["peak_memory_bytes"] / 1e9
        assert float(row["peak memory (GB)"]) == pytest.approx(memory, abs=5.1e-3)
        assert row["GPU-hours"] == "0"


def test_the_closing_table_has_every_runs_figures(sweep: Path, runs: list[Folder]) -> None:
    said = sweep.with_name("said.txt").read_text()
    for run in runs:
        (line,) = re.findall(rf"^{re.escape(run.path.name)} +finished +(.*)$", said, re.MULTILINE)
        found = {name: float(value) for name, value in re.findall(r"(\w+) (\d\.\d+)", line)}
        figures = run.figures(run.after)
        assert found.keys() == {
            "preference_accuracy",
            "length_guess_accuracy",
            "exact_match",
            "chosen_nll",
        }
        assert found == pytest.approx({key: figures[key] for key in found}, abs=5.1e-4)


def test_the_tracker_gets_the_comparison(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published: list[tuple[Any, ...]] = []
    monkeypatch.setattr(tracker, "publish_comparison", lambda *parts: published.append(parts))
    folder = shutil.copytree(sweep, tmp_path / "sweep")
    assert Sweep(folder).close(NoTracker()) == []
    ((settings, where, verdict, rows),) = published
    assert (settings, where) == (NoTracker(), folder)
    report = (sweep / "report.md").read_text()
    assert rows == tables(report)[0]
    assert all(line in report for line in verdict)


def test_the_page_says_what_the_text_says(sweep: Path) -> None:
    page = (sweep / "report.html").read_text()
    for table in tables((sweep / "report.md").read_text()):
        for row in table:
            assert all(cell in page for cell in row.values()), row
    for name in ("report.md", "report.html"):
        assert f"On {NUM_EVAL} held-out pairs" in (sweep / name).read_text()


def test_summaries_are_what_the_scores_come_to(runs: list[Folder]) -> None:
    for run in runs:
        for when, rows in (("before", run.before), ("after", run.after)):
            assert [row["pair"] for row in rows] == list(range(NUM_EVAL))
            answered = [row["pair"] for row in rows if row["generated_tokens"] is not None]
            assert answered == list(range(NUM_ANSWERED))
            said = run.summary[when]
            assert said["num_pairs"] == NUM_EVAL
            assert said["num_generations"] == NUM_ANSWERED
            for key, value in run.figures(rows).items():
                assert said[key] == pytest.approx(value, rel=1e-5), (when, key)


def test_settings_share_the_untrained_model_and_no_two_runs_are_the_same(
    runs: list[Folder],
) -> None:
    names = [f"beta={beta},seed={seed}" for beta in BETAS for seed in SEEDS]
    assert [run.path.name for run in runs] == [f"{i}-{name}" for i, name in enumerate(names)]
    assert [(run.beta, run.seed) for run in runs] == [(b, s) for b in BETAS for s in SEEDS]
    assert all(run.before == runs[0].before for run in runs)
    trained = [[row["chosen_logp"] for row in run.after] for run in runs]
    assert all(logps != other for i, logps in enumerate(trained) for other in trained[:i])
