"""The rule by which the votes on a comparison become a pair, and what other rules would keep.

Votes are counted once an annotator: a person by their first vote, a judge by what both orders of
the answers gave. A vote to skip never counts.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from orpo_lab.curate.store import Choice, Kind, Vote
from orpo_lab.errors import UserError

Winner = Literal["first", "second"]
PEOPLE: tuple[Kind, ...] = ("person",)
ALL: tuple[Kind, ...] = ("person", "judge")
# What the annotators say of one comparison: a choice for each annotator who did not skip it
Opinions = Mapping[str, Choice]

# How a vote for none of the answers is counted: as a vote that the winner lacks, not at all, or (if
# both answers are bad) so that a single such vote drops the comparison
Weight = Literal["against", "ignore", "veto"]
TIE_WEIGHTS: tuple[Weight, ...] = ("against", "ignore")
BOTH_BAD_WEIGHTS: tuple[Weight, ...] = ("against", "ignore", "veto")

# Why a comparison becomes no pair, and in which words
DROPPED = {
    "too_few_votes": "fewer votes than --min-votes",
    "both_bad": "an annotator finds both answers bad, and --both-bad is veto",
    "even": "the lead of an answer is smaller than --margin",
    "no_majority": "no answer has the share of the votes that --majority asks for",
    "same_text": "both answers are the same text, or one is empty",
}


@dataclass(frozen=True)
class Rule:
    """What it takes for a comparison to become a pair.

    Args:
        min_votes: least number of votes that count.
        majority: least share of these votes that the winner has, above 0 to 1.
        margin: least number of votes by which the winner leads the other answer.
        tie: how a tie counts: against the winner, or not at all.
        both_bad: how a vote that both answers are bad counts: against the winner, not at all, or as
            a veto.
        judges: whether the votes of LLM judges count like those of people.

    Raises:
        UserError: a value is out of range.
    """

    min_votes: int = 2
    majority: float = 0.6
    margin: int = 1
    tie: Weight = "against"
    both_bad: Weight = "against"
    judges: bool = False

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of annotators whose votes count."""
        return ALL if self.judges else PEOPLE

    def __post_init__(self) -> None:
        for name in ("min_votes", "margin"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise UserError(f"--{option} {getattr(self, name)} must be at least 1")
        if not 0 < self.majority <= 1:
            raise UserError(f"--majority {self.majority:g} must lie above 0, and at most at 1")


# Rules that `curate agreement` shows beside each other, by what they ask for
RULES = {
    "one vote is enough": Rule(min_votes=1, majority=0.5),
    "most of 2 votes or more": Rule(),
    "most, and judges vote too": Rule(judges=True),
    "most, ties and both bad left out": Rule(tie="ignore", both_bad="ignore"),
    "most, and nobody says both bad": Rule(both_bad="veto"),
    "two thirds of 3 votes or more": Rule(min_votes=3, majority=0.66),
    "all of 2 votes or more": Rule(majority=1),
    "all of 3 votes or more": Rule(min_votes=3, majority=1),
}


@dataclass(frozen=True)
class Decision:
    """What a rule makes of a comparison.

    `winner` is the answer that is chosen, None: the comparison becomes no pair, for `reason`, a key
    of `DROPPED`. `num_for` and `num_counted` are the votes for the winner and all that count.
    """

    winner: Winner | None
    reason: str
    num_for: int
    num_counted: int
    lead: int


@dataclass(frozen=True)
class Outcome:
    """What a rule would keep of all comparisons.

    Attributes:
        num_kept: pairs.
        observed: share of the votes on the kept comparisons that are for the chosen answer; NaN: no
            comparison is kept.
        expected: share of the pairs whose chosen answer is expected to be the better one (see
            `chance_of_right`); NaN: nothing says how often annotators err.
    """

    name: str
    rule: Rule
    num_kept: int
    observed: float
    expected: float

    def as_json(self) -> dict[str, Any]:
        """Return the outcome as JSON has it: null for a share of no votes."""
        return {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in asdict(self).items()
        }


def opinions(votes: Iterable[Vote], kinds: Collection[Kind] = PEOPLE) -> dict[str, Opinions]:
    """Return what the annotators say of each comparison, by the comparison's id.

    A person's first vote counts (round 0). A judge counts once both orders have been asked: with
    the choice that both gave, or else with a tie, since the place has decided and not the answer.

    Args:
        votes: all votes.
        kinds: the kinds of annotators that count.
    """
    rounds: dict[tuple[str, str], dict[int, Vote]] = {}
    for vote in votes:
        if vote.kind in kinds:
            rounds.setdefault((vote.comparison, vote.annotator), {})[vote.round] = vote
    found: dict[str, dict[str, Choice]] = {}
    for (comparison, annotator), by_round in rounds.items():
        choice = _opinion(by_round)
        if choice != "skip":
            found.setdefault(comparison, {})[annotator] = choice
    return dict(found)


def _opinion(by_round: Mapping[int, Vote]) -> Choice:
    """Return what an annotator says of a comparison in the end; skip: nothing."""
    if 0 not in by_round:
        return "skip"
    first = by_round[0]
    if first.kind == "person":
        return first.choice
    if 1 not in by_round or "skip" in (first.choice, by_round[1].choice):
        return "skip"
    return first.choice if first.choice == by_round[1].choice else "tie"


def decide(choices: Collection[Choice], rule: Rule) -> Decision:
    """Return what a rule makes of the choices of all annotators for one comparison."""
    num = Counter(choices)
    ignored = {"skip"}
    ignored |= {name for name in ("tie", "both_bad") if getattr(rule, name) == "ignore"}
    num_counted = sum(count for choice, count in num.items() if choice not in ignored)
    winner: Winner = "second" if num["second"] > num["first"] else "first"
    num_for = num[winner]
    lead = abs(num["first"] - num["second"])
    if num_counted < rule.min_votes:
        reason = "too_few_votes"
    elif rule.both_bad == "veto" and num["both_bad"]:
        reason = "both_bad"
    elif lead < rule.margin:
        reason = "even"
    # Divided: 0.28 * 25 is more than 7, 7 / 25 is 0.28
    elif num_for / num_counted < rule.majority:
        reason = "no_majority"
    else:
        return Decision(winner, "", num_for, num_counted, lead)
    return Decision(None, reason, num_for, num_counted, lead)


def chance_of_right(lead: int, error_rate: float) -> float:
    """Return the probability that the answer with more votes is the better one, by Bayes' rule.

    All annotators take the worse answer at one rate, independently of each other, and before the
    votes both answers are as likely to be the better one. Ties say nothing.

    Args:
        lead: votes for the answer, minus votes for the other one.
        error_rate: of the annotators, 0 to 1/2; NaN: not known.
    """
    right, wrong = (1 - error_rate) ** lead, error_rate**lead
    return right / (right + wrong)


def outcomes(
    votes: Collection[Vote], error_rate: float = math.nan, rules: Mapping[str, Rule] = RULES
) -> list[Outcome]:
    """Return what each rule would keep; a rule about judges only where a judge has voted.

    Args:
        votes: all votes.
        error_rate: how often annotators take the worse answer; NaN: not known.
        rules: by their names.
    """
    has_judges = any(vote.kind == "judge" for vote in votes)
    return [
        _outcome(name, rule, opinions(votes, rule.kinds).values(), error_rate)
        for name, rule in rules.items()
        if has_judges or not rule.judges
    ]


def _outcome(name: str, rule: Rule, said: Collection[Opinions], error_rate: float) -> Outcome:
    agree: list[bool] = []
    right: list[float] = []
    for choices in said:
        decision = decide(choices.values(), rule)
        if decision.winner:
            agree += [choice == decision.winner for choice in choices.values()]
            right.append(chance_of_right(decision.lead, error_rate))
    observed, expected = (
        sum(values) / len(values) if values else math.nan for values in (agree, right)
    )
    return Outcome(name, rule, len(right), observed, expected)
