"""Checks of values, whose refusals name the key to change.

Keys are given as Python names, with `__` in the place of a dot: `train__max_steps` is
`train.max_steps`.
"""


def check(condition: bool, message: str) -> None:
    """Raise a `ValueError` with the message where the condition does not hold."""
    if not condition:
        raise ValueError(message)


def at_least(low: float, **values: float | None) -> None:
    """Refuse a given value below `low`; NaN is below everything."""
    for key, value in values.items():
        key = key.replace("__", ".")
        check(value is None or value >= low, f"{key}={value} must be at least {low:g}")


def one_of(allowed: tuple[str, ...], **values: str) -> None:
    """Refuse a value that is not among those allowed."""
    for key, value in values.items():
        key = key.replace("__", ".")
        check(value in allowed, f"{key}={value} must be one of {', '.join(allowed)}")
