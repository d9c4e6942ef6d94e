"""The win rate of a judge's verdicts, and whether the judge can be believed."""

import random
import re
from dataclasses import astuple
from statistics import NormalDist, mean

import pytest
from scipy import stats

from benchmarks.judge import JUDGES, like_longer, summed_up
from orpo_lab.compare.verdict import CONFIDENCE
from orpo_lab.curate.question import Place
from orpo_lab.judge.win_rate import Judged, figures, interval, win_rate
from orpo_lab.metrics import JUDGED

A, B = Judged("first", "second"), Judged("second", "first")
TIE, BY_PLACE = Judged("tie", "tie"), Judged("first", "first")


@pytest.mark.parametrize(
    ("a_first", "b_first", "score", "lean"),
    [
        ("first", "second", 1.0, 0.0),
        ("second", "first", 0.0, 0.0),
        ("first", "first", 0.5, 1.0),
        ("second", "second", 0.5, -1.0),
        ("first", "tie", 0.75, 0.5),
        ("tie", "first", 0.25, 0.5),
        ("tie", "tie", 0.5, 0.0),
    ],
)
def test_a_prompts_score_is_the_mean_of_both_orders(
    a_first: Place, b_first: Place, score: float, lean: float
) -> None:
    judged = Judged(a_first, b_first)
    assert (judged.score, judged.lean) == (score, lean)
    assert judged.follows_place == (a_first == b_first != "tie")


def test_equal_answers_are_ties_and_what_cannot_be_read_does_not_count() -> None:
    unreadable = [Judged(None, "first"), Judged("first", None), Judged(None, None)]
    found = win_rate([A, A, TIE, *unreadable], num_equal=2, num_missing=3)
    assert found.win_rate.estimate == (1 + 1 + 0.5 + 2 * 0.5) / 5
    assert (found.num_prompts, found.num_equal, found.num_ties) == (5, 2, 1)
    assert (found.num_unreadable, found.num_missing) == (3, 3)
    said = found.sentences("a", "b", "m")[-1]
    assert "2 equal answers, a tie without a question; 3 unreadable, not counted; 3 without" in said
    with pytest.raises(ValueError, match="no prompt has two verdicts that can be read"):
        win_rate(unreadable)
    with pytest.raises(ValueError, match="no prompt has two verdicts that can be read"):
        win_rate([], num_equal=3, num_missing=1)
    alone = win_rate([], num_equal=4)
    assert alone.follows_place is alone.first_place_bias is alone.longer_wins is None


def test_the_interval_is_that_of_agresti_and_coull_for_scores_of_0_and_1() -> None:
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    for right, num in ((0, 5), (3, 7), (31, 90)):
        found = interval([1.0] * right + [0.0] * (num - right))
        centre = (right + z**2 / 2) / (num + z**2)
        reach = z * (centre * (1 - centre) / (num + z**2)) ** 0.5
        assert (found.low, found.high) == pytest.approx((max(0, centre - reach), centre + reach))
        # Its centre is Wilson's, and it holds Wilson's interval
        wilson = stats.binomtest(right, num).proportion_ci(CONFIDENCE, method="wilson")
        assert found.low <= wilson.low <= wilson.high <= found.high
        assert found.estimate == right / num


@pytest.mark.parametrize(
    ("name", "num", "most"),
    [("prompts differ, 0.7", 50, 0.95), ("half ties, 0.7", 30, 0.96)],
)
def test_the_interval_holds_the_true_win_rate_as_often_as_it_says(
    name: str, num: int, most: float
) -> None:
    draws, judge = random.Random(3), JUDGES[name]
    rates = [win_rate(judge.judged(draws) for _ in range(num)) for _ in range(300)]
    covered = summed_up(judge, rates)["covered"]
    # Three standard errors below the level; above it, half points make the interval wider
    assert CONFIDENCE - 3 * (CONFIDENCE * (1 - CONFIDENCE) / 300) ** 0.5 <= covered <= most


@pytest.mark.parametrize("place", ["first", "second"])
def test_a_judge_that_always_names_one_place_is_found_out(place: Place) -> None:
    found = win_rate([Judged(place, place)] * 12)
    assert not found.is_evidence
    assert found.win_rate.estimate == 0.5
    assert found.first_place_bias is not None
    assert found.first_place_bias.estimate == {"first": 1, "second": -1}[place]
    headline, bias, *_ = found.sentences("a", "b", "m")
    assert headline.startswith("The judge m tells nothing about a and b")
    assert "Its win rate is no evidence" in headline
    assert "wins" not in headline
    assert "In 100 % [82, 100] of the prompts the judge follows the place, not the answer" in bias


def test_a_judge_that_often_follows_the_place_may_still_tell_who_wins() -> None:
    found = win_rate([BY_PLACE] * 60 + [A] * 38 + [B] * 2)
    assert found.follows_place is not None
    assert found.follows_place.low > 0.5
    assert found.is_evidence
    assert found.winner == "A"
    # Those that are not decided by place cancel out
    assert not win_rate([BY_PLACE] * 60 + [A] * 20 + [B] * 20).is_evidence


def test_a_judge_that_is_hardly_heard_tells_nothing() -> None:
    heard = win_rate([A] * 40, num_equal=100, num_missing=10)
    assert heard.is_evidence
    for lost in (
        win_rate([A] * 39, num_equal=100, num_missing=11 - 1),
        win_rate([A] * 40 + [Judged(None, "first")] * 11, num_equal=100),
    ):
        assert not lost.is_evidence
        assert "tells nothing about a and b: 1" in lost.sentences("a", "b", "m")[0]


def test_noise_and_ties_are_no_preference_for_a_place() -> None:
    draws = random.Random(1)
    noisy = win_rate(JUDGES["noisy, no preference"].judged(draws) for _ in range(300))
    assert noisy.is_evidence
    assert noisy.winner is None
    assert "does not tell a and b apart" in noisy.sentences("a", "b", "m")[0]
    assert win_rate([TIE] * 50).is_evidence


def test_the_headline_names_who_is_shown_to_be_preferred() -> None:
    for judged, said in (([A] * 30 + [B] * 5, "prefers a to b"), ([B] * 30 + [A] * 5, "b to a")):
        headline = win_rate(judged).sentences("a", "b", "m")[0]
        assert said in headline
        assert "of 35 prompts (90 % intervals, over prompts)" in headline


def test_how_often_the_longer_answer_wins_is_over_answers_of_other_lengths() -> None:
    longer_wins = Judged("first", "second", a_longer_by=3)
    shorter_wins = Judged("first", "second", a_longer_by=-3)
    found = win_rate([longer_wins] * 3 + [shorter_wins] + [A] * 9)
    assert found.longer_wins is not None
    assert found.longer_wins.estimate == 3 / 4
    assert "The longer answer wins 75 %" in found.sentences("a", "b", "m")[2]


def test_a_judge_of_length_alone_prefers_neither_at_equal_length() -> None:
    draws = random.Random(5)
    lengths = [round(draws.gauss(80, 100)) for _ in range(200)]
    orders: tuple[tuple[Place, Place], ...] = (("second", "first"), ("first", "second"))
    found = win_rate(Judged(*orders[length > 0], length) for length in lengths)
    assert found.win_rate.low > 0.65
    assert found.length_controlled is not None
    assert found.length_controlled.low < 0.5 < found.length_controlled.high
    assert re.match(r"At equal length a would win \d\d % \[", found.sentences("a", "b", "m")[3])


@pytest.mark.parametrize("share", [0.5, 0.75])
def test_at_equal_length_the_interval_holds_the_share_as_often_as_it_says(share: float) -> None:
    draws = random.Random(6)
    found = [win_rate(like_longer(60, share, 2, 0.8, draws)).length_controlled for _ in range(120)]
    covered = mean(one is not None and one.low <= share <= one.high for one in found)
    assert CONFIDENCE - 3 * (CONFIDENCE * (1 - CONFIDENCE) / 120) ** 0.5 <= covered <= 0.99
    assert mean(one.estimate for one in found if one) == pytest.approx(share, abs=0.02)


def test_where_no_length_matters_the_rate_is_the_plain_one() -> None:
    alike = [Judged("first", "second", length) for length in (-9, 9)] * 30
    alike += [Judged("second", "first", length) for length in (-9, 9)] * 10
    found = win_rate(alike)
    assert found.length_controlled is not None
    plain, controlled = astuple(found.win_rate), astuple(found.length_controlled)
    assert controlled == pytest.approx(plain, abs=0.01)
    assert win_rate([A, A, B]).length_controlled is None


def test_a_side_that_wins_all_wins_at_equal_length_only_if_it_was_not_always_longer() -> None:
    always, sometimes = (
        win_rate([Judged("first", "second", length) for length in lengths]).length_controlled
        for lengths in (range(1, 41), range(-20, 21))
    )
    assert always is not None
    assert sometimes is not None
    assert always.low < 0.5 < sometimes.low < sometimes.estimate < 1


def test_the_figures_are_those_of_the_table_of_metrics() -> None:
    found = win_rate([A, A, B, Judged("first", "tie", a_longer_by=1)])
    said = figures(found, "m")
    names = {metric.name for metric in JUDGED}
    assert names <= said.keys()
    assert said["judge/model"] == "m"
    assert said["judge/win_rate"] == 2.75 / 4
    assert said["judge/win_rate_low"] == found.win_rate.low
    assert said["judge/first_place_bias"] == 0.5 / 4
    assert said["judge/is_evidence"] is True
    # What does not exist is not there
    assert "judge/longer_wins" not in figures(win_rate([A]), "m")
