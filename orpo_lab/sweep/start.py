"""The callback that Hydra calls before a sweep's first job, and after each job."""

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from orpo_lab import environment, program
from orpo_lab.config.tracker import Tracker
from orpo_lab.errors import UserError
from orpo_lab.stop import PROCESS
from orpo_lab.sweep.folder import Sweep, fresh_folder
from orpo_lab.sweep.jobs import JOBS

# Launchers that run jobs as processes of this machine
HERE = ("joblib", "submitit_local")


class Start(Callback):
    """Hydra's callback at the start of a sweep; `JOBS.close` is called at its end."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Prepare the sweep: make its folder, give its jobs short names, and begin its record.

        The folder is new, unless the user has named one. Errors end the process.
        """
        launcher = config.hydra.runtime.choices["hydra/launcher"]
        if missing := _missing(launcher):
            sys.exit(f"error: hydra/launcher={launcher} needs {missing}")
        if environment.process().num > 1:
            sys.exit(
                "error: a sweep starts its jobs itself, each in one process; start it with "
                f"{program.command('train')} -m, not with torchrun"
            )
        if not config.hydra.sweep.dir.strip():
            sys.exit("error: hydra.sweep.dir is empty (is a variable unset?); give a folder")
        folder = Path(config.hydra.sweep.dir)
        if not any(
            override.startswith("hydra.sweep.dir=") for override in config.hydra.overrides.hydra
        ):
            folder = fresh_folder(folder)
            with open_dict(config):
                config.hydra.sweep.dir = str(folder)
                # Hydra composes each job again, from the overrides
                config.hydra.overrides.hydra.append(f"hydra.sweep.dir={folder}")
        # The names of jobs hold only the swept values: what all jobs share would make names long
        parsed = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        swept = {override.key_or_group for override in parsed if override.is_sweep_override()}
        if config.hydra.runtime.choices["hydra/sweeper"] == "race":
            swept.add("seed")
        common = [
            override.key_or_group for override in parsed if override.key_or_group not in swept
        ]
        excluded = f"hydra.job.config.override_dirname.exclude_keys=[{','.join(common)}]"
        config.hydra.overrides.hydra.append(excluded)
        folder.mkdir(parents=True, exist_ok=True)
        JOBS.tracker = cast(Tracker, OmegaConf.to_object(config.tracker))
        JOBS.sweep = Sweep(folder)
        try:
            JOBS.sweep.begin(accept_changes=config.accept_changes)
        except UserError as error:
            # Hydra would turn the exception into a warning and go on
            sys.exit(f"error: {error}")
        if launcher in HERE:
            PROCESS.pass_on()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Drop a job's configurations: Hydra would keep those of all jobs until the sweep ends."""
        job_return.cfg = job_return.hydra_cfg = None


def _missing(launcher: str) -> str:
    """Return what a launcher needs that is not here, and what to do; empty: nothing."""
    if launcher == "submitit_slurm" and shutil.which("srun") is None:
        return (
            "Slurm's srun, which is not in PATH; start the sweep on the cluster, or use "
            "hydra/launcher=submitit_local"
        )
    if launcher == "ray" and find_spec("ray") is None:
        return f"ray, which is not installed: {program.install('ray')}"
    return ""
