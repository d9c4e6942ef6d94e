"""Policies: what a key of the configuration means to a run's identity.

`config` gives each key a policy, and `identity` reads the policies. There are four kinds:

- *setting*: the run's result depends on the key.
- *lasting*: a setting that cannot change, since no checkpoint fits another value.
- *location*: the key says where something is. The content there identifies the run, not the place.
- *free*: the key changes no weight and no held-out figure.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

Kind = Literal["setting", "lasting", "location", "free"]


@dataclass(frozen=True)
class Policy:
    """What one key means to a run's identity."""

    kind: Kind
    unread_under: Mapping[str, Any] = field(default_factory=dict)
    """Other keys and their values, one or a tuple. With one of these values a run never reads this
    key, so this key does not identify the run."""
    files: tuple[str, ...] = ()
    """For a location: patterns of the files that are read from a folder there. Empty: the location
    is a name, not a path."""
    is_switch: bool = False
    """Whether the values are those of `checks.SWITCH`."""


def _field(policy: Policy, factory: Callable[[], Any] | None = None, default: Any = MISSING) -> Any:
    metadata = {"policy": policy}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def setting(
    *,
    unread_under: Mapping[str, Any] | None = None,
    factory: Callable[[], Any] | None = None,
    default: Any = MISSING,
) -> Any:
    """Return a field that a run's result depends on.

    A resumed run may change the value with `accept_changes=true`.

    Args:
        unread_under: other keys and their values; with one of these values no run reads this key.
            A group's keys are not read either where the group is not.
        factory: makes the default value. None: see `default`.
        default: the default value. MISSING: a YAML file must give the value.
    """
    return _field(Policy("setting", unread_under=unread_under or {}), factory, default)


def switch(*, unread_under: Mapping[str, Any] | None = None) -> Any:
    """Return a setting with the values auto, true and false; YAML may give the last two as such.

    Args:
        unread_under: see `setting`.
    """
    return _field(Policy("setting", unread_under=unread_under or {}, is_switch=True))


def lasting() -> Any:
    """Return a field on which the states in a checkpoint depend; no resumed run may change it."""
    return _field(Policy("lasting"))


def location(*files: str, default: Any = MISSING) -> Any:
    """Return a field that says where something is.

    Args:
        files: patterns of the files that are read from a folder there. None given: the value is a
            name, such as a revision on the hub, and not a path.
        default: the default value. MISSING: a YAML file must give the value.
    """
    return _field(Policy("location", files=files), default=default)


def free(*, factory: Callable[[], Any] | None = None) -> Any:
    """Return a field that changes no weight and no held-out figure; it may change at any time.

    Args:
        factory: makes the default value. None: a YAML file must give the value.
    """
    return _field(Policy("free"), factory)
