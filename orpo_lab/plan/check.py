"""A run's plan: made before its weights are loaded, and kept for its summary."""

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from orpo_lab import memory
from orpo_lab.config import Config
from orpo_lab.errors import UserError, one_line
from orpo_lab.plan import cards

if TYPE_CHECKING:
    from orpo_lab.data import Data
    from orpo_lab.plan.planned import Plan

log = logging.getLogger(__name__)


def before_loading(
    config: Config, own: PretrainedConfig, pairs: "Data", processes: int
) -> "Plan | None":
    """Return a run's plan on this machine, and say if it cannot fit.

    A plan that cannot be made is none: no run ends for that. On a CPU there is a plan only where
    `plan.check` is refuse: a plan takes a second or two, which is much of a short run, and a CPU's
    measured peak is that of the process with its libraries.

    Args:
        config: the run's configuration; `plan.check` says what happens.
        own: the model's own configuration.
        pairs: the tokenized pairs.
        processes: number of processes that train together.

    Raises:
        UserError: the run cannot fit, and `plan.check` is refuse.
    """
    card = cards.this_machine()
    if config.plan.check == "off" or not (card.is_gpu or config.plan.check == "refuse"):
        return None
    # These imports take a moment that most runs on a CPU do not need
    from orpo_lab.plan import lengths, planned

    try:
        plan = planned.plan(config, own, card, lengths.of_data(pairs), processes)
    except Exception as error:
        log.debug("no plan: %s", one_line(error), exc_info=True)
        return None
    for trouble in troubles(plan, config):
        if config.plan.check == "refuse":
            raise UserError(f"{trouble} (plan.check=warn tries it all the same)")
        log.warning("warning: %s", trouble)
    return plan


def troubles(plan: "Plan", config: Config) -> Iterator[str]:
    """Yield a sentence for each limit that a plan does not keep, with the keys to change."""
    from orpo_lab.plan.words import duration, gb, too_long

    if not plan.fits:
        yield (
            f"the plan needs {gb(plan.memory.needed)} and {plan.card.name} has "
            f"{gb(plan.card.memory)} free; what takes less, in this order: "
            f"{', '.join(memory.remedies(config))}"
        )
    if too_long(plan, config):
        rates = "" if plan.card.calibrated else " by assumed rates"
        yield (
            f"train.max_hours={config.train.max_hours} is below the "
            f"{duration(plan.seconds.total)} of the plan{rates}; raise it, or lower "
            "train.max_steps"
        )


def record(plan: "Plan | None") -> dict[str, Any] | None:
    """Return what a run's summary keeps of its plan; None: there is no plan."""
    if plan is None:
        return None
    figures = plan.figures()
    kept = ("card", "calibrated", "peak_bytes", "needed_bytes", "tokens_of_widest_microbatch")
    return {key: figures[key] for key in kept} | {
        "seconds_of_steps": plan.seconds.steps,
        "seconds": plan.seconds.total,
    }
