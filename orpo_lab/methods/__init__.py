"""Methods of alignment: pure functions from the sums of a batch to its loss and named terms.

No other package knows a method by its name. An engine sums log-probabilities, calls the method for
the loss, and logs the terms that the method returns.
"""

from orpo_lab.config import Config
from orpo_lab.config.method import (
    CpoMethod,
    DpoMethod,
    IpoMethod,
    KtoMethod,
    OrpoMethod,
    SftMethod,
    SimpoMethod,
)
from orpo_lab.methods.base import Method
from orpo_lab.methods.cpo import Cpo, Simpo
from orpo_lab.methods.dpo import Dpo, Ipo
from orpo_lab.methods.kto import Kto
from orpo_lab.methods.orpo import Orpo
from orpo_lab.methods.sft import Sft


def build(config: Config) -> Method:
    """Return the method of a run."""
    match config.method:
        case OrpoMethod() as orpo:
            return Orpo(orpo)
        case SftMethod() as sft:
            return Sft(sft)
        case DpoMethod() as dpo:
            return Dpo(dpo)
        case IpoMethod():
            return Ipo()
        case KtoMethod() as kto:
            return Kto(kto)
        case SimpoMethod() as simpo:
            return Simpo(simpo)
        case CpoMethod() as cpo:
            return Cpo(cpo)
    raise TypeError(f"no method: {config.method!r}")
