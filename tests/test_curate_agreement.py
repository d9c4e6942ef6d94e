"""Agreement: alpha against its formula and published figures, and what error rates imply."""

import json
import math
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any, get_args

import pytest

from orpo_lab.curate import agreement
from orpo_lab.curate.agreement import (
    VALUES,
    Annotator,
    alpha,
    alpha_interval,
    implied_alpha,
    implied_error_rate,
    lines,
    measure,
)
from orpo_lab.curate.rules import opinions
from orpo_lab.curate.store import Choice
from orpo_lab.errors import UserError
from tests import curation
from tests.curation import alternating, comparisons, erring, vote, votes_of

RATES = (0.1, 0.2, 0.3)


def by_formula(units: Iterable[Sequence[str]]) -> float:
    """Alpha by the coincidences of values, in plain floats (Krippendorff 2011, section C)."""
    coincidences: dict[tuple[str, str], float] = defaultdict(float)
    for unit in units:
        for one, other in permutations(unit, 2):
            coincidences[one, other] += 1 / (len(unit) - 1)
    totals: dict[str, float] = defaultdict(float)
    for (one, _), num in coincidences.items():
        totals[one] += num
    n = sum(totals.values())
    observed = sum(num for (one, other), num in coincidences.items() if one != other)
    expected = sum(totals[one] * totals[other] for one, other in permutations(totals, 2))
    return 1 - (n - 1) * observed / expected


def said_of(table: Sequence[str]) -> list[dict[str, Any]]:
    """Opinions of observers, a line for each: a letter for each unit, and a dot for no value."""
    return [
        {str(observer): value for observer, value in enumerate(unit) if value != "."}
        for unit in zip(*table, strict=True)
    ]


@pytest.mark.parametrize(
    ("table", "published"),
    [
        (("0100000010", "1110010000"), 0.095),
        (("aabbdcccedda", "babbbccceddd"), 0.692),
        (("123321412...", "1233224125.3", ".3332342251.", "12332441251."), 0.743),
    ],
    ids=["A: two observers, binary", "B: two observers, nominal", "C: four, values missing"],
)
def test_alpha_is_that_of_published_examples(table: Sequence[str], published: float) -> None:
    values: Any = sorted({value for line in table for value in line} - {"."})
    assert alpha(said_of(table), values) == pytest.approx(published, abs=5e-4)


def test_alpha_is_its_formula() -> None:
    draws = random.Random(0)
    for _ in range(20):
        table = {name: "".join(draws.choices("ffsstb.k", k=12)) for name in "abcd"}
        said = opinions(votes_of(table))
        expected = by_formula([list(choices.values()) for choices in said.values()])
        assert alpha(said.values()) == pytest.approx(expected, abs=1e-12)


def test_chance_is_zero_and_perfect_agreement_one() -> None:
    assert alpha(opinions(votes_of({"a": "fstb", "b": "fstb"})).values()) == 1
    votes = erring(alternating(3000), (0.5, 0.5, 0.5), seed=0)
    assert alpha(opinions(votes).values()) == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize("table", [{}, {"a": "fs"}, {"a": "ff", "b": "ff"}, {"a": "k", "b": "f"}])
def test_where_there_is_no_alpha_there_is_none(table: dict[str, str]) -> None:
    found = measure(comparisons(4), votes_of(table))
    assert math.isnan(found.alpha.estimate)
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["alpha"]["estimate"] is None
    said = "\n".join(lines(found))
    assert said.count("not enough votes") == 2
    assert "nan" not in said


@pytest.mark.parametrize(
    ("rates", "share_first"), [(RATES, 0.5), (RATES, 0.8), ((0.05, 0.4), 0.5), ((0.25,) * 4, 0.3)]
)
def test_error_rates_imply_the_alpha_that_simulated_annotators_reach(
    rates: Sequence[float], share_first: float
) -> None:
    num = 8000
    better = ["first" if n < share_first * num else "second" for n in range(num)]
    votes = erring(better, rates, seed=3)  # type: ignore[arg-type]
    # Four standard errors; one comparison scatters by at most 1 / (2 De) < 1.2
    tolerance = 4 * 1.2 / math.sqrt(num)
    reached = alpha(opinions(votes).values())
    assert reached == pytest.approx(implied_alpha(rates, share_first), abs=tolerance)


def test_error_rates_imply_an_alpha_known_by_hand() -> None:
    # Two of 0.1, 0.2 and 0.3 differ in 0.26, 0.34 and 0.38 of the comparisons; chance in a half
    assert implied_alpha(RATES) == pytest.approx(1 - 0.98 / 3 / 0.5)
    for rate in (0.0, 0.1, 0.35):
        assert implied_error_rate(implied_alpha([rate] * 3)) == pytest.approx(rate)
    assert implied_error_rate(-0.1) == 0.5


def test_intervals_hold_the_implied_alpha_as_often_as_they_say() -> None:
    num = 100
    hits = 0
    for seed in range(num):
        said = opinions(erring(alternating(80), RATES, seed)).values()
        interval = alpha_interval(said, num_resamples=100)
        assert interval.low < interval.estimate < interval.high
        hits += interval.low <= implied_alpha(RATES) <= interval.high
    # 0.95 of them, but for three standard errors and the few resamples
    assert 0.87 * num <= hits < num


def test_an_annotator_is_described() -> None:
    votes = votes_of({"ann": "fstk", "bob": "ffts", "cid": "fs.."})
    votes += [vote("0", "ann", "first", round_=1), vote("1", "ann", "tie", round_=1)]
    ann, bob, cid = measure(comparisons(5), votes).annotators
    without_ann = alpha(opinions([one for one in votes if one.annotator != "ann"]).values())
    assert ann == Annotator(
        name="ann",
        kind="person",
        num_votes=4,
        seconds=1.0,
        tie_share=0.25,
        both_bad_share=0,
        skip_share=0.25,
        left_share=0.5,
        agreement=4 / 5,  # all but bob's of comparison 1
        num_others=5,
        alpha_without=without_ann,
        self_agreement=0.5,
        num_repeated=2,
    )
    assert [bob.agreement, cid.agreement] == pytest.approx([3 / 5, 3 / 4])
    assert bob.self_agreement is None


def test_without_the_careless_annotator_the_others_agree_more() -> None:
    found = measure(comparisons(300), erring(alternating(300), (0.1, 0.1, 0.45), seed=1))
    without = {one.name: one.alpha_without for one in found.annotators}
    assert without["2"] == max(without.values(), key=lambda value: value or 0)
    assert min(found.annotators, key=lambda one: one.agreement or 0).name == "2"


def test_judges_repeats_and_skips_are_outside_of_the_peoples_alpha() -> None:
    people = votes_of({"ann": "fsft", "bob": "fsst"})
    others = [
        vote(str(n), "llm", "second", kind="judge", round_=round_)
        for n in range(4)
        for round_ in (0, 1)
    ]
    others += [vote("0", "ann", "second", round_=1), vote("0", "cid", "skip")]
    alone, together = (measure(comparisons(4), votes) for votes in (people, people + others))
    assert together.alpha == alone.alpha
    assert together.num_shared == 4
    judge = together.annotators[-1]
    assert (judge.kind, judge.alpha_without, judge.self_agreement) == ("judge", None, 1)
    assert judge.agreement == pytest.approx(3 / 8)


def test_the_step_prints_a_table_or_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    votes = erring(alternating(8), RATES, seed=1)
    folder = str(curation.write(tmp_path, votes, 8))
    curation.step(agreement, folder, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["alpha"]["estimate"] == pytest.approx(alpha(opinions(votes).values()))
    assert [one["name"] for one in found["annotators"]] == ["0", "1", "2"]
    curation.step(agreement, folder)
    said = capsys.readouterr().out
    assert f"{found['alpha']['estimate']:.3f} [{found['alpha']['low']:.3f}" in said
    assert all(outcome["name"] in said for outcome in found["outcomes"])


def test_the_step_says_what_a_judge_prefers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    votes = votes_of({"ann": "fs"})
    votes += [vote("0", "llm", "first", kind="judge", round_=0, left="first")]
    votes += [vote("0", "llm", "first", kind="judge", round_=1, left="second")]
    folder = str(curation.write(tmp_path, votes, 2))
    curation.step(agreement, folder)
    assert "llm prefers\n  the same answer in both orders: 100 %" in capsys.readouterr().out
    curation.step(agreement, folder, "--json")
    assert json.loads(capsys.readouterr().out)["biases"]["llm"]["consistent"]["value"] == 1


def test_without_votes_one_line_says_what_makes_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no votes yet; `python -m orpo_lab curate votes`"):
        curation.step(agreement, str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_every_choice_is_a_value_or_a_missing_one() -> None:
    assert set(get_args(Choice)) == {*VALUES, "skip"}
    assert {one.choice for one in votes_of({"a": "fstbk"})} == set(get_args(Choice))
