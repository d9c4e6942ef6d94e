"""Keys of `plan`: what happens to a run that by its plan does not fit."""

from dataclasses import dataclass

from orpo_lab.config.checks import one_of
from orpo_lab.config.policy import free


@dataclass(kw_only=True)
class Planning:
    """What a plan of memory and time may do to a run."""

    check: str = free()

    def __post_init__(self) -> None:
        # YAML reads off as a boolean
        self.check = {"False": "off"}.get(self.check, self.check)
        one_of(("warn", "refuse", "off"), plan__check=self.check)
