"""Keys of `method`: what is optimised."""

from dataclasses import dataclass
from typing import ClassVar

from orpo_lab.config.checks import one_of
from orpo_lab.config.policy import setting


@dataclass(kw_only=True)
class Method:
    """A method of alignment; alone it is never used."""

    more_beta_is_more_preference: ClassVar[bool] = True
    """Whether a higher beta trains further towards the preferred answers, as ORPO's weight of a
    loss does. Where beta holds the model to its start, as DPO's does, it is the other way round."""


@dataclass(kw_only=True)
class OrpoMethod(Method):
    """ORPO, and which reading of its equations is optimised (see docs/method.md)."""

    nll_scope: str = setting()
    nll_mean: str = setting()
    penalty: str = setting()

    def __post_init__(self) -> None:
        one_of(("prompt_and_completion", "completion"), method__nll_scope=self.nll_scope)
        one_of(("tokens", "sequences"), method__nll_mean=self.nll_mean)
        one_of(("log_sigmoid", "log_odds"), method__penalty=self.penalty)


METHODS: dict[str, type[Method]] = {"orpo": OrpoMethod}
