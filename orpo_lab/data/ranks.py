"""Several ranked answers to one prompt -> pairs by a rule; every answer is counted."""

import itertools
from typing import Any

from orpo_lab.data.faults import Tally

# Differences of scores such as 4.2 and 3.2 are compared up to the rounding of their last digit
ROUNDING = 1e-9


def choose(
    ranks: list[float], pairing: str, least_difference: float = 0.0
) -> list[tuple[int, int]]:
    """Return the pairs of answers to one prompt as indices, the better answer of each pair first.

    Answers with the same rank never make a pair.

    Args:
        ranks: a rank for each answer; lower is better. A score is a rank with its sign changed.
        pairing: best_worst (one pair), adjacent (each with the next), all (each with each), or
            margin (each with each whose ranks differ by at least `least_difference`).
        least_difference: read by `margin` alone.
    """
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    least = 0.0
    match pairing:
        case "best_worst":
            pairs = [(order[0], order[-1])] if order else []
        case "adjacent":
            pairs = list(itertools.pairwise(order))
        case _:
            pairs = list(itertools.combinations(order, 2))
            least = least_difference - ROUNDING if pairing == "margin" else 0.0
    return [
        (better, worse)
        for better, worse in pairs
        if ranks[better] < ranks[worse] and ranks[worse] - ranks[better] >= least
    ]


class Answers:
    """Counts answers as paired or as left out, with the reason."""

    def __init__(self) -> None:
        self._num = 0
        self._left_out = Tally()

    def add(self, number: int, num: int, left_out: list[str]) -> None:
        """Count the answers of a row.

        Args:
            number: the number of the row.
            num: how many answers the row holds.
            left_out: for each answer in no pair, why.
        """
        self._num += num
        for reason in left_out:
            self._left_out.add(reason, number)

    def report(self, name: str) -> dict[str, Any]:
        """Return `num_<name>`, `num_paired` and `left_out`; the last two add up to the first."""
        left_out = self._left_out.report()
        num_left_out = sum(tally["num"] for tally in left_out.values())
        return {
            f"num_{name}": self._num,
            "num_paired": self._num - num_left_out,
            "left_out": left_out,
        }


def not_compared(num: int, pairs: list[tuple[int, int]]) -> list[str]:
    """Return a reason for each of `num` ranked answers that stands in no pair."""
    return ["not_compared"] * (num - len({answer for pair in pairs for answer in pair}))
