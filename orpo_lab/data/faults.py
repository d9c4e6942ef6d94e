"""Faults of rows, and what happens to a row with a fault according to `dataset.faults`."""

from collections import defaultdict
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
    """Row numbers by reason, with an example for each reason."""

    def __init__(self) -> None:
        self._rows: dict[str, list[int]] = defaultdict(list)
        self._examples: dict[str, str] = {}

    def add(self, reason: str, number: int, detail: str = "") -> None:
        """Count a row for a reason; the first `detail` of a reason becomes the example."""
        self._rows[reason].append(number)
        if detail:
            self._examples.setdefault(reason, detail)

    def num(self, reason: str) -> int:
        """Return how many rows were counted for a reason."""
        return len(self._rows.get(reason, ()))

    def report(self) -> dict[str, dict[str, Any]]:
        """Return for each reason `num`, the lowest row numbers, and the example if it has one."""
        return {
            reason: {"num": len(rows), "rows": sorted(set(rows))[:NUM_ROWS_LISTED]}
            | ({"example": self._examples[reason]} if reason in self._examples else {})
            for reason, rows in self._rows.items()
        }

    def examples(self) -> str:
        """Return the example of each reason, at most three."""
        some = list(self._examples.items())[:3]
        return "; ".join(f"{reason}: {detail}" for reason, detail in some)

    def __bool__(self) -> bool:
        return bool(self._rows)

    def __str__(self) -> str:
        return ", ".join(f"{len(rows)} {reason}" for reason, rows in self._rows.items())


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
