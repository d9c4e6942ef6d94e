"""Full parameters with low-rank gradients (GaLore, Zhao et al. 2024, arXiv:2403.03507).

Each projected weight's gradient G [m, n] is projected to P^T G [r, n] (or G Q [m, r]), Adam runs
there, and the update is projected back and multiplied by `scale` (the paper's alpha). P and Q are
G's first r singular vectors, taken anew every `update_proj_gap` steps. galore-torch does it.
"""

import logging

import torch
from torch import nn
from transformers import PreTrainedModel

from orpo_lab.config import Galore
from orpo_lab.errors import UserError
from orpo_lab.model import projections
from orpo_lab.optimizer import adam_arguments, decay_groups

log = logging.getLogger(__name__)

# The published values (GaLore's README), which a small model or a short run has no room for
MAX_RANK = 128
MAX_GAP = 200
# With fewer refreshes the subspace hardly moves, and the run tells nothing about GaLore
MIN_REFRESHES = 3


def check(config: Galore) -> None:
    """Refuse what galore-torch 1.0 cannot do, before a model is loaded.

    Raises:
        UserError: `optimizer.bits=8`.
    """
    if config.bits == 8:
        raise UserError(
            "optimizer.bits=8: galore-torch's 8-bit class passes its settings in an order that "
            "bitsandbytes has since changed (it would run with max_unorm=100 and skip_zeros=True) "
            "and needs a GPU; use optimizer.bits=32"
        )


def default_rank(hidden_size: int) -> int:
    """Return a quarter of the hidden size, at most 128."""
    return max(1, min(MAX_RANK, hidden_size // 4))


def default_gap(num_steps: int) -> int:
    """Return a fifth of the run, at most 200."""
    return max(1, min(MAX_GAP, num_steps // 5))


def build(config: Galore, model: PreTrainedModel, num_steps: int) -> torch.optim.Optimizer:
    """Return galore-torch's AdamW: attention and MLP projected, everything else by plain Adam.

    Says how many weights are projected, and warns where the settings make it plain Adam.
    """
    from galore_torch import GaLoreAdamW
    from galore_torch.galore_projector import GaLoreProjector

    # A checkpoint holds the projector object, which torch refuses to load otherwise
    torch.serialization.add_safe_globals([GaLoreProjector])
    projected = [layer.weight for layer in projections(model).values()]
    rank = config.rank or default_rank(model.config.get_text_config().hidden_size)
    gap = config.update_proj_gap or default_gap(num_steps)
    _say(projected, rank, gap, num_steps, model)

    names = {id(weight) for weight in projected}
    others = {name: p for name, p in model.named_parameters() if id(p) not in names}
    low_rank = {
        "params": projected,
        "weight_decay": config.weight_decay,
        "rank": rank,
        "update_proj_gap": gap,
        "scale": config.scale,
        "proj_type": config.proj_type,
    }
    return GaLoreAdamW(
        [low_rank, *decay_groups(config, others)],
        no_deprecation_warning=True,
        **adam_arguments(config),
    )


def num_refreshes(num_steps: int, gap: int) -> int:
    """Return how often a run takes a new basis, the first one included."""
    return -(-num_steps // gap)


def _say(
    projected: list[torch.Tensor], rank: int, gap: int, num_steps: int, model: nn.Module
) -> None:
    log.info(
        "galore: %d weights (%s of %s parameters) are projected to rank %d, anew every %d steps",
        len(projected),
        f"{sum(weight.numel() for weight in projected):,}",
        f"{sum(p.numel() for p in model.parameters()):,}",
        rank,
        gap,
    )
    full = sum(2 * rank >= min(weight.shape) for weight in projected)
    if full:
        log.warning(
            "galore: rank %d is not below half the smaller side of %d of %d weights, where it "
            "saves little and is nearly plain Adam; lower optimizer.rank",
            rank,
            full,
            len(projected),
        )
    refreshes = num_refreshes(num_steps, gap)
    if refreshes < MIN_REFRESHES:
        log.warning(
            "galore: %d steps take a basis %d times, fewer than %d: this is nearly plain Adam in a "
            "fixed subspace; lower optimizer.update_proj_gap=%d or train longer",
            num_steps,
            refreshes,
            MIN_REFRESHES,
            gap,
        )
