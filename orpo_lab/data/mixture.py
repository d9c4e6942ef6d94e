"""How many pairs of each source a mixture takes, and in which order its pairs stand."""

import itertools
import logging
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from orpo_lab.config.mixture import SOURCES, MixtureDataset
from orpo_lab.errors import UserError

log = logging.getLogger(__name__)

# Weights are read up to this part of a whole, so that 0.7 and 0.3 are shares of exactly 7 and 3
PRECISION = 10**6
# The column with the name of a pair's source
SOURCE = "source"


def share_out(weights: Mapping[str, float], total: int) -> dict[str, int]:
    """Return each source's number of pairs of a total: its share, rounded.

    The numbers add up to the total: what rounding down leaves goes to the largest remainders
    (Hamilton's method), and of equal remainders to the source that comes first.
    """
    exact = {name: share * total for name, share in _shares(weights).items()}
    nums = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: nums[name] - exact[name])
    for name in by_remainder[: total - sum(nums.values())]:
        nums[name] += 1
    return nums


def largest_total(weights: Mapping[str, float], available: Mapping[str, int]) -> int:
    """Return the largest total of which every source can give its share.

    Args:
        weights: by source.
        available: the number of pairs that each source can give.
    """
    return min(int(available[name] / share) for name, share in _shares(weights).items())


def _shares(weights: Mapping[str, float]) -> dict[str, Fraction]:
    exact = {name: Fraction(round(weight * PRECISION)) for name, weight in weights.items()}
    total = sum(exact.values())
    return {name: weight / total for name, weight in exact.items()}


class Shares:
    """The number of training pairs that each source of a mixture gives."""

    def __init__(self, config: MixtureDataset) -> None:
        self._sources = config.sources
        self._weights = {
            name: source.weight for name, source in config.sources.items() if source.weight
        }
        self._wanted = {name: source.num_train for name, source in config.sources.items()}
        if self._weights and config.num_train:
            self._wanted |= _shared_out(self._weights, config.num_train)

    def to_judge(self, name: str) -> int | None:
        """Return how many good pairs of a source are looked for; None: all it has."""
        return self._wanted[name]

    def to_take(self, good: Mapping[str, int]) -> dict[str, int]:
        """Return how many pairs of each source are trained on, repeats included.

        A source that cannot give its share or count gives what it can, and a warning says so.

        Args:
            good: the number of good pairs that were found of each source.
        """
        can_give = {name: num * self._sources[name].max_repeats for name, num in good.items()}
        if self._weights and None in self._wanted.values():
            return _shared_out(self._weights, largest_total(self._weights, can_give))
        taken = {}
        for name, num in good.items():
            wanted = self._wanted[name]
            taken[name] = num if wanted is None else min(wanted, can_give[name])
            if wanted is not None and taken[name] < wanted:
                log.warning(
                    "WARNING: %s: it has %d good pairs, which is %d too few for the %d it should "
                    "give; %d are trained on. %s.%s.max_repeats=%d would repeat pairs to fill up",
                    name,
                    num,
                    wanted - taken[name],
                    wanted,
                    taken[name],
                    SOURCES,
                    name,
                    -(-wanted // num),
                )
        return taken


def _shared_out(weights: Mapping[str, float], total: int) -> dict[str, int]:
    """Return what `share_out` returns, if every source has a pair to give.

    Raises:
        UserError: a source has none.
    """
    nums = share_out(weights, total)
    if nothing := [name for name, num in nums.items() if not num]:
        name = nothing[0]
        raise UserError(
            f"{SOURCES}.{name}.weight={weights[name]:g} gives {name} no pair of the {total} that "
            "weights share out; raise it, leave the source out, or raise the total (more pairs of "
            "the other sources, max_repeats, dataset.num_train)"
        )
    return nums


def interleave(nums: list[int]) -> npt.NDArray[np.intp]:
    """Return the order in which the pairs of all sources stand, as places among all of them.

    Each source is spread evenly over the whole, in the order of its pairs. Pair k of n stands at
    (k + 1/2) / n of the way; of two at one place the earlier source comes first.

    Args:
        nums: the number of pairs of each source; their places follow each other.
    """
    ways = [(2 * np.arange(num) + 1) / (2 * num) for num in nums if num]
    return np.argsort(np.concatenate(ways), kind="stable")


def add_up(reports: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the report of all sources together: the sums of what is counted, and each report."""
    counted = dict.fromkeys(
        key
        for report in reports.values()
        for key, value in report.items()
        if key.startswith("num_") and isinstance(value, int)
    )
    summed: dict[str, Any] = {
        key: sum(report.get(key, 0) for report in reports.values()) for key in counted
    }
    for key in ("dropped", "kept"):
        faults = dict.fromkeys(itertools.chain(*(report[key] for report in reports.values())))
        summed[key] = {
            fault: {
                "num": sum(report[key].get(fault, {"num": 0})["num"] for report in reports.values())
            }
            for fault in faults
        }
    return summed | {"sources": dict(reports)}
