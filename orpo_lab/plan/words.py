"""A plan as lines of text."""

from collections.abc import Iterable, Sequence
from datetime import timedelta

from orpo_lab.config import Config
from orpo_lab.config.engine import TrlEngine
from orpo_lab.plan.planned import Plan

# Part of `Memory` -> what it is
MEMORY = {
    "frozen": "weights, frozen",
    "trained": "weights, trained",
    "gradients": "gradients",
    "moments": "moments",
    "bases": "GaLore's bases",
    "updates": "GaLore's updates",
    "activations": "activations",
    "head": "output head",
    "working": "backward of a layer",
    "evaluation": "evaluation",
}
TIME = {
    "load": "load",
    "before": "evaluate before",
    "reference": "compute reference",
    "steps": "steps",
    "evaluation": "evaluate on the way",
    "saving": "save",
    "after": "evaluate after",
}


def gb(size: float) -> str:
    """Return bytes as text in GB of 1e9 bytes, or in MB below a tenth of that."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def duration(seconds: float) -> str:
    """Return seconds as text."""
    return f"{seconds:.1f} s" if seconds < 100 else str(timedelta(seconds=round(seconds)))


def text(plan: Plan, config: Config, lower: Sequence[tuple[str, str]]) -> list[str]:
    """Return a plan in lines.

    Args:
        plan: of a run.
        config: the run's configuration.
        lower: for each remedy its overrides and what the run would take with them.
    """
    card, memory, seconds = plan.card, plan.memory, plan.seconds
    how = "with" if plan.checkpointing else "without"
    parts = memory.parts()
    rate = f"calibrated {card.calibrated}" if card.calibrated else "not calibrated, assumed rates"
    on = card.name if plan.processes == 1 else f"each of {plan.processes} x {card.name}"
    lines = [
        f"memory on {on} ({gb(card.memory)} for tensors), {how} gradient checkpointing, "
        f"a micro-batch of {plan.tokens:,} tokens",
        *(f"  {what:22}{gb(parts[name]):>12}" for name, what in MEMORY.items() if parts[name]),
        *(f"  peak: {phase:16}{gb(size):>12}" for phase, size in memory.phases.items()),
        f"  {'needed, with margin':22}{gb(memory.needed):>12}",
        f"time on {on} ({rate}), {plan.num_steps:,} steps of {config.train.batch_size} "
        f"{config.unit} of {plan.lengths.mean_tokens:,.0f} tokens, in micro-batches of up to "
        f"{plan.budget:,}",
        *(
            f"  {what:22}{duration(took):>12}"
            for name, what in TIME.items()
            if (took := getattr(seconds, name))
        ),
        f"  {'together':22}{duration(seconds.total):>12}",
        f"lengths: {plan.lengths.source}",
    ]
    return [*lines, *verdict(plan, config, lower)]


def verdict(plan: Plan, config: Config, lower: Iterable[tuple[str, str]]) -> list[str]:
    """Return whether a run fits, and what is the most that fits or what to change."""
    lines = []
    if plan.fits and isinstance(config.engine, TrlEngine):
        num = plan.largest_budget * config.engine.micro_batch_size // plan.tokens
        lines.append(f"fits; the largest engine.micro_batch_size is {num}")
    elif plan.fits:
        lines.append(
            f"fits; the largest engine.tokens_per_microbatch is {plan.largest_budget:,} (any "
            "train.batch_size fits: its pairs are read in micro-batches)"
        )
    else:
        lines.append(f"does not fit: {gb(plan.memory.needed - plan.card.memory)} too much")
        lines += [f"  {override:40}{what}" for override, what in lower]
    if too_long(plan, config):
        lines.append(
            f"train.max_hours={config.train.max_hours} is below the {duration(plan.seconds.total)} "
            "that the run takes; it would stop before its last step"
        )
    return lines


def too_long(plan: Plan, config: Config) -> bool:
    """Return whether `train.max_hours` would stop a run before its end."""
    hours = config.train.max_hours
    return hours is not None and plan.seconds.total > hours * 3600
