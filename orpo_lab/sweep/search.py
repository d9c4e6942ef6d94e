"""Search with Optuna: `python -m orpo_lab search FOLDER [--num-trials N] [override ...]`.

Overrides are those of a run. An override with a range or a list, in Hydra's own syntax, is
searched: `beta=tag(log,interval(0.02,1))`, `optimizer.r=int(interval(4,64))`,
`beta_schedule=step,cosine`. Every trial is a run in its own folder in FOLDER, so that
`python -m orpo_lab compare FOLDER` can read the trials. The search maximises held-out preference
accuracy, among runs whose quality is not worse than the untrained model's. With `train.eval_steps`
a trial is stopped if it falls behind the median of earlier trials.

FOLDER keeps the study. The same command goes on with the study, and several processes may work on
it at the same time. Needs the extra `search`.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException

from orpo_lab import program
from orpo_lab.config.command_line import as_typed
from orpo_lab.errors import UserError, one_line
from orpo_lab.metrics import HELD_OUT_PREFIX, MARGINS, PREFERENCE, qualities_among
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.redaction import redact
from orpo_lab.stop import EXIT_CODE

if TYPE_CHECKING:
    import optuna

# A run by this very package, also where the working directory holds another one
TRAIN = (sys.executable, "-P", "-m", "orpo_lab", "train")
PACKAGE = Path(__file__).parents[1]
# Seconds between two looks at the metrics of a running trial
POLL_SECONDS = 0.2


def parse(overrides: Sequence[str]) -> tuple[list[str], dict[str, Override]]:
    """Split overrides into fixed ones, as typed, and ones to be searched, by their keys.

    Raises:
        UserError: an override cannot be parsed or searches over secrets, or no override has a range
            or a list.
    """
    try:
        _, *typed = as_typed(["--multirun", *overrides])
        parsed = OverridesParser.create().parse_overrides(typed)
    except HydraException as error:
        raise UserError(one_line(error)) from error
    fixed = [override.input_line or "" for override in parsed if not override.is_sweep_override()]
    searched = {
        override.get_key_element(): override for override in parsed if override.is_sweep_override()
    }
    if not searched:
        raise UserError(
            "no override is a range or a list; say what to search, e.g. "
            "'beta=tag(log,interval(0.02,1))' or beta_schedule=constant,cosine"
        )
    for key, override in searched.items():
        if override.input_line != redact(override.input_line):
            raise UserError(
                f"{key} is searched over what looks like secrets, and the study keeps it"
            )
    return fixed, searched


def suggest(trial: "optuna.Trial", searched: dict[str, Override]) -> list[str]:
    """Let a trial choose values for the searched keys, and return them as overrides."""
    chosen = []
    for key, override in searched.items():
        space = override.value()
        if isinstance(space, IntervalSweep):
            assert space.start is not None
            assert space.end is not None
            is_log = "log" in space.tags
            value: Any
            if isinstance(space.start, int) and isinstance(space.end, int):
                value = trial.suggest_int(key, space.start, space.end, log=is_log)
            else:
                value = trial.suggest_float(key, space.start, space.end, log=is_log)
        else:
            value = trial.suggest_categorical(key, list(override.sweep_string_iterator()))
        chosen.append(f"{key}={value}")
    return chosen


def run_trial(trial: "optuna.Trial", folder: Path, overrides: list[str]) -> float:
    """Run a trial and return the run's held-out preference accuracy.

    Raises:
        optuna.TrialPruned: the run fell behind the median and was stopped.
        UserError: the run failed or has no figures; the text, or the run's status, says why.
    """
    import optuna

    command = [*TRAIN, *overrides, f"hydra.run.dir={folder}"]
    path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    place = RunFolder(folder)
    pruned, reported = False, 0
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=said, env={**os.environ, "PYTHONPATH": path}
        )
        try:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                for step, value in _evaluations(place):
                    if step > reported:
                        trial.report(value, step)
                        reported = step
                        if trial.should_prune() and not pruned:
                            process.terminate()
                            pruned = True
        finally:
            process.terminate()
            process.wait()
        said.seek(0)
        last_words = one_line(said.read())
    if pruned and place.status()["state"] != "finished":
        place.set_status("stopped", f"pruned after step {reported}", exit_code=EXIT_CODE)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # a pruned run never goes on
        raise optuna.TrialPruned
    if process.returncode:
        reason = place.status()["reason"] or last_words
        raise UserError(f"{folder} failed: {reason.removeprefix('error: ')}")
    summary = place.read_json("summary.json") or {}
    if not summary.get("after"):
        raise UserError(f"{folder} has no figures; its status.json says what is missing and why")
    for name, shortfall in _shortfalls(summary["before"], summary["after"]).items():
        trial.set_constraint(name, shortfall)
    return summary["after"][PREFERENCE]


def _evaluations(place: RunFolder) -> list[tuple[int, float]]:
    """Return step and held-out preference accuracy of each evaluation so far."""
    key = HELD_OUT_PREFIX + PREFERENCE
    try:
        return [(int(line["step"]), line[key]) for line in place.metrics() if key in line]
    except ValueError:
        return []  # a line is being written


def _shortfalls(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """Return how far each quality is worse than the untrained model's, minus the margin.

    A value above 0 means: worse by more than the margin allows.
    """
    return {
        metric.name: metric.sign * (before[metric.name] - after[metric.name]) - MARGINS[metric.name]
        for metric in qualities_among(after)
    }


def search(folder: Path, num_trials: int, overrides: Sequence[str]) -> "optuna.Study":
    """Run trials until `num_trials` trials in the folder have ended, and return the study.

    Raises:
        UserError: there is nothing to search, or every trial has failed.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    fixed, searched = parse(overrides)
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / "study.log"))),
        study_name="orpo_lab",
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=0),
        pruner=optuna.pruners.MedianPruner(),
        load_if_exists=True,
    )
    ended = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    last_failure = ""
    while len(study.get_trials(deepcopy=False, states=ended)) < num_trials:
        trial = study.ask()
        chosen = suggest(trial, searched)
        print(f"trial {trial.number}: {' '.join(chosen)}", flush=True)
        try:
            value = run_trial(trial, folder / str(trial.number), [*fixed, *chosen])
        except optuna.TrialPruned:
            study.tell(trial, state=TrialState.PRUNED)
            print("  stopped: behind the median", flush=True)
        except UserError as error:
            study.tell(trial, state=TrialState.FAIL)
            print(f"  {error}", flush=True)
            last_failure = str(error)
        except BaseException:
            study.tell(trial, state=TrialState.FAIL)
            raise
        else:
            study.tell(trial, value)
            print(f"  preference accuracy {value:.3f}", flush=True)
    others = (TrialState.COMPLETE, TrialState.PRUNED)
    if last_failure and not study.get_trials(deepcopy=False, states=others):
        raise UserError(f"every trial failed; the last one: {last_failure}")
    return study


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to a parser."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of the study and its runs")
    parser.add_argument(
        "--num-trials", type=int, default=20, help="in FOLDER, earlier ones included"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="override", help="as for a run: beta=0.1,0.2"
    )


def run(options: argparse.Namespace) -> None:
    """Search, and print the best trial.

    Raises:
        UserError: Optuna is not installed, the folder cannot be used, or a reason of `search`.
    """
    try:
        study = search(options.folder, options.num_trials, options.overrides)
    except ImportError as error:
        raise UserError(f"Optuna is not installed: {program.install('search')}") from error
    except OSError as error:
        raise UserError(f"{options.folder} cannot be used: {one_line(error)}") from error
    print(_closing(study, options.folder))


def _closing(study: "optuna.Study", folder: Path) -> str:
    try:
        best = study.best_trial
    except ValueError:
        return "No trial has finished with a quality that is not worse than the untrained model's."
    values = " ".join(f"{key}={value}" for key, value in best.params.items())
    return (
        f"Highest preference accuracy: {best.value:.3f} with {values} "
        f"(run folder {folder / str(best.number)}).\n"
        "The best of many trials looks better than it is, and one seed cannot separate settings: "
        "compare the first few in a sweep with seed=1,2,3."
    )
