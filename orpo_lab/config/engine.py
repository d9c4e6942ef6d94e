"""Keys of `engine`: how an optimizer step is computed."""

from dataclasses import dataclass

from orpo_lab.config.checks import SWITCH, at_least, one_of
from orpo_lab.config.policy import setting, switch


@dataclass(kw_only=True)
class Engine:
    """Base class of the engines; never used itself. An engine computes the gradient of a step."""


@dataclass(kw_only=True)
class SharedPrefixEngine(Engine):
    """Our own step: it reads each prompt once, packs pairs into rows, and keeps no full logits."""

    tokens_per_microbatch: int | None = setting()
    compile: str = switch()

    def __post_init__(self) -> None:
        self.compile = self.compile.lower()
        one_of(SWITCH, engine__compile=self.compile)
        at_least(1, engine__tokens_per_microbatch=self.tokens_per_microbatch)


@dataclass(kw_only=True)
class TrlEngine(Engine):
    """TRL's own ORPO step."""

    micro_batch_size: int = setting()

    def __post_init__(self) -> None:
        at_least(1, engine__micro_batch_size=self.micro_batch_size)
