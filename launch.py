"""Run an ORPO experiment: `python launch.py [option ...]`, e.g. `launch.py optimizer=galore`.

Only composes and checks the configuration; torch and its friends are imported once it is known to
be good, so that `--help` and a typo answer within a second.
"""

import contextlib
import difflib
import os
import re
import sys
import traceback
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from orpo_lab import config, guard, stop
from orpo_lab.errors import UserError, one_line
from orpo_lab.masking import mask
from orpo_lab.run_folder import RunFolder
from orpo_lab.stop import BUDGET, Stopped
from orpo_lab.sweep import Start, Sweep

# One line per failed job: Hydra's basic launcher would go on and exit 0
failures: list[str] = []


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def launch(composed: DictConfig) -> None:
    """Run one job in the folder that Hydra has made for it; a failure is said and remembered."""
    hydra_config = HydraConfig.get()
    folder = Path(os.path.relpath(hydra_config.runtime.output_dir))
    is_sweep = hydra_config.mode == RunMode.MULTIRUN
    if is_sweep:
        stop.PROCESS.work_for_another()  # unless this is the process that was started
    if stop.PROCESS.is_worker and stop.PROCESS.signal:
        _remove_if_empty(folder)
        return
    stop.PROCESS.check()
    try:
        run_job(composed, folder, Sweep(folder.parent) if is_sweep else None)
    except UserError as error:
        _remember(f"error: {error}", folder, is_sweep)
        print(failures[-1], file=sys.stderr)
    except Stopped as error:
        # A job's budget is its own; a signal ends the sweep, which a launcher's process leaves to
        # the one that has passed the signal on
        if error.reason != BUDGET:
            stop.PROCESS.signal = stop.PROCESS.signal or error.reason
            if not stop.PROCESS.is_worker:
                raise
        elif not is_sweep:
            raise
        _remember(f"stopped by {error.reason}", folder, is_sweep)
    except SystemExit as error:
        if not is_sweep:
            raise
        _remember(f"error: the job called sys.exit({error.code!r})", folder, is_sweep)
        print(failures[-1], file=sys.stderr)
    except Exception as error:
        line = f"error: {type(error).__name__}: {one_line(error)} (in {folder})"
        _remember(line, folder, is_sweep)
        print(mask(traceback.format_exc()), file=sys.stderr, end="")


def run_job(composed: DictConfig, folder: Path, sweep: Sweep | None) -> None:
    """Check one job's configuration, then run it, unless its sweep has run it already."""
    loaded = config.load(composed)
    hydra_config = HydraConfig.get()
    with sweep.claim(loaded, folder) if sweep else _alone(loaded, folder) as place:
        if place is None:
            return

        from orpo_lab import run

        run.train(
            loaded,
            place.path,
            choices=dict(hydra_config.runtime.choices),
            overrides=list(hydra_config.overrides.task),
            sweep=sweep,
        )


@contextlib.contextmanager
def _alone(loaded: config.Config, folder: Path) -> Iterator[RunFolder | None]:
    """Give a single run its folder; None: the run to go on with has finished."""
    place = RunFolder(folder)
    given = HydraConfig.get().overrides.hydra
    if loaded.resume == config.AUTO and not any("hydra.run.dir=" in one for one in given):
        raise UserError(
            "resume=auto goes on with the run in a folder of your choice: give hydra.run.dir=..."
        )
    with place.held() as is_free:
        if not is_free:
            raise UserError(f"another process is running in {folder}")
        if loaded.resume and place.has_finished(loaded):
            print(f"{folder}: finished already, nothing to do")
            yield None
        else:
            yield place


def _remember(failure: str, folder: Path, is_sweep: bool) -> None:
    """Remember a failure; a sweep also keeps that of a job that never began a run."""
    failures.append(mask(failure))
    if is_sweep and folder.is_dir() and not (folder / "status.json").exists():
        RunFolder(folder).set_status("failed", failure.removeprefix("error: "), exit_code=1)
    _remove_if_empty(folder)


def _remove_if_empty(folder: Path) -> None:
    """Take back the folder of a run that never began: Hydra makes it before anything is checked."""
    with contextlib.suppress(OSError):  # it holds something
        folder.rmdir()


def explain(error: Exception) -> str:
    """Return an error of Hydra's or OmegaConf's as one line that names the key."""
    text = str(error)
    if isinstance(error.__cause__, OmegaConfBaseException):
        text += f"\n{error.__cause__}"
    text = re.sub(r"\s*(full_key|object_type|reference_type)[:=].*", "", text)
    text = re.sub(r"\s*To append to your config use \S+", "", text)
    text = re.sub(r"\s*Config search path:.*", "", text, flags=re.DOTALL)
    text = re.sub(r"^In '.*?': ", "", text)
    return one_line(text) + _did_you_mean(text)


def _did_you_mean(text: str) -> str:
    unknown = re.search(r"Could not (?:override|find) '(?:.*[./])?(.+?)'", text)
    if unknown is None:
        return ""
    schemas = [config.Config, *(one for group in config.SCHEMAS.values() for one in group.values())]
    names = {one.name for schema in schemas for one in fields(schema)}
    names |= set(re.findall(r"^\t(.+)$", text, flags=re.MULTILINE))  # the options Hydra listed
    close = difflib.get_close_matches(unknown.group(1), sorted(names), n=1)
    return f". Did you mean '{close[0]}'?" if close and close[0] != unknown.group(1) else ""


def help_text() -> str:
    """Return every option of every config group with the first line of its file.

    Hydra's own help loads each of them twice and takes longer than a second.
    """
    lines = [__doc__ or "", "Options are group=name; -m sweeps over lists (beta=0.1,0.2)."]
    for group in sorted(
        path for path in Path(__file__).with_name("conf").iterdir() if path.is_dir()
    ):
        lines.append(f"\n{group.name}")
        for option in sorted(group.glob("*.yaml")):
            comments = (line[2:] for line in option.read_text().splitlines() if line[:2] == "# ")
            about = next(line for line in comments if not line.startswith("@package"))
            lines.append(f"  {option.stem:18} {about}")
    lines.append("\nEvery key with its value: python launch.py --cfg job; its meaning: conf/")
    return "\n".join(lines)


def main() -> None:
    """Entry point: what the user can put right ends in one line and exit code 1."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text())
        return
    config.register()
    # Hydra then raises its errors as they are, and `explain` can say them in one line
    os.environ["HYDRA_FULL_ERROR"] = "1"
    codes = []
    with stop.PROCESS.listening():
        for part in (_run, _close):
            try:
                codes.append(part())
            except Stopped as error:
                print(f"stopped by {error.reason}", file=sys.stderr)
                codes.append(error.exit_code)
    sys.exit(next(filter(None, codes), 0))


def _run() -> int:
    try:
        guard.install()
        launch()
        stop.PROCESS.check()
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        sys.exit(f"error: {explain(error)}")
    except OSError as error:
        # The run folder cannot be made
        sys.exit(f"error: {one_line(error)}; choose another folder with hydra.run.dir=...")
    return 0


def _close() -> int:
    failed = Start.sweep.close(Start.tracker) if Start.sweep else failures
    return int(bool(failed))


if __name__ == "__main__":
    main()
