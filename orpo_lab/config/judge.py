"""Keys of `judge`: who compares the answers after training with those before."""

from dataclasses import dataclass

from orpo_lab.config.checks import at_least, check
from orpo_lab.config.policy import free


@dataclass(kw_only=True)
class Judge:
    """Base class of the judges: who compares the answers after training with those before."""


@dataclass(kw_only=True)
class EndpointJudge(Judge):
    """A model behind an OpenAI-compatible endpoint."""

    url: str = free()
    model: str = free()
    key_variable: str = free()
    num_prompts: int | None = free()
    max_new_tokens: int = free()
    concurrency: int = free()
    rate: float | None = free()
    timeout: float = free()
    retries: int = free()

    def __post_init__(self) -> None:
        at_least(
            1,
            judge__num_prompts=self.num_prompts,
            judge__max_new_tokens=self.max_new_tokens,
            judge__concurrency=self.concurrency,
        )
        at_least(0, judge__retries=self.retries)
        for key in ("rate", "timeout"):
            value = getattr(self, key)
            check(value is None or value > 0, f"judge.{key}={value} must be above 0")


@dataclass(kw_only=True)
class NoJudge(Judge):
    """Nobody."""
