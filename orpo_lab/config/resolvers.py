"""Functions that the files in `conf/` call, as in `${slug:...}`."""

import hashlib
import re
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from orpo_lab.config.checks import AUTO
from orpo_lab.redaction import redact


def slug(text: str) -> str:
    """Return `text` as one safe folder name of at most 120 characters.

    A name that is cut ends in a hash of the whole text, so that two long names stay different.
    Secrets are left out.
    """
    plain = re.sub("[\"']", "", redact(text))
    safe = re.sub(r"[^A-Za-z0-9=.,+_-]+", "-", plain).strip("-.") or "run"
    if len(safe) <= 120:
        return safe
    return f"{safe[:107]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def fresh_or_resumed(resume: str | None, fresh: str) -> str:
    """Return the folder that a run writes to: the folder to resume, or `fresh` with safe names."""
    if resume is not None and resume != AUTO:
        return resume
    return "/".join(slug(part) for part in fresh.split("/"))


def largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of `number` up to `limit`; at least 1."""
    return max((divisor for divisor in range(1, limit + 1) if number % divisor == 0), default=1)


def prompt_limit(usual: int, max_length: int) -> int:
    """Return the largest length of a prompt in tokens.

    The result is `usual` if this is below `max_length`, else half of `max_length`.
    """
    return usual if usual < max_length else max_length // 2


def times(number: float, factor: float) -> float:
    """Return a product as a person would write it: 1.5e-05, not 1.4999999999999999e-05."""
    return float(f"{number * factor:.12g}")


def if_read(method: DictConfig, beta: str) -> str:
    """Return what a name says of beta; empty: the method does not read beta."""
    schema: Any = OmegaConf.get_type(method)
    return beta if schema.reads_beta else ""


# The functions, by the names under which `conf/` calls them
RESOLVERS: dict[str, Callable[..., Any]] = {
    "slug": slug,
    "half": lambda length: length // 2,
    "prompt_limit": prompt_limit,
    "divisor": largest_divisor,
    "times": times,
    "if_read": if_read,
    "fresh_or_resumed": fresh_or_resumed,
}
