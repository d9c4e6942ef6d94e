"""What can be wrong with a row, and what becomes of it by `dataset.faults`."""

from collections import defaultdict
from typing import Any

from orpo_lab.config.dataset import Faults
from orpo_lab.errors import UserError

# Row numbers listed per fault in the report; the count beside them is of all
NUM_ROWS_LISTED = 20
# Characters of a row quoted in a message
NUM_QUOTED = 40


class Fault(Exception):  # noqa: N818  # it is one of the data, not of the program
    """What is wrong with a row: the fault's name, and a line that says it of this row."""

    def __init__(self, name: str, detail: str) -> None:
        super().__init__(name, detail)
        self.name = name
        self.detail = detail


def quote(value: str) -> str:
    """Return the beginning of a text of the data as one line that any terminal can print."""
    return ascii(value if len(value) <= NUM_QUOTED else value[:NUM_QUOTED] + "...")[1:-1]


class Tally:
    """Numbers of rows by reason, with an example of each."""

    def __init__(self) -> None:
        self._rows: dict[str, list[int]] = defaultdict(list)
        self._examples: dict[str, str] = {}

    def add(self, reason: str, number: int, detail: str = "") -> None:
        """Count a row; the first detail of a reason is its example."""
        self._rows[reason].append(number)
        if detail:
            self._examples.setdefault(reason, detail)

    def num(self, reason: str) -> int:
        """Return how many rows were counted for a reason."""
        return len(self._rows.get(reason, ()))

    def report(self) -> dict[str, dict[str, Any]]:
        """Return, per reason, `num`, the first row numbers and the example if there is one."""
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
    """Return whether a row is kept in spite of its fault.

    A fault without a policy of its own (a pair too long for `dataset.overlong`) drops the row.

    Raises:
        UserError: the policy is to refuse; `where` names the row.
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
