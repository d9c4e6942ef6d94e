"""Checks of values; their error messages name the key to change.

Keys are given as Python names, with `__` instead of a dot: `train__max_steps` is `train.max_steps`.
"""

import difflib
from collections.abc import Iterable

# The value of a key whose choice is left to the lab
AUTO = "auto"
# The values of a switch. A switch is a text, since OmegaConf cannot merge a field that holds a text
# or a boolean (2.3.1). YAML's true becomes the text True
SWITCH = (AUTO, "true", "false")


def check(condition: bool, message: str) -> None:
    """Raise a `ValueError` with the message if the condition is false."""
    if not condition:
        raise ValueError(message)


def at_least(low: float, **values: float | None) -> None:
    """Raise a `ValueError` if a value is below `low` or NaN; None passes."""
    for key, value in values.items():
        key = key.replace("__", ".")
        check(value is None or value >= low, f"{key}={value} must be at least {low:g}")


def one_of(allowed: tuple[str, ...], **values: str) -> None:
    """Raise a `ValueError` if a value is not one of the allowed values."""
    for key, value in values.items():
        key = key.replace("__", ".")
        check(
            value in allowed,
            f"{key}={value} must be one of {', '.join(allowed)}{meant(closest(value, allowed))}",
        )


def closest(typed: str, options: Iterable[str]) -> str | None:
    """Return the option that is spelled most like what was typed; None: none is close."""
    return next(iter(difflib.get_close_matches(typed.lower(), [*options], n=1)), None)


def meant(option: str | None) -> str:
    """Return a sentence with what the user probably meant; empty: that is not known."""
    return f". Did you mean '{option}'?" if option else ""
