"""Rules: which comparisons become pairs, and what each rule would keep."""

import math
from itertools import combinations_with_replacement
from typing import Any, get_args

import pytest

from orpo_lab.curate.rules import (
    ALL,
    DROPPED,
    RULES,
    Rule,
    chance_of_right,
    decide,
    opinions,
    outcomes,
)
from orpo_lab.curate.store import Choice
from orpo_lab.errors import UserError
from tests.curation import alternating, erring, vote, votes_of

CHOICES: tuple[Choice, ...] = get_args(Choice)
LETTERS: dict[str, Choice] = dict(zip("fstbk", CHOICES, strict=True))
# All that up to four annotators can say
ALL_SAID = [said for num in range(5) for said in combinations_with_replacement(CHOICES, num)]


@pytest.mark.parametrize(
    ("letters", "rule", "expected"),
    [
        ("ff", {}, "first"),
        ("ss", {}, "second"),
        ("ffs", {}, "first"),
        ("fst", {}, "even"),
        ("ft", {}, "no_majority"),
        ("f", {}, "too_few_votes"),
        ("fk", {}, "too_few_votes"),
        ("ffk", {}, "first"),
        ("tt", {}, "even"),
        ("bb", {}, "even"),
        ("", {}, "too_few_votes"),
        ("f", {"min_votes": 1}, "first"),
        ("ffs", {"min_votes": 4}, "too_few_votes"),
        ("ffs", {"majority": 0.7}, "no_majority"),
        ("ffs", {"majority": 1}, "no_majority"),
        ("ffs", {"margin": 2}, "even"),
        ("fffs", {"margin": 2}, "first"),
        ("fft", {"majority": 1}, "no_majority"),
        ("fft", {"majority": 1, "tie": "ignore"}, "first"),
        ("ft", {"tie": "ignore"}, "too_few_votes"),
        ("sbb", {}, "no_majority"),
        ("ssb", {"majority": 1, "both_bad": "ignore"}, "second"),
        ("sssb", {"both_bad": "veto"}, "both_bad"),
    ],
)
def test_a_rule_decides(letters: str, rule: dict[str, Any], expected: str) -> None:
    decision = decide([LETTERS[letter] for letter in letters], Rule(**rule))
    assert (decision.winner or decision.reason) == expected
    assert decision.winner is not None or decision.reason in DROPPED


def test_a_share_that_is_just_reached_is_a_majority() -> None:
    first, tie = CHOICES[0], CHOICES[2]
    choices = [first] * 7 + [tie] * 18
    assert decide(choices, Rule(majority=0.28)).winner == "first"
    assert decide(choices, Rule(majority=0.29)).winner is None


def test_a_decision_counts_what_it_rests_on() -> None:
    decision = decide(["second", "second", "first", "tie", "skip"], Rule(majority=0.5))
    assert (decision.num_for, decision.num_counted) == (2, 4)


@pytest.mark.parametrize("name", RULES)
def test_the_answers_are_treated_alike(name: str) -> None:
    other: dict[Choice, Choice] = {"first": "second", "second": "first"}
    for said in ALL_SAID:
        mirrored = decide([other.get(choice, choice) for choice in said], RULES[name])
        winner = decide(said, RULES[name]).winner
        assert mirrored.winner == (other[winner] if winner else None)


def test_a_rule_that_asks_for_more_keeps_no_other_comparisons() -> None:
    strict = [{"min_votes": 3}, {"majority": 0.8}, {"margin": 2}, {"both_bad": "veto"}]
    changes: list[dict[str, Any]] = strict  # type: ignore[assignment]
    for said in ALL_SAID:
        for change in changes:
            winner = decide(said, Rule(**change)).winner
            assert winner in (None, decide(said, Rule()).winner)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"min_votes": 0}, "--min-votes 0 must be at least 1"),
        ({"margin": 0}, "--margin 0 must be at least 1"),
        ({"majority": 1.5}, "--majority 1.5 must lie above 0"),
        ({"majority": 0}, "--majority 0 must lie above 0"),
    ],
)
def test_a_rule_out_of_range_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Rule(**change)


def test_a_person_counts_by_the_first_vote_and_not_by_a_skip() -> None:
    votes = [vote("0", "ann", "first"), vote("0", "ann", "second", round_=1)]
    votes += [vote("0", "bob", "skip"), vote("1", "bob", "second", round_=1)]
    assert opinions(votes) == {"0": {"ann": "first"}}


@pytest.mark.parametrize(
    ("both", "expected"),
    [
        (("first", "first"), "first"),
        (("first", "second"), "tie"),
        (("tie", "first"), "tie"),
        (("both_bad", "both_bad"), "both_bad"),
        (("first", "skip"), None),
        (("first",), None),
    ],
)
def test_a_judge_counts_once_both_orders_are_asked(
    both: tuple[Choice, ...], expected: Choice | None
) -> None:
    votes = [vote("0", "llm", choice, kind="judge", round_=n) for n, choice in enumerate(both)]
    assert opinions(votes, ALL).get("0", {}).get("llm") == expected
    assert opinions(votes) == {}


def test_an_outcome_counts_pairs_and_agreement() -> None:
    votes = votes_of({"ann": "ffs", "bob": "fst", "cid": "fft"})
    most, every = outcomes(votes, 0.25, {"most": Rule(), "all": Rule(majority=1)})
    # Comparisons 0 and 1 are kept, with leads of 3 and 1; 5 of their 6 votes are for the chosen one
    assert [most.num_kept, most.observed] == pytest.approx([2, 5 / 6])
    assert most.expected == pytest.approx((27 / 28 + 3 / 4) / 2)
    assert [every.num_kept, every.observed, every.expected] == pytest.approx([1, 1, 27 / 28])


@pytest.mark.parametrize("name", ["most of 2 votes or more", "all of 3 votes or more"])
def test_as_many_pairs_are_right_as_is_expected(name: str) -> None:
    better = alternating(3000)
    votes = erring(better, (0.2, 0.2, 0.2), seed=2)
    (found,) = outcomes(votes, 0.2, {name: RULES[name]})
    decisions = {key: decide(said.values(), RULES[name]) for key, said in opinions(votes).items()}
    right = [one.winner == better[int(key)] for key, one in decisions.items() if one.winner]
    assert len(right) == found.num_kept
    # Four standard errors
    tolerance = 4 * (found.expected * (1 - found.expected) / len(right)) ** 0.5
    assert sum(right) / len(right) == pytest.approx(found.expected, abs=tolerance)


def test_annotators_who_never_err_are_right_and_those_who_guess_are_half_the_time() -> None:
    assert (chance_of_right(1, 0.0), chance_of_right(3, 0.5)) == (1, 0.5)


def test_rules_about_judges_stand_only_where_a_judge_has_voted() -> None:
    votes = votes_of({"ann": "ff", "bob": ".s"})
    assert not any(outcome.rule.judges for outcome in outcomes(votes))
    judged = votes + [vote("0", "llm", "first", kind="judge", round_=n) for n in (0, 1)]
    kept = {outcome.rule.judges: outcome.num_kept for outcome in outcomes(judged)}
    assert kept[True] == 1
    assert {outcome.name for outcome in outcomes(judged)} == set(RULES)


def test_no_votes_have_no_agreement() -> None:
    for outcome in outcomes([]):
        assert outcome.num_kept == 0
        assert math.isnan(outcome.observed)
        assert outcome.as_json()["expected"] is None
