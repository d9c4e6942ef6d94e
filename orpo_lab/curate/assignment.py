"""Who is asked about which comparison, in which order, and which answer stands on the left.

Everything here is pure, and the same for the same arguments: a server that starts again asks on
where it was.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from xxhash import xxh3_64_hexdigest

from orpo_lab.curate.store import Assignment, Vote

# A comparison is repeated after this many others, or after half of a queue that is short
DISTANCE = 20


def assign(
    comparisons: Sequence[str],
    annotators: Sequence[str],
    votes: Sequence[Vote],
    before: Sequence[Assignment],
    votes_per_pair: int,
    repeats: float,
) -> list[Assignment]:
    """Return who is asked about which comparison.

    What has a vote stays. What was assigned before stays where it can: an annotator who is no
    longer there gives up what is open, and an annotator who is new takes over a part of what is
    open. So everybody's counts are as even as the votes allow: they differ by at most 1 where
    nobody has voted yet.

    Args:
        comparisons: the ids of all comparisons.
        annotators: the names of the people who vote now.
        votes: the votes of people that stand.
        before: the assignments until now.
        votes_per_pair: how many people are asked about a comparison; at most all.
        repeats: for each annotator the share of comparisons that is asked a second time.
    """
    cast = {vote.comparison: set[str]() for vote in votes}
    for vote in votes:
        cast[vote.comparison].add(vote.annotator)
    asked = {comparison: set(cast.get(comparison, ())) for comparison in comparisons}
    for one in sorted(before):
        people = asked.get(one.comparison)
        if people is not None and one.annotator in annotators and len(people) < votes_per_pair:
            people.add(one.annotator)
    loads = Counter(dict.fromkeys(annotators, 0))
    loads.update(name for people in asked.values() for name in people if name in loads)
    for comparison, people in asked.items():
        free = [name for name in annotators if name not in people]
        free.sort(key=lambda name: (loads[name], _draw(name, comparison)))
        chosen = free[: max(0, votes_per_pair - len(people))]
        people.update(chosen)
        loads.update(chosen)
    _even_out(asked, cast, loads)
    firsts = [Assignment(name, comparison, 0) for comparison in asked for name in asked[comparison]]
    return sorted(firsts + _repeat(firsts, votes, annotators, repeats))


def _even_out(asked: dict[str, set[str]], cast: dict[str, set[str]], loads: Counter[str]) -> None:
    """Move open comparisons from annotators with many to annotators with few, in place."""
    moved = True
    while moved:
        moved = False
        for comparison, people in asked.items():
            for giver in sorted(people - cast.get(comparison, set())):
                takers = [name for name in loads if name not in people]
                taker = min(takers, key=loads.__getitem__, default=giver)
                if loads[giver] - loads[taker] > 1:
                    people.symmetric_difference_update({giver, taker})
                    loads.subtract([giver])
                    loads.update([taker])
                    moved = True


def _repeat(
    firsts: Sequence[Assignment],
    votes: Sequence[Vote],
    annotators: Sequence[str],
    repeats: float,
) -> list[Assignment]:
    """Return the assignments of the second round: those with a vote, and new ones up to a share.

    The last comparisons of a queue are not repeated: too few would stand between.
    """
    chosen = [Assignment(vote.annotator, vote.comparison, 1) for vote in votes if vote.round == 1]
    for name in annotators:
        mine = _in_order([first for first in firsts if first.annotator == name])
        has = {one.comparison for one in chosen if one.annotator == name}
        open_ = [one.comparison for one in mine[: len(mine) - _distance(len(mine))]]
        open_ = sorted(set(open_) - has, key=lambda comparison: _draw(name, comparison))
        num_more = max(0, round(repeats * len(mine)) - len(has))
        chosen += [Assignment(name, comparison, 1) for comparison in open_[:num_more]]
    return chosen


def queue(assignments: Sequence[Assignment]) -> list[Assignment]:
    """Return an annotator's assignments in the order in which the page asks them.

    The order of comparisons is drawn once for all annotators: if people stop early, the first
    comparisons have all their votes. A repeated comparison comes after `DISTANCE` others.
    """
    firsts = _in_order([one for one in assignments if one.round == 0])
    places = {one.comparison: place for place, one in enumerate(firsts)}
    distance = _distance(len(firsts))
    return sorted(
        (one for one in assignments if one.comparison in places),
        key=lambda one: (places[one.comparison] + distance * one.round, one.round),
    )


def left_of(annotator: str, comparison: str, round_: int) -> Literal["first", "second"]:
    """Return which answer an annotator sees on the left.

    It is drawn for each annotator and comparison. The second round shows the other order, so an
    annotator who looks at places alone contradicts themselves.
    """
    is_first = (int(_draw(annotator, comparison), 16) + round_) % 2 == 0
    return "first" if is_first else "second"


def _in_order(assignments: Sequence[Assignment]) -> list[Assignment]:
    return sorted(assignments, key=lambda one: _draw("", one.comparison))


def _distance(num_firsts: int) -> int:
    return max(1, min(DISTANCE, num_firsts // 2))


def _draw(annotator: str, comparison: str) -> str:
    """Return 16 hexadecimal digits that are random, and the same for the same arguments."""
    return xxh3_64_hexdigest(f"{annotator}\0{comparison}".encode())
