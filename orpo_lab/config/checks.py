"""Checks of values; their error messages name the key to change.

Keys are given as Python names, with `__` instead of a dot: `train__max_steps` is `train.max_steps`.
"""


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
        check(value in allowed, f"{key}={value} must be one of {', '.join(allowed)}")
