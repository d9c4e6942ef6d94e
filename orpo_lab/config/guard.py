"""Guard Hydra: a configuration may name known parts only, and no other code to call.

Our own groups name nothing to call, but some settings of Hydra do. Launchers, sweepers, callbacks
and logging handlers are called by the name that a command line or a config file gives, before a job
sees its configuration. Hydra 1.3 has a list of names to refuse. This module has a list of names to
accept.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import get_args_parser
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from orpo_lab import upstream
from orpo_lab.config import Config, own_files
from orpo_lab.config.command_line import check_below_trackers, explain, text_keys
from orpo_lab.config.identity import flat
from orpo_lab.errors import UserError
from orpo_lab.redaction import redact

KNOWN = {
    "hydra.callbacks": ("orpo_lab.sweep.start.Start",),
    "hydra.sweeper": (
        "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
        "orpo_lab.sweep.race.Race",
    ),
    "hydra.launcher": (
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
        "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
        "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
        "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
        "orpo_lab.sweep.on_ray.RayLauncher",
    ),
}
# Where options come from that are not the user's own; the names are Hydra's
OURS = ("hydra", "main", "schema")
# Called with the configurations of a sweep's jobs, and a line for each job that cannot be composed
Count = Callable[[list[DictConfig], list[str]], None]
# A single folder name: made safe by `slug`, or of safe characters and the number of the job
SUBDIR = re.compile(
    r"\$\{slug:([^/{}]|\$\{[\w.]+\})*\}|(\$\{hydra\.job\.num\}|[\w=+,-]|(?<=\w)\.(?=\w))+"
)


def install(count: Count) -> None:
    """Check Hydra's flags, and let Hydra compose and save through this module.

    Args:
        count: called with the configurations of a sweep's jobs, and a line for each job that cannot
            be composed.

    Raises:
        UserError: a flag is unknown, or would load a pickle or a Python package.
    """
    flags, unknown = get_args_parser().parse_known_intermixed_args()
    if unknown:
        raise UserError(f"{unknown[0]} is no flag; --hydra-help lists those there are")
    if flags.experimental_rerun:
        raise UserError(
            "--experimental-rerun loads a pickle, which may run anything; give the overrides that "
            "stand in the run's choices.yaml"
        )
    _check_place("--config-path", flags.config_path)
    # Hydra accepts no flag between two overrides, so put all flags first
    others = [argument for argument in sys.argv[1:] if argument not in flags.overrides]
    sys.argv[1:] = [*others, *flags.overrides]
    check_what_is_composed()
    for plugin in (*KNOWN["hydra.sweeper"], *KNOWN["hydra.launcher"]):
        if plugin.startswith("orpo_lab."):
            upstream.plug_in(plugin)
    for sweeper in KNOWN["hydra.sweeper"]:
        upstream.sweep_through(
            sweeper,
            saves=RedactingOmegaConf,
            checks=lambda self, batch: count(*leave_out_what_cannot_be(self, batch)),
        )


def check_what_is_composed() -> None:
    """Let Hydra compose through `CheckedLoader` from now on."""
    upstream.compose_through(CheckedLoader)


def leave_out_what_cannot_be(
    sweeper: Any, batch: list[list[str]]
) -> tuple[list[DictConfig], list[str]]:
    """Remove the combinations that cannot be composed from a sweep, and print why; the others run.

    Args:
        sweeper: Hydra's sweeper.
        batch: the overrides of each job; changed in place.

    Returns:
        The configurations of the jobs that are left, and a line for each combination that was
        removed.

    Raises:
        UserError: the sweep has no job.
        HydraException: no job of the sweep can be composed.
    """
    if not batch:
        raise UserError("this sweep has no job: a list, a range or a glob in it is empty")
    loader = sweeper.hydra_context.config_loader
    composed: list[DictConfig] = []
    refused: list[tuple[list[str], HydraException]] = []
    for overrides in batch:
        try:
            composed.append(
                loader.load_sweep_config(master_config=sweeper.config, sweep_overrides=overrides)
            )
        except HydraException as error:
            refused.append((overrides, error))
    if len(refused) == len(batch):
        raise refused[0][1]
    swept = {override for overrides in batch for override in overrides} - set[str].intersection(
        *map(set, batch)
    )
    left_out = []
    for overrides, reason in refused:
        batch.remove(overrides)
        which = " ".join(override for override in overrides if override in swept)
        left_out.append(redact(f"error: {which}: {explain(reason)}"))
        print(left_out[-1], file=sys.stderr)
    return composed, left_out


class CheckedLoader(ConfigLoaderImpl):
    """The loader that composes every configuration: of runs, of sweeps, and of each of their jobs.

    It checks each configuration before anything named in it is called.
    """

    def load_configuration(self, *args: Any, **kwargs: Any) -> DictConfig:
        """Compose as Hydra does, and check the result before anything in it is called.

        Raises:
            UserError: the configuration names a part that is not known, or a file does not fit.
        """
        given = inspect.signature(super().load_configuration).bind(*args, **kwargs).arguments
        try:
            composed = super().load_configuration(*args, **kwargs)
        except ConfigCompositionException as error:
            cause = error.__context__
            if str(error).startswith("In '") and isinstance(cause, OmegaConfBaseException):
                raise UserError(own_files.explain(cause, self._file)) from error
            raise
        except AssertionError:
            check_below_trackers(given["overrides"])
            raise
        # Without a name Hydra only shows its own settings (--hydra-help), and calls nothing
        if given["config_name"]:
            check(composed)
        return composed

    def _load_single_config(self, default: Any, repo: Any) -> Any:
        """Load a file of the folder of options; refuse a number where a key holds text.

        The digits of a number as typed are lost. The options of a list (`tracker=[a,b]`) are seen
        here only.
        """
        if ".." in Path(default.config_path or "").parts:
            raise UserError(
                f"{default.config_path} leads out of the folder of options; name one in it, "
                "or add a folder of your own with --config-dir"
            )
        loaded = super()._load_single_config(default, repo)
        if not loaded.is_schema_source:
            self._file = _file_of(loaded, default.config_path)
            _check_texts(str(self._file), loaded.config)
            if loaded.provider == "main":
                self._check_not_hidden(default.config_path, repo)
        return loaded

    def _check_not_hidden(self, option: str, repo: Any) -> None:
        """Refuse an option of ours where the user has a file of the same name."""
        for source in repo.get_sources():
            if source.provider not in OURS and source.is_config(option):
                raise UserError(
                    f"{_file_of(source, option)} has the name of an option that comes with the "
                    "lab, and would not be read; rename it. To change that option, begin a file "
                    f"with `defaults: [{Path(option).name}, _self_]`"
                )

    def _process_config_searchpath(
        self, config_name: str | None, parsed_overrides: Any, repo: Any
    ) -> None:
        """Check the search paths that Hydra is about to add: to find a package, it is imported."""
        primary = repo.load_config(config_path=config_name) if config_name else None
        places = [OmegaConf.select(primary.config, "hydra.searchpath") if primary else None]
        places += [
            override.value()
            for override in parsed_overrides
            if override.get_key_element() == "hydra.searchpath"
        ]
        for place in places:
            _check_place("hydra.searchpath", str(place))
        super()._process_config_searchpath(config_name, parsed_overrides, repo)


class RedactingOmegaConf(OmegaConf):
    """The `OmegaConf` with which Hydra's sweeper writes `multirun.yaml`; it redacts secrets.

    Hydra writes every override into that file as typed.
    """

    @staticmethod
    def save(config: Any, f: Any, resolve: bool = False) -> None:
        """Write a configuration to a file, with secrets redacted."""
        plain = redact(OmegaConf.to_container(config, resolve=resolve))
        OmegaConf.save(OmegaConf.create(plain), f)


def _file_of(source: Any, option: str) -> Path:
    return Path(source.path.removeprefix("file://"), f"{option}.yaml")


def _check_texts(file: str, loaded: Any) -> None:
    tree: Any = OmegaConf.to_container(loaded, resolve=False)
    values = flat(tree)
    for key in text_keys().keys() & values.keys():
        for value in values[key] if isinstance(values[key], list) else [values[key]]:
            if isinstance(value, bool | int | float):
                raise UserError(
                    f"{file}: {key} is text, and {value} without quotes is none to YAML; write it "
                    "in quotes"
                )


def check(composed: DictConfig) -> None:
    """Refuse a configuration that is not ours, and settings with which Hydra could do harm.

    Such settings would call other code, change the working directory, write secrets, or leave the
    folders of runs and options.

    Raises:
        UserError: the configuration is not ours, or there is such a setting; the text names it and
            says what to do instead.
    """
    if OmegaConf.get_type(composed) is not Config:
        raise UserError(
            "--config-name names a configuration that does not begin with the lab's; begin it with "
            "`defaults: [config, _self_]`"
        )

    for section, known in KNOWN.items():
        for target in _targets(OmegaConf.select(composed, section)):
            if target not in known:
                raise UserError(
                    f"{section} names {target}, and only these are called: {', '.join(known)}"
                )
    settings: Any = OmegaConf.to_container(composed.hydra, resolve=False)
    at_a_time = settings["sweeper"].get("max_batch_size")
    if at_a_time is not None and not (isinstance(at_a_time, int) and at_a_time > 0):
        raise UserError(
            f"hydra.sweeper.max_batch_size={at_a_time} must be a whole number of at least 1, or "
            "null"
        )
    for section in ("job_logging", "hydra_logging"):
        if not isinstance(settings[section], dict) or settings[section].get("root") is not None:
            raise UserError(
                f"hydra.{section} may name classes to call and is not used here; leave it out: "
                "the log goes to the terminal and to run.log"
            )
    job = settings["job"]
    if set(job["env_set"]) - set(job["env_copy"]):
        raise UserError(
            "hydra.job.env_set may name programs to run; set environment variables in the shell"
        )
    if job["chdir"]:
        raise UserError(
            "hydra.job.chdir=true would look for every path in the run folder; leave it out: paths "
            "are from where the command is given"
        )
    if settings["output_subdir"] is not None:
        raise UserError(
            "hydra.output_subdir would write the configuration with its secrets; leave it out: "
            "config.yaml and choices.yaml of the run folder have it, masked"
        )
    subdir = settings["sweep"]["subdir"]
    if not SUBDIR.fullmatch(str(subdir)):
        raise UserError(
            f"hydra.sweep.subdir={subdir} may lead out of the sweep's folder, or deeper into it "
            "than the sweep looks for its jobs; use one name of letters, digits and "
            "${hydra.job.num}, without a slash, or ${slug:...}"
        )
    for group, option in settings["runtime"]["choices"].items():
        if option and ".." in Path(option).parts:  # Hydra looks for absolute paths in the folder
            raise UserError(
                f"{group}={option} leads out of the folder of options; name one in it, or add a "
                "folder of your own with --config-dir"
            )


def _targets(node: Any) -> Iterator[str]:
    """Yield every `_target_` below a node, with interpolations resolved as Hydra resolves them."""
    plain = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    if isinstance(plain, dict):
        for key, value in plain.items():
            if key == "_target_":
                yield str(value)
            else:
                yield from _targets(value)
    elif isinstance(plain, list):
        for value in plain:
            yield from _targets(value)


def _check_place(key: str, place: str | None) -> None:
    """Refuse a search path that is a Python package, since Hydra would import the package."""
    if place and "pkg:" in place:
        raise UserError(f"{key}={place} imports a Python package; give a folder")
