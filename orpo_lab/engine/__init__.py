"""What computes one optimizer step: `check` a model, then `build` its trainer."""

from typing import Any

import torch
from transformers import Trainer

from orpo_lab.config import Config, SharedPrefixEngine, TrlEngine
from orpo_lab.quiet import hidden


def check(config: Config, model: Any, dtype: torch.dtype) -> None:
    """Refuse a model that the engine would train on something else than its sequences.

    Args:
        config: the run.
        model: on its device, with adapters if it has any.
        dtype: precision of the arithmetic.

    Raises:
        UserError: it is such a model; says why, and what to use instead.
    """
    if isinstance(config.engine, SharedPrefixEngine):
        from orpo_lab.engine import shared_prefix

        shared_prefix.check(model, dtype)


def build(config: Config, **parts: Any) -> Trainer:
    """Return the engine's trainer, of a model that `check` has passed.

    Every engine's trainer has an attribute `beta`, read at each step, and logs under TRL's names
    plus `preference_accuracy` and `logp_margin`, which are free of beta. Its attribute
    `token_budget` is None, unless memory ran out and it goes on with smaller micro-batches. See
    `engine.trl.build` for the parts.
    """
    match config.engine:
        case SharedPrefixEngine():
            from orpo_lab.engine import shared_prefix

            return shared_prefix.build(config, **parts)
        case TrlEngine():
            # TRL imports wandb wherever it is installed; its own logging is off, and ours may be
            with hidden("wandb"):
                from orpo_lab.engine import trl

            return trl.build(config, **parts)
    raise TypeError(f"no engine: {config.engine!r}")
