"""From a typed config to a `torch.optim.Optimizer`."""

import logging
from typing import Any

import torch
from torch import nn

from orpo_lab.config import AdamW, Galore, Lora, Optimizer

log = logging.getLogger(__name__)


def build(config: Optimizer, model: Any, num_steps: int) -> torch.optim.Optimizer:
    """Return the optimizer of the model's trainable parameters.

    Args:
        config: the method and its settings, all of which are honoured.
        model: on its device, with adapters if it has any.
        num_steps: optimizer steps of the whole run; GaLore's refreshes are counted against it.

    Raises:
        UserError: a setting this method cannot honour.
    """
    match config:
        case Lora():
            return _paged_adamw_8bit(config, model)
        case Galore():
            from orpo_lab import galore

            return galore.build(config, model, num_steps)
        case AdamW():
            return torch.optim.AdamW(
                decay_groups(config, dict(model.named_parameters())), **adam_arguments(config)
            )
    raise TypeError(f"no optimizer: {config!r}")


def adam_arguments(config: Optimizer) -> dict[str, Any]:
    """Return Adam's settings under torch's names."""
    return {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }


def decay_groups(config: Optimizer, parameters: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Return parameter groups: matrices with weight decay, norms and biases without."""
    trained = [one for one in parameters.values() if one.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _paged_adamw_8bit(config: Lora, model: nn.Module) -> torch.optim.Optimizer:
    import bitsandbytes as bnb

    optimizer = bnb.optim.PagedAdamW8bit
    if not torch.cuda.is_available():
        log.info("no GPU to page from: 8-bit AdamW instead of its paged form, the same updates")
        optimizer = bnb.optim.AdamW8bit
    groups = decay_groups(config, dict(model.named_parameters()))
    return optimizer(groups, **adam_arguments(config))
