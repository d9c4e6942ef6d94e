"""Use this package from Python: overrides in, `RunResult` out.

    from orpo_lab import compose, train

    result = train(compose("optimizer=galore", "beta=0.2"), "outputs/mine")
    print(result.summary["after"]["preference_accuracy"])

The overrides are those of the command line. What the command line refuses is refused here too.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra import initialize_config_dir
from omegaconf import DictConfig

from orpo_lab import config, environment
from orpo_lab.config import guard
from orpo_lab.config.command_line import NOT_COMPOSED, as_typed, explain
from orpo_lab.config.folder import CONF
from orpo_lab.errors import UserError
from orpo_lab.records.run_folder import RunFolder

if TYPE_CHECKING:
    from orpo_lab.run import RunResult


@dataclass(frozen=True)
class Experiment:
    """A run whose configuration is composed and checked; the run has not begun."""

    config: config.Config
    choices: dict[str, str]
    """The option chosen in every config group."""
    overrides: list[str]
    """The overrides, as given."""


def compose(*overrides: str) -> Experiment:
    """Compose and check the configuration of a run.

    Args:
        overrides: as on the command line, `group=option` or `key=value`. Overrides of Hydra's own
            settings, such as `hydra.run.dir`, are refused: the folder is an argument of `train`.

    Raises:
        UserError: a key, an option or a value is unknown, or choices do not fit together; the text
            names the key to change.
    """
    composed = compose_unchecked(*overrides)
    loaded = config.load(config.without_hydra(composed))
    return Experiment(loaded, dict(composed.hydra.runtime.choices), list(overrides))


def compose_unchecked(*overrides: str) -> DictConfig:
    """Compose the configuration of a run with Hydra's own part; `config.load` would check it.

    Raises:
        UserError: a key or an option is unknown, or the overrides are of Hydra's own settings.
    """
    given = [override for override in overrides if override.lstrip("+~").startswith("hydra")]
    if given:
        raise UserError(f"{given[0]} is for the command line; the folder is an argument of train")
    config.register()
    guard.check_what_is_composed()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra.compose("config", as_typed(overrides), return_hydra_config=True)
    except NOT_COMPOSED as error:
        raise UserError(explain(error)) from error


def train(experiment: Experiment, folder: Path | str) -> "RunResult":
    """Run an experiment in its folder, and return the result.

    Under torchrun every process calls this function. The first process writes the folder; in the
    others the summary of the result is empty.

    Args:
        experiment: what `compose` has returned.
        folder: the run folder. It may hold the run that `resume=auto` goes on with, but no other
            run.

    Raises:
        UserError: the user can put something right. If the run has begun, `status.json` in the
            folder says what, too.
    """
    if environment.process().index:
        from orpo_lab import run

        return run.follow(experiment.config)
    with RunFolder(Path(folder)).held() as is_free:
        if not is_free:
            raise UserError(f"another process is running in {folder}")
        from orpo_lab import run  # takes seconds, so only after the configuration is checked

        return run.train(
            experiment.config,
            Path(folder),
            choices=experiment.choices,
            overrides=experiment.overrides,
        )
