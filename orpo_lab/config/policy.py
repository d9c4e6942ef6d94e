"""What a key of the configuration means to a run's identity; `config` puts one beside each key.

A key is a *setting* (the result depends on it), a *lasting* setting (no checkpoint fits another
value of it), a *location* (says where something lies: what lies there identifies the run, not the
place) or *free* (it moves no weight and no held-out figure). `identity` reads these policies.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

Kind = Literal["setting", "lasting", "location", "free"]


@dataclass(frozen=True)
class Policy:
    """What one key means to a run's identity."""

    kind: Kind
    unread_under: tuple[str, Any] | None = None
    """A key and its value under which a run never reads this one: then it identifies nothing."""
    files: tuple[str, ...] = ()
    """Of a location: the files that are read of a folder there; none: it is a name, not a path."""


def _field(policy: Policy, factory: Callable[[], Any] | None = None) -> Any:
    metadata = {"policy": policy}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=MISSING, metadata=metadata)


def setting(
    *, unread_under: tuple[str, Any] | None = None, factory: Callable[[], Any] | None = None
) -> Any:
    """Return a field that a run's result depends on; a resumed run may change it if told to.

    Args:
        unread_under: a key and its value under which no run reads this one.
        factory: makes the default; None: the value is missing until a YAML file gives it.
    """
    return _field(Policy("setting", unread_under=unread_under), factory)


def lasting() -> Any:
    """Return a field that the states in a checkpoint depend on: no resumed run may change it."""
    return _field(Policy("lasting"))


def location(*files: str) -> Any:
    """Return a field that says where something lies.

    Args:
        files: patterns of the files that are read of a folder there; none: it is the name of
            something on the hub, and no path.
    """
    return _field(Policy("location", files=files))


def free() -> Any:
    """Return a field that moves no weight and no held-out figure: it may change at any time."""
    return _field(Policy("free"))
