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
from orpo_lab.config.command_line import NOT_COMPOSED, as_typed, explain, quoted
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


def compose(*overrides: str, config_dir: Path | str | None = None) -> Experiment:
    """Compose and check the configuration of a run.

    Args:
        overrides: as on the command line, `group=option` or `key=value`. Overrides of Hydra's own
            settings, such as `hydra.run.dir`, are refused: the folder is an argument of `train`.
        config_dir: a folder with recipes and options of your own, as `--config-dir` of the command
            line; None: there is none.

    Raises:
        UserError: a key, an option or a value is unknown, choices do not fit together, or there is
            no such folder; the text names what to change.
    """
    composed = compose_unchecked(*overrides, config_dir=config_dir)
    loaded = config.load(config.without_hydra(composed))
    # As a run from the command line keeps it, for the command that repeats the run
    own = [] if config_dir is None else [f"--config-dir={Path(config_dir).absolute()}"]
    return Experiment(loaded, dict(composed.hydra.runtime.choices), [*own, *overrides])


def compose_unchecked(*overrides: str, config_dir: Path | str | None = None) -> DictConfig:
    """Compose the configuration of a run with Hydra's own part; `config.load` would check it.

    Raises:
        UserError: a key or an option is unknown, the overrides are of Hydra's own settings, or
            there is no folder `config_dir`.
    """
    given = [override for override in overrides if override.lstrip("+~").startswith("hydra")]
    if given:
        raise UserError(f"{given[0]} is for the command line; the folder is an argument of train")
    own = []
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise UserError(f"config_dir={config_dir}: there is no such folder")
        own = [f"hydra.searchpath=[{quoted(f'file://{Path(config_dir).absolute()}')}]"]
    config.register()
    guard.check_what_is_composed()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra.compose("config", [*own, *as_typed(overrides)], return_hydra_config=True)
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
