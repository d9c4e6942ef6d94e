"""Methods of alignment: pure functions from the sums of a batch to its loss and named terms.

No other package knows a method by its name. An engine sums log-probabilities, calls the method for
the loss, and logs the terms that the method returns.
"""

from orpo_lab.config import Config
from orpo_lab.config.method import OrpoMethod
from orpo_lab.methods.base import Method
from orpo_lab.methods.orpo import Orpo


def build(config: Config) -> Method:
    """Return the method of a run."""
    match config.method:
        case OrpoMethod() as orpo:
            return Orpo(orpo)
    raise TypeError(f"no method: {config.method!r}")
