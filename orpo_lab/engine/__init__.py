"""Engines compute the gradient of an optimizer step: `check` a model, then `build` its engine."""

from functools import partial
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from orpo_lab.config import Config
from orpo_lab.config.engine import SharedPrefixEngine, TrlEngine
from orpo_lab.engine.base import Engine
from orpo_lab.model.causal import CausalModel
from orpo_lab.training.devices import OneDevice
from orpo_lab.training.sharded import devices_of
from orpo_lab.upstream import hidden

if TYPE_CHECKING:
    from orpo_lab.engine.scoring import Scorer


def check(config: Config, model: CausalModel, dtype: torch.dtype) -> None:
    """Refuse a model that the engine would not train correctly.

    Only `shared_prefix` has a check: the model must read a row of pairs as it reads each sequence
    alone.

    Args:
        config: the run's configuration.
        model: on its device, with adapters if it has any.
        dtype: precision of the arithmetic.

    Raises:
        UserError: the engine cannot train the model; the text says why, and what to use instead.
        NonFiniteError: the untrained model's log-probabilities are not finite.
    """
    if isinstance(config.engine, SharedPrefixEngine):
        from orpo_lab.engine import shared_prefix

        shared_prefix.check(model, dtype)


def build(
    config: Config, *, model: CausalModel, tokenizer: PreTrainedTokenizerBase, devices: OneDevice
) -> Engine:
    """Return the engine of a run.

    Args:
        config: the run's configuration.
        model: on its device, with adapters if it has any; `check` has accepted the model.
        tokenizer: with a pad token.
        devices: the device that the model computes on.
    """
    match config.engine:
        case SharedPrefixEngine():
            from orpo_lab.engine import shared_prefix

            return shared_prefix.build(config, model=model, tokenizer=tokenizer, devices=devices)
        case TrlEngine():
            # TRL imports wandb wherever wandb is installed. Nothing here needs that import: TRL's
            # own logging is off, and the run may have another tracker or none
            with hidden("wandb"):
                from orpo_lab.engine import trl

            return trl.build(config, model=model, tokenizer=tokenizer, devices=devices)
    raise TypeError(f"no engine: {config.engine!r}")


def scorer(
    config: Config,
    *,
    model: CausalModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
) -> "Scorer":
    """Return the function that scores held-out pairs: a model is scored as its engine reads pairs.

    `shared_prefix` reads packed rows. TRL's engine also trains models that cannot read rows, so its
    pairs are read as sequences.

    Args:
        config: the run's configuration.
        model: on its device, with adapters if it has any; `check` has accepted the model.
        tokenizer: with a pad token.
        dtype: precision of the arithmetic.
    """
    from orpo_lab.engine import scoring, shared_prefix

    match config.engine:
        case SharedPrefixEngine():
            devices = devices_of(model, dtype).readers
            built = shared_prefix.build(config, model=model, tokenizer=tokenizer, devices=devices)
            return partial(scoring.by_rows, built)
        case TrlEngine():
            return partial(scoring.by_sequences, model, tokenizer)
    raise TypeError(f"no engine: {config.engine!r}")
