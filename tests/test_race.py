"""A race over seeds: who gets another one, what a look costs, and races killed and resumed."""

import functools
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from hydra._internal.utils import create_config_search_path
from hydra.core.utils import setup_globals
from hydra.types import RunMode
from scipy import stats

from benchmarks import verdict as benchmark
from benchmarks.verdict import MAX_SEEDS, MIN_SEEDS, race_situations, raced
from faults import processes
from orpo_lab import config
from orpo_lab.compare import verdict as rules
from orpo_lab.compare.race import next_step
from orpo_lab.compare.verdict import LEVEL, Array, Measure, Quality, decide, level_of_look
from orpo_lab.config.guard import CheckedLoader
from orpo_lab.errors import UserError
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.sweep.folder import Sweep
from orpo_lab.sweep.jobs import Jobs
from orpo_lab.sweep.race import Race, _look, entrants_of
from tests.conftest import ROOT, each_launcher
from tests.test_sweep import SHORT, SWEEP, checksums, states
from tests.test_verdict import at_most, runs_alone

Launch = Callable[..., subprocess.CompletedProcess[str]]

# What a look costs


@pytest.mark.parametrize(("shape", "power"), [(0.5, 0.0), (0.0, -0.5)])
def test_the_boundary_is_pococks_or_that_of_obrien_and_fleming_by_its_shape(
    monkeypatch: pytest.MonkeyPatch, shape: float, power: float
) -> None:
    monkeypatch.setattr(rules, "SHAPE", shape)
    for num in (2, 3, 5):
        needed = stats.norm.isf(level_of_look(0.03, np.array([num, num]), 5))
        assert needed == pytest.approx(stats.norm.isf(0.03) * (num / 5) ** power)


def test_two_settings_have_the_information_of_the_harmonic_mean_of_their_seeds() -> None:
    one, other = (level_of_look(0.03, np.array(seeds), 6) for seeds in ([2, 6], [3, 3]))
    assert one == pytest.approx(other)
    assert level_of_look(0.03, np.array([9, 9]), 6) == pytest.approx(0.03)


def test_an_early_look_shows_less_than_a_comparison_that_looks_once() -> None:
    runs = [[1.0, 1.1, 1.2], [0.0, 0.1, 0.2], [0.5, 0.6, 0.7], [0.4, 0.5, 0.6], [0.4, 0.5, 0.7]]
    runs.append([0.3, 0.5, 0.6])
    scores = runs_alone(*runs).scores
    once, early, last = (Measure(scores, is_share=False, max_seeds=most) for most in (None, 5, 3))
    assert early.difference(0, 1).low < once.difference(0, 1).low
    assert last.difference(0, 1) == once.difference(0, 1)
    assert early.level(0, 1, of_all=True) < LEVEL


# Who gets another seed


def step(*settings: list[float], max_seeds: int = 5, qualities: list[Quality] | None = None) -> Any:
    scores = runs_alone(*settings).scores
    measure = Measure(scores, is_share=False, max_seeds=max_seeds)
    verdict = decide(measure, qualities or [])
    return next_step(verdict, [len(runs) for runs in settings], max_seeds)


def test_a_race_ends_with_a_winner() -> None:
    found = step([9.0, 9.1, 9.2], [1.0, 1.1, 1.2], [0.0, 0.1, 0.2])
    assert (found.more, found.reason) == ([], "a winner is shown")


def test_the_leader_and_the_nearest_rival_get_a_seed_and_the_far_one_waits() -> None:
    settings = [1.0, 1.4], [0.8, 1.1], [-2.0, -1.6], [-2.0, -1.7]
    assert step(*settings).more == [0, 1], "with two seeds no rival is beaten yet"
    assert step(*settings[:1], *settings[2:]).more == [0]


def test_what_waits_gets_a_seed_where_nothing_else_is_open() -> None:
    leader = [5.0, 5.1, 5.2, 5.1, 5.0]
    assert step(leader, [1.0, 1.1, 1.2], [0.0, 0.4]).more == [2]


def test_a_race_ends_where_all_that_is_open_has_all_seeds_or_no_hope() -> None:
    full = step([1.0, 1.4, 1.2], [0.7, 1.2, 1.0], max_seeds=3)
    assert (full.more, full.reason) == ([], "more than 3 seeds are needed")
    hopeless = step([1.0, 1.4, 1.2], [1.0, 1.4, 1.19])
    assert hopeless.more == []
    assert "hardly separate" in hopeless.reason
    assert "no other setting" in step([1.0, 1.4]).reason


def one_run_each(*means: float) -> list[Array]:
    """Runs of 20 pairs that scatter, since there is no other chance with one seed each."""
    pairs = np.linspace(-1, 1, 20)
    own = [np.roll(pairs, 7 * number) for number in range(len(means))]
    return [(mean + pair)[None] for mean, pair in zip(means, own, strict=True)]


def test_one_seed_each_ends_no_race_and_a_far_setting_waits() -> None:
    verdict = decide(Measure(one_run_each(1.0, 0.99, -9.0), is_share=False, max_seeds=5), [])
    assert next_step(verdict, [1, 1, 1], 5).more == [0, 1]


def test_one_run_whose_quality_is_in_doubt_waits() -> None:
    accuracy = Measure(one_run_each(9.0, 1.0, 0.99), is_share=False, max_seeds=5)
    figures = Measure(one_run_each(-5.0, 0.5, 0.5), is_share=False, max_seeds=5)
    quality = Quality("chosen_nll", "nats", figures, 0.05)
    assert next_step(decide(accuracy, []), [1, 1, 1], 5).more == [0]
    assert next_step(decide(accuracy, [quality]), [1, 1, 1], 5).more == [1, 2]


def test_a_doubt_in_the_leaders_quality_gives_a_seed_to_the_best_in_quality() -> None:
    figures = runs_alone([0.0, 0.5, -0.5], [0.2, 0.3, 0.2], [0.4, 0.1, 0.1]).scores
    quality = Quality("chosen_nll", "nats", Measure(figures, is_share=False, max_seeds=5), 0.05)
    settings = [9.0, 9.1, 9.2], [1.0, 1.1, 1.2], [0.0, 0.1, 0.2]
    assert step(*settings, qualities=[quality]).more == [0, 1]


# Simulated races


@pytest.fixture
def _races(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "NUM_SWEEPS", 100)


def run_race(accuracy: list[Array]) -> int | None:
    return raced(accuracy, MIN_SEEDS)[0]


@pytest.mark.usefixtures("_races")
def test_few_races_without_a_difference_name_a_winner() -> None:
    found = benchmark.count(race_situations()["2 equal, one noisy"], {"race": run_race})
    assert found["race_false"] <= 0.05 + 3 * (0.05 * 0.95 / 100) ** 0.5


def test_a_race_takes_fewer_runs_than_the_grid_and_names_the_leader() -> None:
    situation = race_situations()["8, one leads, in steps"]
    named = [raced(accuracy, MIN_SEEDS) for accuracy in benchmark.sweeps(situation, num_sweeps=15)]
    assert sum(winner == 0 for winner, _ in named) >= 11
    assert np.mean([num for _, num in named]) <= 0.7 * 8 * MAX_SEEDS


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", race_situations())
def test_races_keep_what_the_verdict_promises(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(benchmark, "NUM_SWEEPS", 200)
    situation = race_situations()[name]
    found = benchmark.count(situation, {"race": run_race})
    assert found["race_false"] <= at_most(situation.allowed)


# The sweeper


@functools.cache
def composed() -> tuple[CheckedLoader, Any]:
    """Hydra's loader, and the configuration of a sweep."""
    config.register()
    setup_globals()
    loader = CheckedLoader(create_config_search_path(str(ROOT / "conf")))
    return loader, loader.load_configuration("config", [], RunMode.MULTIRUN)


def sweeper_of(*jobs: list[str]) -> SimpleNamespace:
    """As much of Hydra's sweeper as the entrants are found by."""
    loader, of_sweep = composed()
    context = SimpleNamespace(config_loader=loader)
    return SimpleNamespace(config=of_sweep, hydra_context=context, overrides=[[*jobs]])


def test_seeds_are_drawn_from_the_list_given_or_count_up() -> None:
    listed = sweeper_of(["beta=0.1", "seed=7"], ["beta=0.1", "seed=3"])
    (entrant,) = entrants_of(listed, 3, 5)
    assert (entrant.seeds, entrant.num_seeds) == ([7, 3], 2)
    assert [job[-1] for job in entrant.jobs().values()] == ["seed=7", "seed=3"]
    forced = sweeper_of(["beta=0.1", "++seed=7"], ["beta=0.1", "++seed=3"])
    assert entrants_of(forced, 3, 5)[0].seeds == [7, 3]
    for overrides, first in ((["beta=0.1", "seed=7"], 7), (["beta=0.1"], 42)):
        (entrant,) = entrants_of(sweeper_of(overrides), 2, 3)
        assert (entrant.seeds, entrant.num_seeds) == ([first, first + 1, first + 2], 2)


def test_settings_that_come_to_the_same_are_one_and_what_cannot_be_is_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    same = ["beta=0.1", "beta_end=0"], ["beta=0.1", "beta_end=0.1"]
    entrants = entrants_of(sweeper_of(*same, ["beta=-1", "beta_end=0"]), 2, 3)
    assert [entrant.overrides for entrant in entrants] == [same[0]]
    assert re.match(r"error: beta=-1 beta_end=0: beta=-1", capsys.readouterr().err)
    with pytest.raises(UserError, match="seed=x is no whole number"):
        entrants_of(sweeper_of(["beta=0.1", "seed=x"]), 2, 3)


@pytest.mark.parametrize(
    ("least", "most", "hours", "said"),
    [
        (0, 5, None, "min_seeds=0 must be"),
        (1, 1, None, "max_seeds=1 must be"),
        ("two", 5, None, "min_seeds=two must be"),
        (4, 3, None, "min_seeds=4 must not be above hydra.sweeper.max_seeds=3"),
        (2, 3, 0, "max_hours=0 must be above 0"),
        (2, 3, "ten", "max_hours=ten must be above 0"),
    ],
)
def test_a_race_out_of_range_is_refused_by_the_name_of_its_key(
    least: Any, most: int, hours: Any, said: str
) -> None:
    keys = SimpleNamespace(min_seeds=least, max_seeds=most, max_hours=hours)
    with pytest.raises(UserError, match=f"hydra.sweeper.{said}"):
        Race._check(keys)  # type: ignore[arg-type]


def test_a_race_that_starts_no_job_leaves_no_folder(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "sweep")
    sweep.begin(accept_changes=False)
    Jobs(sweep=sweep).count([], ["error: beta=-1 must be a number of at least 0"])
    sweep.take_back()
    assert not sweep.folder.exists()


def test_a_race_that_goes_on_keeps_the_largest_number_of_seeds_it_had(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    sweep.begin(accept_changes=False)
    for most in (5, 3):
        sweep.note_race(most)
        sweep.begin(accept_changes=False)
    assert RunFolder(tmp_path).read_json("sweep.json")["max_seeds"] == 5


def test_a_race_whose_runs_have_all_failed_ends(capsys: pytest.CaptureFixture[str]) -> None:
    entrants = entrants_of(sweeper_of(["beta=0.1"]), 2, 3)
    assert _look(entrants, {}, 3, None) == []
    assert capsys.readouterr().out.endswith("the race ends: no run has finished\n")


# Real races


def test_a_race_without_the_flag_of_sweeps_is_refused(launch: Launch, tmp_path: Path) -> None:
    done = launch("hydra/sweeper=race", "tracker=none", expect=1)
    assert done.stderr == "error: hydra/sweeper=race decides on the jobs of a sweep; add -m\n"
    assert not list(tmp_path.glob("outputs/*"))


RATES = "optimizer.learning_rate=1e-6,1e-2"
RACE = ("-m", "hydra/sweeper=race", "hydra.sweeper.min_seeds=2", "hydra.sweeper.max_seeds=3", SWEEP)
LONGER = [*SHORT, "train.max_steps=8", "dataset.num_eval=64"][1:]


def looks(text: str) -> list[str]:
    """The looks of a race, as the race prints them."""
    return re.findall(r"^look (?:.*\n)(?:  .*\n)+", text, flags=re.MULTILINE)


@pytest.mark.slow
def test_a_race_that_was_killed_decides_the_same_and_runs_nothing_twice(
    launch: Launch, tmp_path: Path
) -> None:
    command = [*RACE, RATES, *LONGER]
    whole = launch(*command, "hydra.sweep.dir=whole")
    folder = tmp_path / "sweep"
    killed = processes.start(tmp_path / "said", command, at=tmp_path)
    killed.wait_for(lambda: bool(list(folder.glob("2-*/metrics.jsonl"))))
    killed.signal(signal.SIGKILL)
    assert killed.wait().code == -signal.SIGKILL
    finished = [job.path for job in Sweep(folder).jobs() if job.is_complete()]
    before = [checksums(path) for path in finished]
    assert len(before) == 2
    done = launch(*command)
    assert looks(done.stdout) == looks(whole.stdout)
    assert len(looks(done.stdout)) >= 2
    assert [checksums(path) for path in finished] == before
    ran = [
        {(values["optimizer"]["learning_rate"], values["seed"]) for values in of_race}
        for of_race in (configs(folder), configs(tmp_path / "whole"))
    ]
    assert ran[0] == ran[1]
    assert len(ran[0]) == len(list(Sweep(folder).jobs()))
    assert set(states(folder).values()) == {"finished"}


def configs(folder: Path) -> list[dict[str, Any]]:
    return [yaml.safe_load((job.path / "config.yaml").read_text()) for job in Sweep(folder).jobs()]


@pytest.mark.slow
@each_launcher(long=("submitit", "ray"))
def test_failed_runs_are_counted_and_neither_repeated_nor_replaced(
    launch: Launch, tmp_path: Path, launcher: list[str]
) -> None:
    rates = "optimizer.learning_rate=1e-3,1e30"
    done = launch(*RACE, *launcher, rates, *SHORT, expect=1, fresh=True)
    assert sorted(states(tmp_path / "sweep").values()) == ["failed"] * 2 + ["finished"] * 2
    assert "2 of them did not finish" in done.stdout
    assert "the race ends: no other setting is left" in done.stdout


@pytest.mark.slow
def test_runs_of_one_seed_share_data_order_and_adapters_across_beta_and_its_schedule(
    launch: Launch, tmp_path: Path
) -> None:
    launch("-m", "beta=0.1,0.5", "beta_schedule=constant,cosine", "seed=1,2", SWEEP, *SHORT)
    first: dict[int, set[tuple[float, float]]] = {}
    for job in Sweep(tmp_path / "sweep").jobs():
        seed = yaml.safe_load((job.path / "config.yaml").read_text())["seed"]
        line = job.metrics()[0]
        first.setdefault(seed, set()).add((line["logps/chosen"], line["logps/rejected"]))
    assert [len(each) for each in first.values()] == [1, 1]
    assert first[1] != first[2]
