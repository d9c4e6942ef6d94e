"""A judge's votes: asked in both orders, read strictly; and what the judge prefers."""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from orpo_lab.__main__ import main
from orpo_lab.curate import judge as judging
from orpo_lab.curate.ask import Answer, Failure, Request
from orpo_lab.curate.candidates import compare
from orpo_lab.curate.folder import CANDIDATES, PROMPTS, Candidate, Prompt, append
from orpo_lab.curate.judge import (
    Question,
    bias_of,
    first_place,
    in_both_orders,
    longer_answer,
    share_of,
)
from orpo_lab.curate.question import AGAIN, read
from orpo_lab.curate.store import Comparison, Store, Vote

NUM = 12
PROMPTS_ASKED = [
    Prompt(f"p{n}", [{"role": "system", "content": "be kind"}, {"role": "user", "content": "why?"}],
           "x", n)
    for n in range(NUM)
]  # fmt: skip
ANSWERS = [
    Candidate(f"{prompt.id}{k}", prompt.id, k, text, "stop", 1, "")
    for prompt in PROMPTS_ASKED
    for k, text in enumerate((f"{{first}} good {prompt.id}", f"bad {prompt.id} and longer"))
]
COMPARISONS = compare(ANSWERS).comparisons


class Replies:
    """A judge whose replies a function makes of the conversation."""

    name = "model"

    def __init__(self, reply: Callable[[Request], str | Failure]) -> None:
        self.settings: dict[str, Any] = {"model": self.name}
        self.found: dict[str, Any] = {}
        self.reply = reply
        self.asked: list[Request] = []

    def answer(
        self, requests: Sequence[Request], have: Collection[str]
    ) -> Iterator[list[tuple[Request, Answer | Failure]]]:
        for request in requests:
            if request.id not in have:
                self.asked.append(request)
                said = self.reply(request)
                made = said if isinstance(said, Failure) else Answer(said, "stop", 1)
                yield [(request, made)]


@pytest.fixture
def curation(tmp_path: Path) -> Path:
    append(tmp_path / PROMPTS, PROMPTS_ASKED)
    append(tmp_path / CANDIDATES, ANSWERS)
    Store(tmp_path).add_comparisons(COMPARISONS)
    return tmp_path


@pytest.fixture
def judge(curation: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Vote]]:
    """Run the step with a judge of ours, and return its votes."""

    def run(replies: Replies, *options: str) -> list[Vote]:
        monkeypatch.setattr(judging, "open_model", lambda name, options: replies)
        main(["curate", "judge", str(curation), "--model", "model", *options])
        return Store(curation).votes()

    return run


def prefers_good(request: Request) -> str:
    first, second = re.findall(r"<answer_[AB]>\n(.*?)\n</", request.messages[0]["content"])
    return "A" if "good" in first else "B" if "good" in second else "tie"


def text_of(vote: Vote) -> str:
    (comparison,) = (one for one in COMPARISONS if one.id == vote.comparison)
    chosen = comparison.first if vote.choice == "first" else comparison.second
    return next(one.text for one in ANSWERS if one.id == chosen)


def test_a_judge_is_asked_in_both_orders_and_votes_for_what_it_means(
    judge: Callable[..., list[Vote]], capsys: pytest.CaptureFixture[str]
) -> None:
    replies = Replies(prefers_good)
    votes = judge(replies)
    assert len(votes) == 2 * NUM
    assert all("good" in text_of(vote) for vote in votes)
    assert {(vote.kind, vote.annotator) for vote in votes} == {("judge", "model (prompt 1)")}
    for comparison in COMPARISONS:
        own = [vote for vote in votes if vote.comparison == comparison.id]
        assert sorted(vote.round for vote in own) == [0, 1]
        assert {vote.left for vote in own} == {"first", "second"}
    assert {vote.left for vote in votes if vote.round == 0} == {"first", "second"}
    assert all(
        "system: be kind\n\nuser: why?" in one.messages[0]["content"] for one in replies.asked
    )
    said = capsys.readouterr().out
    assert "model (prompt 1): 24 votes, 0 ties, 0 without a choice" in said
    assert "the same answer in both orders: 100 % [76, 100] of 12" in said
    assert "the answer in the first place: 50 % [25, 75] of 12" in said
    assert "the longer answer: 0 % [0, 24] of 12" in said


@pytest.mark.parametrize(
    ("reply", "means"),
    [
        ("A", "first"),
        (" **B**.\n", "second"),
        ("[[A]]", "first"),
        ("Tie", "tie"),
        ("<think>A? no, B.</think>\n\nA", "first"),
        ("a", None),
        ("A or B", None),
        ("A is better", None),
        ("Answer A", None),
        ("AB", None),
        ("", None),
        ("C", None),
    ],
)
def test_a_reply_is_the_word_that_was_asked_for_or_none(reply: str, means: str | None) -> None:
    by_id = {one.id: one for one in ANSWERS}
    for round in (0, 1):
        comparison = COMPARISONS[0]
        answers = by_id[comparison.first], by_id[comparison.second]
        question = Question(comparison, round, PROMPTS_ASKED[0], *answers)
        other = {"first": "second", "second": "first"}[question.left]
        expected = {"first": question.left, "second": other, "tie": "tie", None: None}[means]
        place = read(reply)
        assert (place and question.choice_of(place)) == expected


def test_an_unclear_reply_is_asked_about_once_more_and_then_is_a_skip(
    judge: Callable[..., list[Vote]], capsys: pytest.CaptureFixture[str]
) -> None:
    def hesitant(request: Request) -> str:
        if request.messages[-1]["content"] != AGAIN:
            return "Well, A"
        assert request.messages[-2] == {"role": "assistant", "content": "Well, A"}
        return "B" if "p0" in request.messages[0]["content"] else "Well, B"

    replies = Replies(hesitant)
    votes = judge(replies)
    assert len(replies.asked) == 4 * NUM
    assert sum(vote.choice == "skip" for vote in votes) == 2 * NUM - 2
    assert {vote.note for vote in votes} == {"", "unclear reply: Well, B"}
    assert "24 first replies were neither A, B nor tie" in capsys.readouterr().out


def test_a_judge_goes_on_with_what_it_has_not_answered(
    judge: Callable[..., list[Vote]], capsys: pytest.CaptureFixture[str]
) -> None:
    judge(Replies(prefers_good), "--num", "2")

    def broken(request: Request) -> str | Failure:
        return Failure("down") if "p5" in request.messages[0]["content"] else "tie"

    votes = judge(Replies(broken))
    assert len(votes) == 2 * NUM - 2
    assert "2 votes failed; the same command tries again: down" in capsys.readouterr().out
    last = Replies(prefers_good)
    assert len(judge(last)) == 2 * NUM
    assert len(last.asked) == 2
    assert "model: 2 votes, 22 were there already\n" in capsys.readouterr().out


def test_the_interval_of_a_share_is_wilsons() -> None:
    for right, num in ((0, 5), (3, 7), (20, 20), (31, 90)):
        share = share_of([1.0] * right + [0.0] * (num - right))
        assert share is not None
        expected = stats.binomtest(right, num).proportion_ci(method="wilson")
        assert (share.low, share.high) == pytest.approx((expected.low, expected.high))
        assert (share.value, share.num) == (right / num, num)
    assert share_of([]) is None


def vote(comparison: Comparison, choice: Any, left: Any, round: int = 0, who: str = "j") -> Vote:
    kind: Any = "judge" if who == "j" else "person"
    key = f"{comparison.id} {who} {round}"
    return Vote(key, comparison.id, who, kind, choice, left, round, "", 1.0, "")


def test_preference_for_a_place_is_measured_on_comparisons_asked_in_both_orders() -> None:
    votes = []
    for number, comparison in enumerate(COMPARISONS[:8]):
        for round, left in enumerate(("first", "second")):
            # The first six are judged by place, the last two by content
            votes.append(vote(comparison, left if number < 6 else "second", left, round))
    # Of these one order says nothing
    for comparison in COMPARISONS[8:]:
        votes += [vote(comparison, "first", "first"), vote(comparison, "tie", "second", 1)]
    assert {one.comparison for one in in_both_orders(votes)} == {one.id for one in COMPARISONS[:8]}
    bias = bias_of("j", votes, COMPARISONS, ANSWERS)
    assert bias.first_place is not None
    assert bias.consistent is not None
    assert bias.first_place.value == (6 * 1 + 2 * 0.5) / 8
    assert bias.consistent.value == 2 / 8
    assert (bias.first_place.num, bias.consistent.num) == (8, 8)
    assert bias.people_first_place is None
    assert "the answer in the first place: 88 %" in str(bias)


def test_preference_for_length_is_measured_beside_the_peoples() -> None:
    lengths = {one.id: len(one.text) for one in ANSWERS}
    same = replace(ANSWERS[0], id="same", text="?" * lengths[COMPARISONS[0].first])
    equal = Comparison("equal", "p0", COMPARISONS[0].first, "same")

    def longer(comparison: Comparison) -> str:
        return "first" if lengths[comparison.first] > lengths[comparison.second] else "second"

    votes = [vote(equal, "first", "first"), vote(COMPARISONS[9], "both_bad", "first")]
    for number, comparison in enumerate(COMPARISONS[:4]):
        shorter = {"first": "second", "second": "first"}[longer(comparison)]
        votes.append(vote(comparison, longer(comparison) if number else shorter, "first"))
        # Two people of three take the shorter answer
        votes += [
            vote(comparison, longer(comparison) if who == "x" else shorter, "second", who=who)
            for who in "xyz"
        ]
    bias = bias_of("j", votes, [*COMPARISONS, equal], [*ANSWERS, same])
    assert bias.longer_answer is not None
    assert bias.people_longer_answer is not None
    assert (bias.longer_answer.value, bias.longer_answer.num) == (3 / 4, 4)
    assert bias.people_longer_answer.value == pytest.approx(1 / 3)
    assert bias.people_longer_answer.num == 4
    assert "the longer answer: 75 % [30, 95] of 4; people 33 %" in str(bias)
    assert longer_answer([], COMPARISONS, ANSWERS) is first_place([]) is None


def test_answers_that_are_gone_are_one_line(curation: Path) -> None:
    (curation / "candidates.jsonl").write_text("")
    with pytest.raises(SystemExit, match="which the folder does not hold"):
        main(["curate", "judge", str(curation), "--model", "model"])


def test_a_folder_without_comparisons_and_two_judges_are_one_line(
    curation: Path, tmp_path: Path
) -> None:
    for file in curation.glob("votes.sqlite*"):
        file.unlink()
    with pytest.raises(SystemExit, match="has no comparisons; `curate candidates` makes them"):
        main(["curate", "judge", str(curation), "--model", "model"])
    with pytest.raises(SystemExit, match="--model is given more than once"):
        main(["curate", "judge", str(curation), "--model", "a", "--model", "b"])
