"""Keys of `train`: length, batch size and intervals of a run."""

import math
from dataclasses import dataclass

from orpo_lab.config.checks import SWITCH, at_least, check, one_of
from orpo_lab.config.policy import free, setting, switch


@dataclass(kw_only=True)
class Train:
    """Length, batch size and intervals of a run."""

    max_steps: int | None = setting()
    num_epochs: float | None = setting()
    batch_size: int = setting()
    lr_scheduler_type: str = setting()
    warmup_steps: float = setting(unread_under={"train.lr_scheduler_type": "constant"})
    max_grad_norm: float = setting()
    gradient_checkpointing: str = switch()
    sharding: str = setting()
    logging_steps: int = free()
    meter_steps: int | None = free()
    eval_steps: int | None = free()
    save_steps: int | None = free()
    num_checkpoints: int = free()
    forks: bool = free()
    max_hours: float | None = free()
    on_nonfinite: str = setting()
    max_skipped_steps: int = setting(unread_under={"train.on_nonfinite": "stop"})

    def __post_init__(self) -> None:
        at_least(
            1,
            train__max_steps=self.max_steps,
            train__batch_size=self.batch_size,
            train__logging_steps=self.logging_steps,
            train__meter_steps=self.meter_steps,
            train__eval_steps=self.eval_steps,
            train__save_steps=self.save_steps,
            train__num_checkpoints=self.num_checkpoints,
            train__max_skipped_steps=self.max_skipped_steps,
        )
        check(
            self.max_hours is None or 0 < self.max_hours < math.inf,
            f"train.max_hours={self.max_hours} must be above 0, or null for no limit",
        )
        self.gradient_checkpointing = self.gradient_checkpointing.lower()
        one_of(SWITCH, train__gradient_checkpointing=self.gradient_checkpointing)
        one_of(("none", "full"), train__sharding=self.sharding)
        one_of(("stop", "skip"), train__on_nonfinite=self.on_nonfinite)
        at_least(0, train__warmup_steps=self.warmup_steps, train__max_grad_norm=self.max_grad_norm)
        check(
            (self.max_steps is None) != (self.num_epochs is None),
            "set exactly one of train.max_steps and train.num_epochs, and the other to null",
        )
        check(
            self.num_epochs is None or 0 < self.num_epochs < math.inf,
            f"train.num_epochs={self.num_epochs} must be above 0",
        )
        check(
            self.warmup_steps < 1 or self.warmup_steps == int(self.warmup_steps),
            f"train.warmup_steps={self.warmup_steps} must be a whole number, or a fraction below 1",
        )
        one_of(
            ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"),
            train__lr_scheduler_type=self.lr_scheduler_type,
        )
