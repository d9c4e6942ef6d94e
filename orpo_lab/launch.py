"""Run experiments, by Hydra: `launch.py [option ...]` of a clone, `orpo-lab train [option ...]`.

Only composes and checks the configuration; torch and its friends are imported once it is known to
be good, so that `--help` and a typo answer within a second.
"""

import contextlib
import itertools
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from orpo_lab import config, environment, progress, stop
from orpo_lab.config import command_line, completion, guard
from orpo_lab.config.checks import AUTO
from orpo_lab.config.folder import CONF
from orpo_lab.config.help import help_text
from orpo_lab.errors import UserError, one_line
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.redaction import redact
from orpo_lab.stop import BUDGET, Stopped
from orpo_lab.sweep.folder import Sweep
from orpo_lab.sweep.jobs import JOBS, Jobs


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def launch(composed: DictConfig) -> None:
    """Run one job, as `launch_job` does."""
    # A launcher sends this function to its processes with a copy of what the function names. What
    # is called from here is imported there, and would find a `JOBS` that knows nothing of the sweep
    launch_job(composed, JOBS)


def launch_job(composed: DictConfig, jobs: Jobs) -> None:
    """Run one job in the folder that Hydra has made for the job.

    A failure of the job is printed, and kept in `jobs` for the exit code. The other jobs of a sweep
    go on.

    Raises:
        Stopped: the run, or the whole sweep, was asked to end.
    """
    hydra_config = HydraConfig.get()
    folder = Path(os.path.relpath(hydra_config.runtime.output_dir))
    is_sweep = hydra_config.mode == RunMode.MULTIRUN
    if is_sweep:
        stop.PROCESS.work_for_another()  # does nothing in the process that the user started
    if stop.PROCESS.is_worker and stop.PROCESS.signal:
        _remove_if_empty(folder)
        return
    stop.PROCESS.check()
    number = hydra_config.job.num + 1 if is_sweep else 0
    title = f"job {number}/{jobs.num or '?'}" if is_sweep else ""
    begun = time.monotonic()
    if is_sweep and jobs.num:
        print(f"\njob {number} of {jobs.all}: {folder}", flush=True)
    try:
        is_shared = stop.PROCESS.is_worker
        with stop.PROCESS.at_work, progress.titled(title, is_shared=is_shared):
            run_job(composed, folder, Sweep(folder.parent) if is_sweep else None)
    except UserError as error:
        _remember(jobs, f"error: {error}", folder, is_sweep)
        print(jobs.failures[-1], file=sys.stderr)
    except Stopped as error:
        # The time budget ends one job only. A signal ends the sweep; in a launcher's process it
        # ends the job, and the process that passed the signal on ends the sweep
        if error.reason != BUDGET:
            stop.PROCESS.signal = stop.PROCESS.signal or error.reason
            if not stop.PROCESS.is_worker:
                raise
        elif not is_sweep:
            raise
        _remember(jobs, f"stopped by {error.reason}", folder, is_sweep)
    except SystemExit as error:
        if not is_sweep:
            raise
        _remember(jobs, f"error: the job called sys.exit({error.code!r})", folder, is_sweep)
        print(jobs.failures[-1], file=sys.stderr)
    except Exception as error:
        line = f"error: {type(error).__name__}: {one_line(error)} (in {folder})"
        _remember(jobs, line, folder, is_sweep)
        print(redact(traceback.format_exc()), file=sys.stderr, end="")
    if is_sweep and jobs.num:
        jobs.seconds.append(time.monotonic() - begun)
        print(jobs.progress(number), flush=True)


def run_job(composed: DictConfig, folder: Path, sweep: Sweep | None) -> None:
    """Check the configuration of one job, then run the job, unless its sweep has run it already.

    Args:
        composed: the job's configuration, as Hydra composed it.
        folder: the folder that Hydra has made for the job.
        sweep: the sweep that the job belongs to, if any.

    Raises:
        UserError: the user can put something right.
    """
    loaded = config.load(composed)
    if environment.process().index:
        from orpo_lab import run

        run.follow(loaded)
        return
    hydra_config = HydraConfig.get()
    if sweep and loaded.resume not in (None, AUTO):
        raise UserError(
            f"resume={loaded.resume} names one run, and a sweep has many; it goes on by "
            "hydra.sweep.dir=..., without resume"
        )
    sweeper = hydra_config.runtime.choices["hydra/sweeper"]
    if sweep is None and sweeper != "basic":
        raise UserError(f"hydra/sweeper={sweeper} decides on the jobs of a sweep; add -m")
    with sweep.claim(loaded, folder) if sweep else _alone(loaded, folder) as place:
        if place is None:
            return
        JOBS.place = None if sweep else place

        from orpo_lab import run

        run.train(
            loaded,
            place.path,
            choices=dict(hydra_config.runtime.choices),
            overrides=[*_own_options(hydra_config), *hydra_config.overrides.task],
            sweep=sweep,
        )


def _own_options(hydra_config: HydraConf) -> list[str]:
    """Return the arguments that tell Hydra where the user's own options are."""
    sources = hydra_config.runtime.config_sources
    own = [source.path for source in sources if source.provider == "command-line"]
    name = hydra_config.job.config_name
    return [
        *(f"--config-dir={Path(path).absolute()}" for path in own),
        *([f"--config-name={name}"] if name != "config" else []),
        *(given for given in hydra_config.overrides.hydra if "hydra.searchpath=" in given),
    ]


@contextlib.contextmanager
def _alone(loaded: config.Config, folder: Path) -> Iterator[RunFolder | None]:
    """Inside this context, hold the folder of a single run, and yield this folder.

    None is yielded if the run to go on with has finished.

    Raises:
        UserError: see `_check_folder`; or the folder holds files and no run, cannot be written to,
            or another process runs in it.
    """
    given = _given_folder()
    _check_folder(loaded, folder, given)
    with contextlib.ExitStack() as stack:
        for place in _places(folder, is_fixed=given is not None or loaded.resume is not None):
            if stack.enter_context(place.held()):
                break
        else:
            raise UserError(f"another process is running in {folder}")
        if loaded.resume and place.has_finished(loaded):
            print(f"{place.path}: finished already, nothing to do")
            yield None
        else:
            yield place


def _given_folder() -> str | None:
    """Return the run folder that the command line names; None: it names no folder."""
    given = HydraConfig.get().overrides.hydra
    found = [override.partition("=")[2] for override in given if "hydra.run.dir=" in override]
    return found[-1].strip("'\" ") if found else None


def _check_folder(loaded: config.Config, folder: Path, given: str | None) -> None:
    """Check that `resume` and hydra.run.dir together name one folder, or leave it to the default.

    Raises:
        UserError: `resume` and hydra.run.dir name two folders, hydra.run.dir is empty, or
            `resume=auto` is given without hydra.run.dir.
    """
    if given == "":
        raise UserError("hydra.run.dir is empty (is a variable unset?); give a folder")
    if loaded.resume == AUTO and given is None:
        raise UserError(
            "resume=auto goes on with the run in a folder of your choice: give hydra.run.dir=..."
        )
    if loaded.resume in (None, AUTO) or given is None:
        return
    if Path(loaded.resume).resolve() != folder.resolve():
        raise UserError(
            f"resume={loaded.resume} and hydra.run.dir={given} name two folders; the run goes on "
            "in the one that resume names: leave the other out"
        )


def _places(folder: Path, *, is_fixed: bool) -> Iterator[RunFolder]:
    """Yield the folder of a run; unless the user has chosen it, then also folders with a number.

    The caller takes the first folder that no other process holds. Two runs that start in the same
    second have the same default name.
    """
    yield RunFolder(folder)
    for number in itertools.count(2):
        if is_fixed:
            return
        yield RunFolder(folder.with_name(f"{folder.name}-{number}"))


def _remember(jobs: Jobs, failure: str, folder: Path, is_sweep: bool) -> None:
    """Note the failure of a job; in a sweep, record it also for a job that never began a run."""
    jobs.fail(failure)
    if is_sweep and folder.is_dir() and RunFolder(folder).is_empty():
        RunFolder(folder).set_status("failed", failure.removeprefix("error: "), exit_code=1)
    _remove_if_empty(folder)


def _remove_if_empty(folder: Path) -> None:
    """Delete the folder of a run that never began; Hydra makes it before anything is checked."""
    with contextlib.suppress(OSError):  # the folder is not empty
        folder.rmdir()


def main() -> None:
    """Run the command line, and exit.

    An error that the user can put right is printed in one line, and gives exit code 1.
    """
    command_line.open_streams()
    typed = sys.argv[1:]
    if {"-h", "--help"} & set(typed):
        try:
            print(help_text(typed))
        except UserError as error:
            sys.exit(f"error: {error}")
        return
    config.register()
    # Hydra then raises its errors unchanged, and `explain` can put each in one line
    os.environ["HYDRA_FULL_ERROR"] = "1"
    codes = []
    with stop.PROCESS.listening():
        for part in (_run, JOBS.close):
            try:
                codes.append(part())
            except Stopped as error:
                print(f"stopped by {error.reason}", file=sys.stderr)
                codes.append(error.exit_code)
    code = next(filter(None, codes), 0)
    if next_step := JOBS.next_step(typed, code):
        print(next_step)
    sys.exit(code)


@contextlib.contextmanager
def _folder_of_process() -> Iterator[None]:
    """Inside this context, give Hydra a folder of its own in all processes of a run but the first.

    Hydra makes a folder before it calls `launch`. The first process tells the others which folder
    is the run's.

    Raises:
        UserError: see `environment.process`.
    """
    if not environment.process().index:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        sys.argv.append(f"hydra.run.dir={folder}")
        yield


def _run() -> int:
    try:
        arguments = completion.answer(sys.argv[1:], os.environ)
        sys.argv[1:] = command_line.as_typed(arguments)
        guard.install(JOBS.count)
        with _folder_of_process():
            launch()
        stop.PROCESS.check()
    except command_line.NOT_COMPOSED as error:
        if JOBS.sweep:
            JOBS.sweep.take_back()
        sys.exit(f"error: {command_line.explain(error)}")
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        # The run folder cannot be made
        sys.exit(f"error: {one_line(error)}; choose another folder with hydra.run.dir=...")
    return 0
