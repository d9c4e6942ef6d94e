"""The statistics of a comparison, against planted truths and textbook formulas."""

import numpy as np
import pytest
from scipy import stats

from benchmarks.verdict import NUM_SWEEPS, bound, count
from orpo_lab.verdict import LEVEL, Array, Measure, Quality, decide, overoptimised


@pytest.mark.parametrize("num_seeds", [1, 2, 3])
def test_without_a_difference_a_winner_is_named_in_few_sweeps_and_never_with_one_seed(
    num_seeds: int,
) -> None:
    named = count(0.85, 0.0, num_seeds, 200)["ours_named"]
    assert named <= (17 if num_seeds > 1 else 0)


@pytest.mark.slow
def test_an_interval_over_pairs_alone_names_false_winners() -> None:
    counts = count(0.85, 0.0, 3, 500, bootstrap=True)
    assert counts["pairs_only_named"] > 0.09 * NUM_SWEEPS
    assert counts["pairs_only_corrected_named"] > 0.09 * NUM_SWEEPS
    assert counts["ours_named"] < 0.03 * NUM_SWEEPS


@pytest.mark.parametrize(
    ("base", "lead", "num_pairs"), [(0.85, 0.1, 200), (0.88, 0.1, 200), (0.88, 0.08, 500)]
)
def test_a_planted_lead_is_found(base: float, lead: float, num_pairs: int) -> None:
    counts = count(base, lead, 3, num_pairs)
    assert counts["ours_planted"] >= 0.8 * NUM_SWEEPS
    assert counts["ours_named"] - counts["ours_planted"] <= LEVEL * NUM_SWEEPS


def test_where_two_settings_share_the_lead_either_is_named_about_as_often_as_the_level_says() -> (
    None
):
    named = count(0.85, 0.08, 3, 500, num_leaders=2)["ours_named"]
    error = 3 * (2 * LEVEL * (1 - 2 * LEVEL) * NUM_SWEEPS) ** 0.5
    assert named <= 2 * LEVEL * NUM_SWEEPS + error


@pytest.mark.slow
def test_no_rule_finds_a_small_lead_with_three_seeds_without_naming_one_of_two_equals() -> None:
    """Rules that know all but which setting leads: what ours misses is not there to be found."""
    rules = bound(0.85, 0.08, 3, 500)
    assert rules["mean_planted"] >= rules["second_planted"] > rules["tie_planted"]
    assert rules["second_tied"] > 0.25
    assert rules["tie_planted"] < 0.75


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
    error = 3 * (2 * LEVEL * (1 - 2 * LEVEL) / num) ** 0.5
    assert 1 - 2 * LEVEL - error <= covered / num <= 0.97


def test_with_one_pair_effect_only_the_interval_is_the_paired_t_interval_over_seeds() -> None:
    """Where a seed moves all pairs alike, what is left is the two-sample t-test over seeds."""
    rng = np.random.default_rng(1)
    runs = [rng.standard_normal((4, 1)) + np.zeros(20) for _ in range(2)]
    interval = Measure(runs, is_share=False).difference(1, 0)
    ours = (interval.low, interval.high)
    one, other = (run[:, 0] for run in runs)
    expected = stats.ttest_ind(other, one).confidence_interval(1 - 2 * LEVEL)
    assert ours == pytest.approx((expected.low, expected.high), rel=1e-9)


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


def test_seeds_needed_are_those_that_show_the_gap() -> None:
    """With as many seeds as it says, the planted gap is found about as often as the power says."""
    rng = np.random.default_rng(3)
    needed = [
        one
        for _ in range(100)
        if (one := Measure(scores(rng, [0.6, 0.0], 3, 0.3), is_share=False).seeds_needed(0, 1))
    ]
    typical = int(np.median(needed))
    found = sum(
        Measure(scores(rng, [0.6, 0.0], typical, 0.3), is_share=False).is_above(0, 1)
        for _ in range(300)
    )
    assert 0.65 < found / 300 < 0.95


def test_pairs_do_not_replace_seeds() -> None:
    rng = np.random.default_rng(4)
    measure = Measure(scores(rng, [0.4, 0.0], 2, 1.0), is_share=False)
    assert measure.pairs_needed(0, 1) is None


def test_a_beta_that_buys_accuracy_with_quality_is_over_optimised() -> None:
    rising = accuracies(0.6, 0.7, 0.8, 0.9)
    assert overoptimised([0, 1, 2, 3], rising, quality([1.0, 1.0, 1.0, 0.9])) == 3
    assert overoptimised([0, 1, 2, 3], rising, quality([1.0, 1.0, 1.0, 1.0])) is None
    falling = accuracies(0.6, 0.7, 0.8, 0.7)
    assert overoptimised([0, 1, 2, 3], falling, quality([1.0, 1.0, 1.0, 0.9])) is None
