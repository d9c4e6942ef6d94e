"""The statistics of a comparison, against planted truths and textbook formulas."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from benchmarks import verdict as verdict_benchmark
from benchmarks.verdict import (
    Situation,
    any_worse,
    bound,
    count,
    equal,
    likelihoods,
    ours,
    pairs_only,
    pooled,
    situations,
    sweeps,
)
from orpo_lab.compare.verdict import LEVEL, POWER, Array, Measure, Quality, decide, overoptimised

NUM_SWEEPS = 200


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict_benchmark, "NUM_SWEEPS", NUM_SWEEPS)


def at_most(share: float) -> float:
    """The share of NUM_SWEEPS that one event of this probability stays below, three deviations."""
    return share + 3 * (share * (1 - share) / NUM_SWEEPS) ** 0.5


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("8 equal, alike", marks=pytest.mark.slow),
        "2 equal, one noisy",
        "8 equal, one noisy",
        "2 lead equally, one noisy",
        "noisy with 2 seeds against 6",
        "98.0% right, 2 settings, 5 x 64",
    ],
)
def test_few_sweeps_name_a_winner_that_is_not_the_best(name: str) -> None:
    situation = situations()[name]
    rules = {"ours": ours, "pooled": pooled}
    counts = count(situation, rules)
    assert counts["ours_false"] <= at_most(LEVEL * (2 if situation.allowed > 0.1 else 1))
    if name != "8 equal, alike":
        assert counts["pooled_false"] > 0.1, "a rule that takes all to scatter alike"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", situations())
def test_no_situation_names_more_false_winners_than_promised(name: str) -> None:
    situation = situations()[name]
    assert count(situation)["ours_false"] <= at_most(situation.allowed)


@pytest.mark.slow
def test_an_interval_over_pairs_alone_names_false_winners() -> None:
    rng = np.random.default_rng(1)
    rules = {"ours": ours, "pairs_only": lambda accuracy: pairs_only(accuracy, rng)}
    counts = count(situations()["8 equal, alike"], rules)
    assert counts["pairs_only_false"] > 0.09
    assert counts["ours_false"] < 0.03


def test_a_planted_lead_is_found_by_five_seeds() -> None:
    alike = [0.2] * 8
    lead = equal(alike, 5, share=0.88, lead=0.08, num_leaders=1, best=0)
    counts = count(lead)
    assert counts["ours_best"] >= 0.8
    assert counts["ours_false"] <= LEVEL


@pytest.mark.parametrize("alone", [0, 1])
def test_a_setting_with_one_seed_neither_wins_nor_is_beaten(alone: int) -> None:
    scores = accuracies(0.9, 0.6).scores
    assert decide(Measure(scores, is_share=True), []).winner == 0
    fewer = [runs[:1] if number == alone else runs for number, runs in enumerate(scores)]
    verdict = decide(Measure(fewer, is_share=True), [])
    assert (verdict.winner, verdict.one_seed, verdict.unbeaten) == (None, [alone], [1])
    assert (verdict.seeds_needed, verdict.pairs_needed) == (None, None)
    assert np.isnan(verdict.accuracies[alone].low)


def test_one_pair_shows_nothing() -> None:
    measure = Measure([np.ones((3, 1)), np.zeros((3, 1))], is_share=True)
    assert decide(measure, [Quality("exact_match", "", measure, 0.03)]).winner is None
    assert np.isnan(measure.interval(0).low)


def test_settings_that_are_told_apart_are_not_asked_for_more_seeds() -> None:
    scores = accuracies(0.9, 0.6, 0.5).scores
    verdict = decide(Measure([*scores[:2], scores[2][:1]], is_share=True), [])
    assert (verdict.winner, verdict.unbeaten, verdict.nearest) == (None, [2], 1)
    assert (verdict.seeds_needed, verdict.pairs_needed) == (None, None)


@pytest.mark.slow
def test_no_rule_finds_a_small_lead_with_three_seeds_without_naming_one_of_two_equals() -> None:
    """Rules that know all but which setting leads: what ours misses is not there to be found."""
    rules = bound(0.85, 0.08, 3, 500)
    assert rules["mean_planted"] >= rules["second_planted"] > rules["tie_planted"]
    assert rules["second_tied"] > 0.25
    assert rules["tie_planted"] < 0.75


@pytest.mark.parametrize(("share", "num_pairs"), [(0.8, 500), (0.95, 32), (0.995, 100)])
def test_an_interval_of_a_share_covers_the_share_as_often_as_it_says(
    share: float, num_pairs: int
) -> None:
    held = 0
    for accuracy in sweeps(equal([0.2] * 8, share=share, num_pairs=num_pairs)):
        interval = Measure(accuracy, is_share=True).interval(0)
        held += interval.low <= share <= interval.high
    assert 0.85 - 0.045 <= held / NUM_SWEEPS <= 0.97 + 0.02


@pytest.mark.parametrize(
    "num_settings", [2, *(pytest.param(num, marks=pytest.mark.slow) for num in (8, 20))]
)
@pytest.mark.parametrize("num_noisy", [0, 1])
def test_few_sweeps_call_an_equal_setting_worse(num_settings: int, num_noisy: int) -> None:
    effects = np.where(np.arange(num_settings) < num_noisy, 0.4, 0.05)
    rng = np.random.default_rng(0)
    found = sum(any_worse(likelihoods(rng, effects, 3, 100)) for _ in range(NUM_SWEEPS))
    assert found / NUM_SWEEPS <= at_most(0.05)


def scores(rng: np.random.Generator, means: list[float], num_seeds: int, run: float) -> list[Array]:
    """Scores with effects of seed (`run`), of pair, and noise, on 50 pairs."""
    pairs = rng.standard_normal(50)
    return [
        mean
        + run * rng.standard_normal((num_seeds, 1))
        + pairs
        + 0.5 * rng.standard_normal(50)  # what a pair is worth to this setting
        + rng.standard_normal((num_seeds, 50))
        for mean in means
    ]


@pytest.mark.parametrize("run", [0.0, 0.1, 1.0])
def test_an_interval_covers_the_true_difference_as_often_as_it_says(run: float) -> None:
    rng = np.random.default_rng(0)
    num, covered = 1000, 0
    for _ in range(num):
        measure = Measure(scores(rng, [0.0, 0.3, 0.0], 3, run), is_share=False)
        interval = measure.difference(1, 0)
        covered += interval.low <= 0.3 <= interval.high
    promised = 1 - 2 * LEVEL * 3 / 4
    error = 3 * (promised * (1 - promised) / num) ** 0.5
    assert promised - error <= covered / num <= 0.99


def runs_alone(*settings: list[float]) -> Measure:
    """Runs whose seed moves all pairs alike, so that nothing but the runs' means tells anything."""
    return Measure([np.array(means)[:, None] + np.zeros(20) for means in settings], is_share=False)


# Freedom 2, 4 and 3; variances 0.01, 4 and 0.1743
APART = ([5.0, 5.1, 5.2], [0.0, 2.0, -2.0, 3.0, -1.0], [0.5, 0.9, 1.4, 0.55])


def by_hand(setting: list[float], other: list[float]) -> tuple[float, float]:
    """Welch's standard error and Satterthwaite's freedom, variances no lower than the pool's."""
    freedom = [len(runs) - 1 for runs in APART]
    pool = sum(df * np.var(runs, ddof=1) for df, runs in zip(freedom, APART, strict=True)) / 9
    parts = []
    for runs in (setting, other):
        own = np.var(runs, ddof=1)
        parts.append((max(own, pool) / len(runs), len(runs) - 1 if own > pool else 9))
    variance = sum(part for part, _ in parts)
    return float(variance**0.5), float(variance**2 / sum(part**2 / df for part, df in parts))


@pytest.mark.parametrize(("a", "b"), [(0, 1), (0, 2), (2, 1)])
def test_a_difference_is_welchs_with_variances_no_lower_than_the_pools(a: int, b: int) -> None:
    interval = runs_alone(*APART).difference(a, b)
    error, freedom = by_hand(APART[a], APART[b])
    gap = np.mean(APART[a]) - np.mean(APART[b])
    reach = stats.t.ppf(1 - LEVEL * 3 / 4, freedom) * error
    assert (interval.estimate, interval.low, interval.high) == pytest.approx(
        (gap, gap - reach, gap + reach), rel=1e-9
    )


@pytest.mark.parametrize("more", [0.0, 0.01])
def test_worse_is_by_the_studentized_range_of_all_settings(more: float) -> None:
    """A gap that just reaches the quantile, and one that just does not."""
    error, freedom = by_hand(APART[0], APART[1])
    needed = stats.studentized_range.ppf(1 - LEVEL, 3, freedom) / 2**0.5 * error
    gap = np.mean(APART[0]) - np.mean(APART[1])
    moved = [mean - gap + needed * (0.995 + more) for mean in APART[0]]
    measure = runs_alone(moved, *APART[1:])
    assert measure.is_above_in_all(0, 1) == (more > 0)
    assert measure.falls_short(1) == (more > 0)


@pytest.mark.parametrize(("third", "freedom"), [([0.0, 0.1, 0.2], 2 * 5), ([0.0, 1.0, 2.0], 2)])
def test_a_setting_takes_the_pools_variance_if_its_seeds_scatter_alike(
    third: list[float], freedom: int
) -> None:
    """Five settings of three seeds; one scatters a little more than the pool, or far more."""
    alike = [[0.0, 0.09, 0.18 + 0.001 * number] for number in range(4)]
    measure = runs_alone(third, *alike)
    assert measure.spread(0).freedom == pytest.approx(freedom)
    own = np.var(third, ddof=1) / 3
    assert (measure.spread(0).variance == pytest.approx(own)) == (freedom == 2)


def test_two_seeds_that_agree_have_the_pools_variance_and_their_own_freedom() -> None:
    measure = runs_alone([1.0, 1.0], [0.0, 0.1, 0.3], [0.0, 0.2, 0.5, 0.1])
    pool = (2 * np.var([0.0, 0.1, 0.3], ddof=1) + 3 * np.var([0.0, 0.2, 0.5, 0.1], ddof=1)) / 6
    assert measure.spread(0).variance == pytest.approx(pool / 2)
    assert measure.spread(0).freedom == pytest.approx(1)


def test_at_a_hundred_percent_two_pairs_prove_nothing() -> None:
    perfect = np.ones((3, 200))
    missed = perfect.copy()
    missed[:, [3, 90]] = 0
    measure = Measure([perfect, missed], is_share=True)
    assert decide(measure, []).winner is None
    interval = measure.interval(0)
    assert interval.low < 0.99
    assert interval.high == 1.0
    missed[:, ::20] = 0  # ten more
    assert decide(Measure([perfect, missed], is_share=True), []).winner == 0


def test_an_interval_of_shares_stays_between_0_and_1_and_holds_the_share() -> None:
    perfect = np.ones((2, 30))
    measure = Measure([perfect, perfect - np.eye(2, 30)], is_share=True)
    for number in range(2):
        interval = measure.interval(number)
        assert 0 < interval.low <= interval.estimate <= 1
        assert interval.high <= 1


def quality(values: list[float]) -> Quality:
    rng = np.random.default_rng(2)
    arrays = [value + 0.001 * rng.standard_normal((3, 40)) for value in values]
    return Quality("chosen_nll", "nats", Measure(arrays, is_share=False), 0.03, sign=-1)


def accuracies(*values: float) -> Measure:
    """Shares on 200 pairs, three seeds that differ by a pair."""
    arrays = []
    for value in values:
        rows = np.zeros((3, 200))
        for seed in range(3):
            rows[seed, : round(200 * value) + seed - 1] = 1
        arrays.append(rows)
    return Measure(arrays, is_share=True)


def test_the_highest_accuracy_wins_among_settings_of_good_quality() -> None:
    verdict = decide(accuracies(0.6, 0.8, 0.95), [quality([1.0, 0.99, 0.8])])
    assert verdict.winner == 1
    assert verdict.qualities[2].worse_in == ["chosen_nll"]


def test_quality_that_may_be_worse_wins_nothing_and_says_so() -> None:
    seeds = np.array([[-0.2], [0.0], [0.2]]) + np.zeros(40)
    noisy = Quality("chosen_nll", "nats", Measure([seeds, seeds - 0.1], is_share=False), 0.03)
    verdict = decide(accuracies(0.6, 0.8), [noisy])
    assert verdict.leader == 1
    assert verdict.winner is None
    assert verdict.qualities[1].doubtful_in == ["chosen_nll"]


def first_alone(measure: Measure) -> Measure:
    """The same without all seeds of the first setting but one."""
    first, *others = measure.scores
    return Measure([first[:1], *others], is_share=measure.is_share)


def test_a_setting_with_one_seed_does_not_win_where_all_others_are_out() -> None:
    better = [quality([1.2, 1.0, 0.8]), quality([1.2, 0.8, 1.0])]
    qualities = [replace(figure, measure=first_alone(figure.measure)) for figure in better]
    verdict = decide(first_alone(accuracies(0.9, 0.6, 0.5)), qualities)
    assert [bool(standing.worse_in) for standing in verdict.qualities] == [False, True, True]
    assert (verdict.winner, verdict.leader, verdict.one_seed) == (None, 0, [0])


def first_sweep(situation: Situation) -> Measure:
    return Measure(next(sweeps(situation)), is_share=True)


@pytest.mark.parametrize(("num_seeds", "num_pairs"), [(3, 500), (6, 150)])
def test_the_power_that_is_planned_with_is_that_of_sweeps(num_seeds: int, num_pairs: int) -> None:
    truth = equal([0.2] * 8, lead=0.08, num_leaders=1)
    known = first_sweep(replace(truth, num_seeds=[200] * 8, num_pairs=5000))
    planned = known.power(0, 1, np.full(8, num_seeds), num_pairs)
    there = replace(truth, num_seeds=[num_seeds] * 8, num_pairs=num_pairs)
    found = [Measure(accuracy, is_share=True).is_above(0, 1) for accuracy in sweeps(there)]
    assert 0.4 < planned < 0.9
    assert abs(np.mean(found) - planned) < 3 * (planned * (1 - planned) / NUM_SWEEPS) ** 0.5


def test_as_many_seeds_as_needed_have_the_power_and_one_fewer_has_not() -> None:
    measure = first_sweep(equal([0.2] * 3, lead=0.08, num_leaders=1))
    seeds = measure.seeds_needed(0, 1)
    assert seeds is not None
    assert seeds > 3
    fewer, enough = (measure.power(0, 1, np.full(3, num), 500) for num in (seeds - 1, seeds))
    assert fewer < POWER <= enough


def test_as_many_pairs_as_needed_have_the_power_and_one_fewer_has_not() -> None:
    measure = first_sweep(equal([0.05] * 3, 5, lead=0.06, num_leaders=1, num_pairs=100))
    pairs = measure.pairs_needed(0, 1)
    assert pairs is not None
    assert pairs > 100
    fewer, enough = (measure.power(0, 1, measure.num_seeds, num) for num in (pairs - 1, pairs))
    assert fewer < POWER <= enough


def test_pairs_do_not_replace_seeds() -> None:
    rng = np.random.default_rng(4)
    measure = Measure(scores(rng, [0.4, 0.0], 2, 1.0), is_share=False)
    assert measure.pairs_needed(0, 1) is None


def test_a_beta_that_buys_accuracy_with_quality_is_over_optimised() -> None:
    rising = accuracies(0.6, 0.7, 0.8, 0.9)
    assert overoptimised([0, 1, 2, 3], rising, quality([1.0, 1.0, 1.0, 0.9])) == 3
    assert overoptimised([0, 1, 2, 3], rising, quality([1.0, 1.0, 1.0, 1.0])) is None
    # What a higher beta gains in quality, a lower one has not lost
    assert overoptimised([0, 1, 2, 3], rising, quality([0.9, 0.9, 0.9, 1.0])) is None
    falling = accuracies(0.6, 0.7, 0.8, 0.7)
    assert overoptimised([0, 1, 2, 3], falling, quality([1.0, 1.0, 1.0, 0.9])) is None
