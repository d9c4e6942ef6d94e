"""The search with Optuna: spaces, and real trials that finish, fall behind, fail and go on."""

import subprocess
import sys
from pathlib import Path

import pytest

from orpo_lab.compare.read import find_runs
from orpo_lab.errors import UserError
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.sweep import search
from tests.conftest import ROOT

SHORT = ("dataset.num_eval=16", "dataset.num_generations=4", "tracker=none")


def run(folder: Path, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "orpo_lab", "search", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=600,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def test_what_is_a_range_or_a_list_is_searched_within_it() -> None:
    import optuna

    fixed, searched = search.parse(
        ["seed=1", "beta=tag(log,interval(0.02,1))", "optimizer.r=int(interval(2,16))", "a=x,y"]
    )
    assert fixed == ["seed=1"]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    betas = []
    for _ in range(200):
        chosen = dict(override.split("=") for override in search.suggest(study.ask(), searched))
        betas.append(float(chosen["beta"]))
        assert int(chosen["optimizer.r"]) in range(2, 17)
        assert chosen["a"] in ("x", "y")
    assert 0.02 <= min(betas) < max(betas) <= 1
    assert sum(beta < 0.02**0.5 for beta in betas) == pytest.approx(100, abs=25), "log-uniform"


@pytest.mark.parametrize("overrides", [["beta=0.1"], []])
def test_nothing_to_search_is_refused(overrides: list[str]) -> None:
    with pytest.raises(UserError, match="say what to search"):
        search.parse(overrides)


def test_a_search_over_secrets_is_refused() -> None:
    with pytest.raises(UserError, match="name is searched over what looks like secrets") as error:
        search.parse(["beta=0.1,0.2", f"name=hf_{'a' * 34},b"])
    assert "hf_" not in str(error.value)


def test_a_misspelt_override_is_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, "study", "beta=interval(0.1", expect=1)
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("error: ")


def test_where_every_trial_fails_so_does_the_search(tmp_path: Path) -> None:
    done = run(tmp_path, "--num-trials", "1", "srch/a b(1)", "beta=-1,-2", *SHORT, expect=1)
    assert "every trial failed; the last one: srch/a b(1)/0 failed: beta=-" in done.stderr


# In place of a real run: a run of no time, which is better the higher beta is, and costs quality
INSTANT = """
import json, pathlib, sys

given = dict(one.split("=", 1) for one in sys.argv[1:])
folder, beta = pathlib.Path(given["hydra.run.dir"]), float(given["beta"])
folder.mkdir(parents=True)
if beta > 1:
    sys.exit("error: it diverges")
before = {"preference_accuracy": 0.75, "exact_match": 0.5}
after = {"preference_accuracy": 0.5 + beta / 2, "exact_match": 0.5 if beta < 0.5 else 0.25}
summary = {"before": before, "after": after, "given": given}
(folder / "summary.json").write_text(json.dumps(summary))
"""


def test_the_best_trial_has_the_highest_accuracy_of_those_of_good_quality(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "instant.py").write_text(INSTANT)
    monkeypatch.setattr(search, "TRAIN", (sys.executable, str(tmp_path / "instant.py")))
    folder, overrides = tmp_path / "study", ["seed=5", "beta=0.125,0.25,0.75,2"]
    study = search.search(folder, 10, overrides)
    values = {float(trial.params["beta"]): trial.value for trial in study.trials}
    assert values == {0.125: 0.5625, 0.25: 0.625, 0.75: 0.875, 2.0: None}
    assert study.best_trial.params == {"beta": "0.25"}
    given = RunFolder(folder / "0").read_json("summary.json")["given"]
    assert given["seed"] == "5"
    assert len(study.trials) == 10, "also those that failed"
    assert len(search.search(folder, 11, overrides).trials) == 11
    assert "trial 10: beta=" in capsys.readouterr().out.splitlines()[-2]


def test_a_quality_falls_short_by_what_it_is_worse_beyond_its_margin() -> None:
    before = {"chosen_nll": 1.0, "repetition": 0.25}
    after = {"chosen_nll": 1.5, "repetition": 0.125}
    found = search._shortfalls(before, after)
    assert found == pytest.approx({"chosen_nll": 0.47, "repetition": -0.175})
    checked = search._shortfalls({"exact_match": 0.5}, after | {"exact_match": 0.25})
    assert checked == pytest.approx({"exact_match": 0.22})


def test_a_trial_is_judged_by_its_evaluations_meanwhile(tmp_path: Path) -> None:
    place = RunFolder(tmp_path)
    place.append_metrics(5, {"preference_accuracy": 0.9})
    place.append_metrics(5, {"eval_preference_accuracy": 0.6})
    assert search._evaluations(place) == [(5, 0.6)]


@pytest.mark.slow
def test_trials_finish_fail_and_go_on_in_their_folder(tmp_path: Path) -> None:
    arguments = ["study", "optimizer.learning_rate=1e-3,1e30", "train.max_steps=2", *SHORT]
    first = run(tmp_path, "--num-trials", "4", *arguments)
    states = {path.name: RunFolder(path).status() for path in (tmp_path / "study").glob("[0-9]")}
    assert {status["state"] for status in states.values()} == {"finished", "failed"}
    assert "NonFiniteError" in first.stdout
    assert "Highest preference accuracy" in first.stdout
    assert "optimizer.learning_rate=0.001" in first.stdout.splitlines()[-2]
    second = run(tmp_path, "--num-trials", "5", *arguments)
    assert [line[:8] for line in second.stdout.splitlines() if line.startswith("trial")] == [
        "trial 4:"
    ]
    assert len(find_runs([tmp_path / "study"])) == 5


@pytest.mark.slow
@pytest.mark.long
def test_a_trial_that_falls_behind_is_stopped(tmp_path: Path) -> None:
    """With hardly any learning rate accuracy stays where it is, below the median of the others."""
    arguments = [*SHORT, "train.max_steps=10", "train.eval_steps=5", "dataset.num_train=480"]
    good = "optimizer.learning_rate=interval(1e-3,2e-3)"
    run(tmp_path, "study", "--num-trials", "5", *arguments, good)
    bad = [text for text in arguments if text != "train.max_steps=10"] + ["train.max_steps=3000"]
    done = run(
        tmp_path, "study", "--num-trials", "6", *bad, "optimizer.learning_rate=interval(1e-9,2e-9)"
    )
    assert "behind the median" in done.stdout
    status = RunFolder(tmp_path / "study" / "5").status()
    assert status["state"] == "stopped"
    assert status["reason"].startswith("pruned after step")
