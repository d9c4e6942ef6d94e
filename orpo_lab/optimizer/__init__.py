"""Build the optimizer and the learning rate schedule of a run from its configuration."""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, get_scheduler

from orpo_lab.config import Config
from orpo_lab.config.optimizer import AdamW, Galore, Lora, Optimizer
from orpo_lab.config.train import Train
from orpo_lab.errors import UserError
from orpo_lab.model.projections import projections
from orpo_lab.optimizer.galore import GaLore
from orpo_lab.optimizer.updater import GaLoreUpdater, Updater
from orpo_lab.training.devices import OneDevice, Processes

log = logging.getLogger(__name__)

# GaLore's published values (its README); the defaults are lower for a small model or a short run
MAX_RANK = 128
MAX_GAP = 200
# With fewer refreshes the subspace hardly moves, and the run says nothing about GaLore
MIN_REFRESHES = 3


def build(
    config: Config,
    model: Any,
    *,
    num_steps: int,
    dtype: torch.dtype,
    devices: OneDevice | None = None,
) -> Updater:
    """Return the updater of the model's trainable parameters.

    Args:
        config: the run's configuration; all its optimizer settings are used.
        model: on its device, with adapters if it has any.
        num_steps: number of optimizer steps of the whole run. GaLore's default interval between
            two bases depends on this number.
        dtype: precision of the arithmetic.
        devices: those of the run; None: one process.

    Raises:
        UserError: a setting does not fit this model, this precision or several processes.
    """
    processes = devices if isinstance(devices, Processes) else None
    match config.optimizer:
        case Lora() as lora:
            return Updater(_paged_adamw_8bit(lora, model), model)
        case Galore(implementation="galore_torch") as galore:
            return Updater(_galore_torch(galore, model, num_steps), model)
        case Galore() as galore:
            return GaLoreUpdater(_galore(galore, model, num_steps, dtype, config, processes), model)
        case AdamW() as adamw:
            groups = decay_groups(adamw, dict(model.named_parameters()))
            return Updater(torch.optim.AdamW(groups, **adam_arguments(adamw)), model)
    raise TypeError(f"no optimizer: {config.optimizer!r}")


def share_of_peak(train: Train, num_steps: int) -> Callable[[int], float]:
    """Return the learning rate schedule, one of transformers.

    The schedule is a function from the number of updates so far to the share of the peak learning
    rate, 0 to 1. A warm-up below 1 is a share of the run's steps.
    """
    warmup = train.warmup_steps
    unused = torch.optim.SGD([torch.zeros(1)])  # `get_scheduler` requires an optimizer
    schedule = get_scheduler(
        train.lr_scheduler_type,
        unused,
        num_warmup_steps=int(warmup) if warmup >= 1 else math.ceil(num_steps * warmup),
        num_training_steps=num_steps,
    )
    return schedule.lr_lambdas[0]


def adam_arguments(config: Optimizer) -> dict[str, Any]:
    """Return Adam's settings under torch's names."""
    return {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }


def decay_groups(config: Optimizer, parameters: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Return parameter groups: matrices with weight decay, norms and biases without."""
    trained = [weight for weight in parameters.values() if weight.requires_grad]
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


def _galore(
    config: Galore,
    model: PreTrainedModel,
    num_steps: int,
    dtype: torch.dtype,
    run: Config,
    processes: Processes | None,
) -> GaLore:
    """Return our GaLore optimizer, and log how much memory it takes.

    Raises:
        UserError: layer-wise mode or several processes are combined with fp16, or no weight can be
            projected.
    """
    scaled = dtype == torch.float16
    projects_first = config.layerwise or processes is not None
    if projects_first and scaled:
        what = "optimizer.layerwise=true" if config.layerwise else "GaLore in several processes"
        raise UserError(
            f"{what} needs model.dtype=bf16 or fp32: fp16's loss scaling has to see all gradients "
            "at once"
        )
    optimizer = GaLore(
        _galore_groups(config, model, num_steps),
        **adam_arguments(config),
        bits=config.bits,
        refresh=config.refresh or "warm",
        stagger_refresh=config.stagger_refresh is not False,
        rotate_moments=config.rotate_moments,
        layerwise=config.layerwise,
        max_grad_norm=run.train.max_grad_norm if projects_first else 0.0,
        refresh_in_backward=not scaled,
        processes=processes,
        seed=run.seed,
    )
    for name, row in optimizer.memory().items():
        sizes = ", ".join(f"{kind} {size / 1e6:,.1f}" for kind, size in row.items())
        log.info("galore: memory of %s weights in MB: %s", name, sizes)
    return optimizer


def _galore_torch(config: Galore, model: PreTrainedModel, num_steps: int) -> torch.optim.Optimizer:
    """Return the optimizer of GaLore's authors: exact bases, for all weights at the same step."""
    from galore_torch import GaLoreAdamW
    from galore_torch.galore_projector import GaLoreProjector

    # A checkpoint holds projector objects; without this line torch refuses to load them
    torch.serialization.add_safe_globals([GaLoreProjector])
    return GaLoreAdamW(
        _galore_groups(config, model, num_steps),
        no_deprecation_warning=True,
        **adam_arguments(config),
    )


def _galore_groups(config: Galore, model: PreTrainedModel, num_steps: int) -> list[dict[str, Any]]:
    """Return parameter groups: the linear layers of attention and MLP projected, the rest not.

    Not projected are biases, norms, the output head, embeddings, and weights tied to embeddings. A
    matrix is not projected either if the rank is not below its smaller side.

    Raises:
        UserError: no weight can be projected.
    """
    rank, gap = rank_and_gap(config, model.config, num_steps)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linear = {id(layer.weight): layer.weight for layer in projections(model).values()}
    trained = [p for key, p in linear.items() if key not in embeddings and p.requires_grad]
    projected = [p for p in trained if rank < min(p.shape)]
    if not projected:
        raise UserError(
            f"optimizer.rank={rank} is not below the smaller side of any weight of attention and "
            "MLP: there is nothing to project; lower it, or use optimizer=adamw"
        )
    if len(projected) < len(trained):
        log.info(
            "galore: %d weights have a side that rank %d is not below: plain Adam for them",
            len(trained) - len(projected),
            rank,
        )
    _say(projected, rank, gap, num_steps, model)
    names = {id(p) for p in projected}
    others = {name: p for name, p in model.named_parameters() if id(p) not in names}
    low_rank = {
        "params": projected,
        "weight_decay": config.weight_decay,
        "rank": rank,
        "update_proj_gap": gap,
        "scale": config.scale,
        "proj_type": config.proj_type,
    }
    return [low_rank, *decay_groups(config, others)]


def rank_and_gap(config: Galore, own: PretrainedConfig, num_steps: int) -> tuple[int, int]:
    """Return GaLore's rank and the steps between two bases, as configured or by default.

    Args:
        config: GaLore's configuration.
        own: the model's own configuration.
        num_steps: number of optimizer steps.
    """
    rank = config.rank or default_rank(own.get_text_config().hidden_size)
    return rank, config.update_proj_gap or default_gap(num_steps)


def default_rank(hidden_size: int) -> int:
    """Return GaLore's default rank: a quarter of the hidden size, at most 128."""
    return max(1, min(MAX_RANK, hidden_size // 4))


def default_gap(num_steps: int) -> int:
    """Return GaLore's default interval between two bases: a fifth of the steps, at most 200."""
    return max(1, min(MAX_GAP, num_steps // 5))


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
