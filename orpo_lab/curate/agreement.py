"""How far the annotators agree: `python -m orpo_lab curate agreement FOLDER [--json]`.

**Alpha** is Krippendorff's (Computing Krippendorff's Alpha-Reliability, 2011): 1 - Do / De. Do is
how often two votes on one comparison differ, De how often any two votes differ. 1 is perfect
agreement, 0 is what annotators reach who vote by chance. Votes count as `rules.opinions` says, and
a vote to skip is a missing value. Two alphas are given:

- The headline is nominal over all four choices: first, second, tie, both_bad. It counts all that
  the annotators said: a pair needs them to agree on which comparisons have a better answer, too.
- `alpha_decided` is of first and second alone. It is what the error rates of annotators imply
  (`implied_alpha`), and is higher where people differ in when they call a tie.

The intervals are bootstrap percentiles over comparisons. Annotators are taken as they are: the
interval does not say what other annotators would reach.

LLM judges stand apart: no alpha counts their votes, and their agreement is with the people.
"""

import argparse
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orpo_lab import program
from orpo_lab.compare.verdict import Interval
from orpo_lab.curate.folder import VOTES, read_candidates, read_prompts
from orpo_lab.curate.rules import Opinions, Outcome, Rule, opinions, outcomes
from orpo_lab.curate.store import Choice, Comparison, Kind, Store, Vote, check_all_there
from orpo_lab.errors import UserError

# The values of the headline's alpha, and of `alpha_decided`
VALUES: tuple[Choice, ...] = ("first", "second", "tie", "both_bad")
DECIDED: tuple[Choice, ...] = ("first", "second")

NUM_RESAMPLES = 1000
CONFIDENCE = 0.95
SEED = 1


@dataclass(frozen=True)
class Annotator:
    """What the votes say of one annotator; a share of nothing is None.

    Attributes:
        num_votes: votes of round 0, skips included.
        seconds: median time of these votes; None: no vote.
        tie_share, both_bad_share, skip_share: shares of these votes.
        left_share: share of the votes for an answer that go to the one on the left. Far from a
            half, the annotator follows the place.
        agreement: share of the other people's votes on the same comparisons that are the same.
        num_others: the number of these votes.
        alpha_without: alpha of the people without this one. If it is higher than the alpha of all
            of them, this annotator lowers the agreement. None: fewer than two are left, or a judge.
        self_agreement: share of repeated comparisons with the same choice both times. Of a judge:
            in both orders.
        num_repeated: the number of these comparisons.
    """

    name: str
    kind: Kind
    num_votes: int
    seconds: float | None
    tie_share: float | None
    both_bad_share: float | None
    skip_share: float | None
    left_share: float | None
    agreement: float | None
    num_others: int
    alpha_without: float | None
    self_agreement: float | None
    num_repeated: int


@dataclass(frozen=True)
class Agreement:
    """How far the annotators of a curation agree.

    Attributes:
        num_comparisons: all comparisons, voted on or not.
        num_voted: those that a person did not skip.
        num_shared: those that two people or more did not skip; alpha rests on these.
        num_votes: votes of people in round 0, skips included.
        alpha, alpha_decided: see the top of this module; NaN: it does not exist.
        annotators: people, then judges, each by name.
        outcomes: what each rule would keep.
    """

    num_comparisons: int
    num_voted: int
    num_shared: int
    num_votes: int
    alpha: Interval
    alpha_decided: Interval
    annotators: list[Annotator]
    outcomes: list[Outcome]

    def as_json(self) -> dict[str, Any]:
        """Return plain data, as JSON has it: null for what does not exist."""
        return vars(self) | {
            "alpha": self.alpha.as_json(),
            "alpha_decided": self.alpha_decided.as_json(),
            "annotators": [vars(annotator) for annotator in self.annotators],
            "outcomes": [outcome.as_json() for outcome in self.outcomes],
        }


def alpha(said: Collection[Opinions], values: Sequence[Choice] = VALUES) -> float:
    """Return Krippendorff's alpha, nominal; other choices than `values` are missing values.

    NaN: no comparison has two votes, or all votes are the same, so that chance would agree as well.
    """
    return _alpha(_counts(said, values))


def alpha_interval(
    said: Collection[Opinions],
    values: Sequence[Choice] = VALUES,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """Return alpha with its bootstrap interval over comparisons, the same in every call.

    Resamples whose votes are all the same have no alpha and are left out.
    """
    counts = _counts(said, values)
    estimate = _alpha(counts)
    if math.isnan(estimate) or len(counts) < 2:
        return Interval(estimate, math.nan, math.nan)
    random = np.random.default_rng(SEED)
    drawn = (counts[random.integers(len(counts), size=len(counts))] for _ in range(num_resamples))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.nanpercentile([_alpha(resample) for resample in drawn], [tail, 100 - tail])
    return Interval(estimate, float(low), float(high))


def _counts(said: Collection[Opinions], values: Sequence[Choice]) -> NDArray[np.int64]:
    """Return how often each value was chosen, for the N comparisons with two such votes, [N, V]."""
    rows = [[list(choices.values()).count(value) for value in values] for choices in said]
    counts = np.array(rows, dtype=np.int64).reshape(-1, len(values))
    return counts[counts.sum(1) >= 2]


def _alpha(counts: NDArray[np.int64]) -> float:
    import krippendorff

    if (counts.sum(0) > 0).sum() < 2:
        return math.nan
    return float(krippendorff.alpha(value_counts=counts, level_of_measurement="nominal"))


def implied_alpha(error_rates: Sequence[float], share_first: float = 0.5) -> float:
    """Return the alpha that annotators with known error rates reach, over many comparisons.

    Every comparison has a better answer, every annotator votes on every comparison and takes the
    other answer with their own rate, independently of the others. Two annotators with the rates a
    and b differ with probability a (1 - b) + b (1 - a), whichever answer is better: Do is the mean
    over pairs of annotators. De is 2 p (1 - p); p is the share of votes for `first`.

    Args:
        error_rates: of two annotators or more, 0 to 1 each.
        share_first: the share of comparisons in which `first` is better.
    """
    observed = np.mean([a * (1 - b) + b * (1 - a) for a, b in combinations(error_rates, 2)])
    error = np.mean(error_rates)
    first = share_first * (1 - error) + (1 - share_first) * error
    return float(1 - observed / (2 * first * (1 - first)))


def implied_error_rate(decided: float) -> float:
    """Return the error rate at which annotators who all have this rate reach an alpha.

    The inverse of `implied_alpha` for equal rates and answers that are better equally often:
    alpha = (1 - 2 e)^2.

    Args:
        decided: `alpha_decided`; an alpha below 0 counts as 0. NaN gives NaN.
    """
    return (1 - math.sqrt(0.0 if decided < 0 else decided)) / 2


def read_votes(folder: Path) -> tuple[list[Comparison], list[Vote]]:
    """Return the comparisons and votes of a curation.

    Raises:
        UserError: there are no votes yet.
    """
    votes = Store(folder).votes() if (folder / VOTES).is_file() else []
    if not votes:
        raise UserError(
            f"{folder} has no votes yet; `{program.command('curate votes')}` takes them"
        )
    return Store(folder).comparisons(), votes


def measure(
    comparisons: Sequence[Comparison], votes: Sequence[Vote], num_resamples: int = NUM_RESAMPLES
) -> Agreement:
    """Measure how far the annotators agree; the page's owner may call this at any time."""
    said = opinions(votes)
    decided = alpha_interval(said.values(), DECIDED, num_resamples)
    return Agreement(
        num_comparisons=len(comparisons),
        num_voted=len(said),
        num_shared=sum(len(choices) >= 2 for choices in said.values()),
        num_votes=sum(vote.kind == "person" and vote.round == 0 for vote in votes),
        alpha=alpha_interval(said.values(), VALUES, num_resamples),
        alpha_decided=decided,
        annotators=_annotators(votes, said),
        outcomes=outcomes(votes, implied_error_rate(decided.estimate)),
    )


def _annotators(votes: Sequence[Vote], said: Mapping[str, Opinions]) -> list[Annotator]:
    by_name: dict[tuple[Kind, str], list[Vote]] = {}
    for vote in votes:
        by_name.setdefault((vote.kind, vote.annotator), []).append(vote)
    order = sorted(by_name, key=lambda key: (key[0] != "person", key[1]))
    return [_annotator(name, kind, by_name[kind, name], said) for kind, name in order]


def _annotator(
    name: str, kind: Kind, votes: Sequence[Vote], said: Mapping[str, Opinions]
) -> Annotator:
    """Describe an annotator.

    Args:
        name: the annotator.
        kind: a person or a judge.
        votes: the annotator's own votes.
        said: what people say of each comparison.
    """
    first = [vote for vote in votes if vote.round == 0]
    placed = [vote for vote in first if vote.choice in DECIDED]
    own = {comparison: choices[name] for comparison, choices in opinions(votes, (kind,)).items()}
    others = {
        comparison: {other: choice for other, choice in choices.items() if other != name}
        for comparison, choices in said.items()
    }
    same = [
        choice == own[comparison]
        for comparison, choices in others.items()
        if comparison in own
        for choice in choices.values()
    ]
    repeated = _repeated(votes)
    without = alpha(others.values()) if kind == "person" else math.nan
    return Annotator(
        name=name,
        kind=kind,
        num_votes=len(first),
        seconds=median(vote.seconds for vote in first) if first else None,
        tie_share=_share([vote.choice == "tie" for vote in first]),
        both_bad_share=_share([vote.choice == "both_bad" for vote in first]),
        skip_share=_share([vote.choice == "skip" for vote in first]),
        left_share=_share([vote.choice == vote.left for vote in placed]),
        agreement=_share(same),
        num_others=len(same),
        alpha_without=None if math.isnan(without) else without,
        self_agreement=_share([before == after for before, after in repeated]),
        num_repeated=len(repeated),
    )


def _repeated(votes: Sequence[Vote]) -> list[tuple[Choice, Choice]]:
    """Return an annotator's choices in both rounds, for all comparisons that have them."""
    rounds: tuple[dict[str, Choice], dict[str, Choice]] = ({}, {})
    for vote in votes:
        if vote.choice != "skip":
            rounds[vote.round][vote.comparison] = vote.choice
    before, after = rounds
    return [(before[name], after[name]) for name in before.keys() & after.keys()]


def _share(hits: Sequence[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None


def alpha_text(found: Interval) -> str:
    """Return an alpha with its interval in words."""
    # Its room imports transformers, which takes seconds; the voting page does without
    from orpo_lab.compare.words import interval_text

    if math.isnan(found.estimate):
        return "not enough votes: two people on one comparison, and two different choices in all"
    return interval_text(found)


def lines(found: Agreement) -> list[str]:
    """Return what the terminal shows of an agreement."""
    said = [
        f"{found.num_votes} votes of people on {found.num_voted} of {found.num_comparisons} "
        f"comparisons; {found.num_shared} have two votes or more",
        f"alpha (first, second, tie, both bad)  {alpha_text(found.alpha)}",
        f"alpha (first or second alone)         {alpha_text(found.alpha_decided)}",
    ]
    if not math.isnan(found.alpha_decided.estimate):
        rate = implied_error_rate(found.alpha_decided.estimate)
        said.append(
            "The second alpha is that of annotators who each pick the worse answer in "
            f"{100 * rate:.0f} % of the comparisons"
        )
    return [*said, "", *_annotator_lines(found.annotators), "", *_rule_lines(found.outcomes)]


def _annotator_lines(annotators: Sequence[Annotator]) -> list[str]:
    width = max([len(annotator.name) for annotator in annotators] + [len("annotator")])
    heads = ("votes", "seconds", "tie", "bad", "skip", "left", "agrees", "without", "itself")
    lines = [f"{'annotator':{width}}  " + " ".join(f"{head:>7}" for head in heads)]
    for one in annotators:
        figures = (
            f"{one.num_votes}",
            "-" if one.seconds is None else f"{one.seconds:.1f}",
            *map(
                percent,
                (one.tie_share, one.both_bad_share, one.skip_share, one.left_share, one.agreement),
            ),
            "-" if one.alpha_without is None else f"{one.alpha_without:.3f}",
            percent(one.self_agreement),
        )
        kind = "  (judge)" if one.kind == "judge" else ""
        row = " ".join(f"{figure:>7}" for figure in figures)
        lines.append(f"{one.name:{width}}  {row}{kind}")
    return [
        *lines,
        "agrees: with the other people's votes; without: their alpha without this annotator; "
        "itself: when asked again",
    ]


def _rule_lines(found: Sequence[Outcome]) -> list[str]:
    width = max(len(outcome.name) for outcome in found)
    default = next((outcome.name for outcome in found if outcome.rule == Rule()), "")
    rows = [
        f"{outcome.name:{width}}  {outcome.num_kept:6} {percent(outcome.observed):>9} "
        f"{percent(outcome.expected):>9}{'  (default)' if outcome.name == default else ''}"
        for outcome in found
    ]
    return [
        f"{'a rule would keep':{width}}  {'pairs':>6} {'observed':>9} {'expected':>9}",
        *rows,
        "observed: votes for the chosen answer; expected: pairs whose chosen answer is the better "
        "one, if all annotators err as the second alpha implies",
    ]


def percent(share: float | None) -> str:
    """Return a share in percent; a dash, if there is none."""
    return "-" if share is None or math.isnan(share) else f"{100 * share:.0f} %"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the step to a parser."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder of the curation")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(options: argparse.Namespace) -> None:
    """Print how far the annotators agree.

    Raises:
        UserError: there are no votes yet.
    """
    comparisons, votes = read_votes(options.folder)
    found = measure(comparisons, votes)
    biases = _biases(options.folder, comparisons, votes)
    if options.json:
        told = {judge: asdict(bias) for judge, bias in biases.items()}
        print(json.dumps(found.as_json() | {"biases": told}, indent=2))
        return
    print("\n".join(lines(found)))
    for judge, bias in biases.items():
        print(f"\n{judge} prefers\n{bias}")


def _biases(
    folder: Path, comparisons: Sequence[Comparison], votes: Sequence[Vote]
) -> dict[str, Any]:
    """Return what each judge prefers for reasons other than the answer, by the judge's name."""
    judges = sorted({vote.annotator for vote in votes if vote.kind == "judge"})
    if not judges:
        return {}
    # Imported here: the voting page does without the models of judges
    from orpo_lab.curate.judge import bias_of

    candidates = read_candidates(folder)
    check_all_there(comparisons, read_prompts(folder), candidates)
    return {judge: bias_of(judge, votes, comparisons, candidates) for judge in judges}
