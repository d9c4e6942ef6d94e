"""Faults of rows, and what happens to a row with a fault according to `dataset.faults`."""

import bisect
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from orpo_lab.config.dataset import Faults
from orpo_lab.errors import UserError

# How many row numbers the report lists per fault; its count is of all such rows
NUM_ROWS_LISTED = 20
# How many characters of a row a message quotes
NUM_QUOTED = 40


class Fault(Exception):  # noqa: N818  # a fault of the data, not of the program
    """What is wrong with a row.

    Args:
        name: the name of the fault; most names are keys of `dataset.faults`.
        detail: a line that says what is wrong with this row.
    """

    def __init__(self, name: str, detail: str) -> None:
        super().__init__(name, detail)
        self.name = name
        self.detail = detail


def quote(value: str) -> str:
    """Return the beginning of a text of the data, as one line that any terminal can print."""
    return ascii(value if len(value) <= NUM_QUOTED else value[:NUM_QUOTED] + "...")[1:-1]


class Tally:
    """Counts of rows by reason, with their lowest numbers and an example for each reason."""

    def __init__(self) -> None:
        self._nums: dict[str, int] = defaultdict(int)
        self._lowest: dict[str, list[int]] = defaultdict(list)
        self._examples: dict[str, str] = {}

    def add(self, reason: str, number: int, detail: str = "") -> None:
        """Count a row for a reason; the first `detail` of a reason becomes the example."""
        self._nums[reason] += 1
        lowest = self._lowest[reason]
        if number not in lowest:
            bisect.insort(lowest, number)
            del lowest[NUM_ROWS_LISTED:]
        if detail:
            self._examples.setdefault(reason, detail)

    def num(self, reason: str) -> int:
        """Return how many rows were counted for a reason."""
        return self._nums.get(reason, 0)

    def report(self, listed: Callable[[int], Any] = int) -> dict[str, dict[str, Any]]:
        """Return for each reason `num`, the lowest row numbers, and the example if it has one.

        Args:
            listed: makes an entry of the report from a row number.
        """
        return {
            reason: {"num": num, "rows": list(map(listed, self._lowest[reason]))}
            | ({"example": self._examples[reason]} if reason in self._examples else {})
            for reason, num in self._nums.items()
        }

    def examples(self) -> str:
        """Return the example of each reason, at most three."""
        some = list(self._examples.items())[:3]
        return "; ".join(f"{reason}: {detail}" for reason, detail in some)

    def __bool__(self) -> bool:
        return bool(self._nums)

    def __str__(self) -> str:
        return ", ".join(f"{num} {reason}" for reason, num in self._nums.items())


def keeps(fault: Fault, where: str, policies: Faults) -> bool:
    """Return whether a row is kept in spite of its fault; False: the row is dropped.

    A fault without a policy (a pair too long for `dataset.overlong`) drops the row.

    Args:
        fault: what is wrong with the row.
        where: names the row in a message.
        policies: the policy for each fault.

    Raises:
        UserError: the policy of the fault is `refuse`.
    """
    match getattr(policies, fault.name, "drop"):
        case "refuse":
            raise UserError(
                f"{where}: {fault.detail}; put it right, or leave such rows out with "
                f"dataset.faults.{fault.name}=drop"
            )
        case "keep":
            return True
    return False
