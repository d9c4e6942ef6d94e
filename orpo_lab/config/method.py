"""Keys of `method`: which objective is optimised."""

from dataclasses import dataclass
from typing import ClassVar

from orpo_lab.config.checks import one_of
from orpo_lab.config.policy import setting


@dataclass(kw_only=True)
class Method:
    """Base class of the methods of alignment; never used itself."""

    more_beta_is_more_preference: ClassVar[bool] = True
    """Whether a higher beta moves the model further towards the chosen answers. True for ORPO,
    where beta is the weight of a loss. False for a method like DPO, where beta keeps the model near
    its start."""


@dataclass(kw_only=True)
class OrpoMethod(Method):
    """ORPO, with the choice of how its equations are read (see docs/method.md)."""

    nll_scope: str = setting()
    nll_mean: str = setting()
    penalty: str = setting()

    def __post_init__(self) -> None:
        one_of(("prompt_and_completion", "completion"), method__nll_scope=self.nll_scope)
        one_of(("tokens", "sequences"), method__nll_mean=self.nll_mean)
        one_of(("log_sigmoid", "log_odds"), method__penalty=self.penalty)


METHODS: dict[str, type[Method]] = {"orpo": OrpoMethod}
