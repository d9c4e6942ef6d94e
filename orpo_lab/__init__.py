"""orpo_lab: ORPO experiments (Hong, Lee and Thorne 2024, arXiv:2403.07691) that can be compared.

    from orpo_lab import compose, train

This file imports nothing at first, so that `python launch.py --help` and the error for a typo are
fast. See `api.py`. A run starts in `orpo_lab.run.train`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orpo_lab.api import compose, train

__version__ = "0.1.0"
__all__ = ["compose", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from orpo_lab import api

    return getattr(api, name)
