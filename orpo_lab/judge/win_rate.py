"""How often a judge prefers the answers of A to those of B. Pure statistics over prompts.

A judge is asked about the two answers to a prompt twice, with A's in the first place and with B's.
A verdict gives A 1 (A's answer is better), 0.5 (a tie) or 0, and a prompt's score is the mean of
its two verdicts. A judge that follows the place and not the answer gives every prompt 0.5, so no
preference for a place raises or lowers the win rate. It only drives the win rate towards one half.

Prompts are independent, and the two verdicts on one prompt are not. So intervals are over prompts.
Scores have five values, not two. The interval is that of Agresti and Coull (The American
Statistician 52, 1998, 119-126), carried over to such scores: with z the normal quantile, z^2 / 2
prompts that are won and as many that are lost are added, and the interval is the mean of all
prompts plus or minus z standard errors. For scores of 0 and 1 it is theirs. `benchmarks/judge.py`
counts how often it holds the true win rate.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, mean
from typing import Any

from orpo_lab.compare.verdict import CONFIDENCE, Interval, share_interval
from orpo_lab.curate.question import Place
from orpo_lab.judge.length import length_controlled
from orpo_lab.metrics import JUDGED, JUDGED_PREFIX

# The share of prompts with different answers that may lack a verdict
MAX_LOST = 0.2
# What a verdict gives the answer in the first place
_POINTS: dict[Place, float] = {"first": 1.0, "tie": 0.5, "second": 0.0}


@dataclass(frozen=True)
class Judged:
    """What a judge says of A's and B's answers to one prompt; None: both replies said nothing."""

    a_first: Place | None
    """The verdict with A's answer in the first place."""
    b_first: Place | None
    """The verdict with B's answer in the first place."""
    a_longer_by: int = 0
    """How many characters A's answer has more than B's."""

    @property
    def is_readable(self) -> bool:
        """Whether both verdicts say something; else the prompt does not count."""
        return self.a_first is not None and self.b_first is not None

    @property
    def score(self) -> float:
        """What the prompt gives A, from 0 to 1."""
        assert self.a_first is not None
        assert self.b_first is not None
        return (_POINTS[self.a_first] + 1 - _POINTS[self.b_first]) / 2

    @property
    def follows_place(self) -> bool:
        """Whether both verdicts name the same place, and so contradict each other."""
        return self.a_first == self.b_first != "tie"

    @property
    def lean(self) -> float:
        """How far the verdicts prefer the first place to the second, from -1 to 1."""
        assert self.a_first is not None
        assert self.b_first is not None
        return _POINTS[self.a_first] + _POINTS[self.b_first] - 1


@dataclass(frozen=True)
class WinRate:
    """How often a judge prefers A's answers to B's, and what it may follow instead."""

    win_rate: Interval
    num_prompts: int
    """Prompts that count: those with two verdicts, and those with two equal answers."""
    num_equal: int
    """Prompts to which both answers are the same text: a tie, about which nobody is asked."""
    num_unreadable: int
    """Prompts with a verdict that could not be read; they do not count."""
    num_missing: int
    """Prompts with a question that has no reply yet; they do not count."""
    num_ties: int
    """Prompts that the judge calls a tie twice."""
    follows_place: Interval | None
    """Share of the prompts in which both verdicts name the same place. None: nothing was judged."""
    first_place_bias: Interval | None
    """From -1 (the second place always wins) to 1 (the first). None: nothing was judged."""
    longer_wins: Interval | None
    """Score of the longer answer, where lengths differ. None: they do not."""
    length_controlled: Interval | None
    """The win rate at equal length; see `length`. None: all lengths are equal."""

    @property
    def is_evidence(self) -> bool:
        """Whether the win rate says something about the answers.

        It does not where too many prompts do not count: equal answers, which all count, would then
        pull the win rate towards one half. And it does not where the judge is shown to follow the
        place in most prompts, and the other prompts leave open whom the judge prefers.
        """
        follows = self.follows_place is not None and self.follows_place.low > 0.5
        return not self._is_unheard and (not follows or self.winner is not None)

    @property
    def _is_unheard(self) -> bool:
        num_asked = self.num_prompts - self.num_equal + self.num_lost
        return self.num_lost > MAX_LOST * num_asked

    @property
    def num_lost(self) -> int:
        """Prompts that do not count."""
        return self.num_unreadable + self.num_missing

    @property
    def winner(self) -> str | None:
        """The side that the judge is shown to prefer, A or B; None: neither."""
        if self.win_rate.low > 0.5:
            return "A"
        return "B" if self.win_rate.high < 0.5 else None

    def sentences(self, a: str, b: str, judge: str) -> list[str]:
        """Return what was found, in words.

        Args:
            a: what A is called.
            b: what B is called.
            judge: what the judge is called.
        """
        follows, lean = self.follows_place, self.first_place_bias
        said = [self._headline(a, b, judge)]
        if follows and lean:
            said.append(
                f"In {_percent(follows)} of the prompts the judge follows the place, not the answer"
                f" (bias towards the first place {_signed(lean)}; 0: none, 1: it always wins)."
            )
        if self.longer_wins:
            said.append(
                f"The longer answer wins {_percent(self.longer_wins)} (50 %: no matter how long)."
            )
        if self.length_controlled:
            said.append(
                f"At equal length {a} would win {_percent(self.length_controlled)}, by a logistic "
                "regression on the difference of lengths."
            )
        counts = {
            "called a tie twice": self.num_ties,
            "equal answers, a tie without a question": self.num_equal,
            "unreadable, not counted": self.num_unreadable,
            "without a reply, not counted": self.num_missing,
        }
        listed = [f"{num} {what}" for what, num in counts.items() if num]
        return [*said, *([f"Prompts: {'; '.join(listed)}."] if listed else [])]

    def _headline(self, a: str, b: str, judge: str) -> str:
        if self._is_unheard:
            return (
                f"The judge {judge} tells nothing about {a} and {b}: {self.num_lost} prompts have "
                "no verdict in both orders that can be read. Its win rate is no evidence."
            )
        if not self.is_evidence:
            return (
                f"The judge {judge} tells nothing about {a} and {b}: it mostly names a place, "
                "whichever answer stands there. Its win rate is no evidence; take another judge."
            )
        rate = f"{_percent(self.win_rate)} of {self.num_prompts} prompts"
        rate += f" ({100 * CONFIDENCE:.0f} % intervals, over prompts)"
        match self.winner:
            case "A":
                return f"The judge {judge} prefers {a} to {b}: {a} wins {rate}."
            case "B":
                return f"The judge {judge} prefers {b} to {a}: {a} wins {rate}."
        return f"The judge {judge} does not tell {a} and {b} apart: {a} wins {rate}."


def win_rate(judged: Iterable[Judged], *, num_equal: int = 0, num_missing: int = 0) -> WinRate:
    """Return how often A wins, over prompts.

    Args:
        judged: what the judge says of the prompts with two verdicts.
        num_equal: prompts to which both answers are the same text.
        num_missing: prompts with a question that has no reply.

    Raises:
        ValueError: no prompt that was asked about counts.
    """
    found = list(judged)
    asked = [one for one in found if one.is_readable]
    scores = [one.score for one in asked] + [0.5] * num_equal
    if not asked and (found or num_missing or not num_equal):
        raise ValueError("no prompt has two verdicts that can be read")
    longer = [
        one.score if one.a_longer_by > 0 else 1 - one.score for one in asked if one.a_longer_by
    ]
    num_following = sum(one.follows_place for one in asked)
    return WinRate(
        win_rate=interval(scores),
        num_prompts=len(scores),
        num_equal=num_equal,
        num_unreadable=len(found) - len(asked),
        num_missing=num_missing,
        num_ties=sum(one.a_first == one.b_first == "tie" for one in asked),
        follows_place=share_interval(num_following, len(asked)) if asked else None,
        first_place_bias=_signed_interval([one.lean for one in asked]) if asked else None,
        longer_wins=interval(longer) if longer else None,
        length_controlled=length_controlled(
            scores, [one.a_longer_by for one in asked] + [0] * num_equal
        ),
    )


def interval(scores: Sequence[float]) -> Interval:
    """Return the mean of scores in [0, 1], one or more, with its interval; see the module."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    added = z**2 / 2
    num = len(scores) + 2 * added
    centre = (sum(scores) + added) / num
    variance = (sum(score**2 for score in scores) + added) / num - centre**2
    reach = z * math.sqrt(variance / num)
    return Interval(mean(scores), max(0.0, centre - reach), min(1.0, centre + reach))


def figures(found: WinRate, judge: str) -> dict[str, Any]:
    """Return the figures of a win rate by the names of `metrics.JUDGED`, and who judged."""
    named: dict[str, Any] = {f"{JUDGED_PREFIX}model": judge}
    for metric in JUDGED:
        match metric.of_win_rate(found):
            case Interval(estimate, low, high):
                named |= {
                    metric.name: estimate,
                    f"{metric.name}_low": low,
                    f"{metric.name}_high": high,
                }
            case None:
                pass
            case value:
                named[metric.name] = value
    return named


def _signed_interval(values: Sequence[float]) -> Interval:
    """Return the mean of values in [-1, 1], with its interval."""
    found = interval([(value + 1) / 2 for value in values])
    return Interval(2 * found.estimate - 1, 2 * found.low - 1, 2 * found.high - 1)


def _percent(share: Interval) -> str:
    return f"{100 * share.estimate:.0f} % [{100 * share.low:.0f}, {100 * share.high:.0f}]"


def _signed(value: Interval) -> str:
    return f"{value.estimate:+.2f} [{value.low:+.2f}, {value.high:+.2f}]"
