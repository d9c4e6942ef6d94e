"""How many optimizer steps a run takes; a preview asks too, so nothing heavy is imported here."""

import logging
import math

from orpo_lab.config import Config, kind
from orpo_lab.config.engine import TrlEngine
from orpo_lab.errors import UserError

log = logging.getLogger(__name__)

# The largest number of epochs in the published recipes of conf/experiment/
MAX_EPOCHS = 10


def count_steps(config: Config, num_pairs: int) -> int:
    """Return the number of the run's optimizer steps; an epoch has whole batches only.

    Raises:
        UserError: `train.batch_size` is above the number of training pairs.
    """
    per_epoch = num_pairs // config.train.batch_size
    if per_epoch == 0:
        raise UserError(
            f"train.batch_size={config.train.batch_size} is above the {num_pairs} training "
            f"{config.unit}; lower it"
        )
    if config.train.max_steps is not None:
        return config.train.max_steps
    assert config.train.num_epochs is not None
    return math.ceil(per_epoch * config.train.num_epochs)


def check_dealt(config: Config, num_held_out: int, num_processes: int) -> None:
    """Check that each process of a run gets a pair of every step, and a held-out pair.

    Raises:
        UserError: there are too few pairs, or the engine works in one process only.
    """
    if num_processes == 1:
        return
    if isinstance(config.engine, TrlEngine):
        raise UserError("engine=trl trains in one process; use engine=shared_prefix")
    for what, num in (
        (f"train.batch_size={config.train.batch_size}", config.train.batch_size),
        (f"the number of held-out {config.unit} ({num_held_out})", num_held_out),
    ):
        if num < num_processes:
            raise UserError(
                f"{what} is below the {num_processes} processes of this run, and each of them "
                "takes at least one; raise it, or start fewer processes"
            )


def say_length(config: Config, num_pairs: int) -> None:
    """Log the number of epochs; warn of many epochs, and of rates and betas that stop a run."""
    num_steps, train = count_steps(config, num_pairs), config.train
    num_epochs = num_steps / (num_pairs // train.batch_size)
    is_often = num_epochs > MAX_EPOCHS
    log.log(
        logging.WARNING if is_often else logging.INFO,
        "%d steps are %.3g epochs of %d %s%s",
        num_steps,
        num_epochs,
        num_pairs,
        config.unit,
        f", more than the {MAX_EPOCHS} of any published recipe here: see train.max_steps"
        if is_often
        else "",
    )
    warms_up = train.lr_scheduler_type != "constant"
    if warms_up and num_steps < train.warmup_steps:
        log.warning(
            "train.warmup_steps=%d is above the %d steps of this run: the learning rate ends at "
            "%.3g of its peak; lower it, or give a fraction of the run (0.1)",
            train.warmup_steps,
            num_steps,
            (num_steps - 1) / train.warmup_steps,
        )
    ends_at_zero = config.beta_schedule.reads_beta_end and config.beta_end == 0
    if ends_at_zero and config.method.reads_beta and not config.method.learns_at_beta_zero:
        log.warning(
            "beta_end=0: method=%s learns nothing at a beta of 0, so the last steps of this run "
            "change little; give beta_end=%g for instance",
            kind(config.method),
            config.beta / 2,
        )
