"""The two runs between which a dial turns, and the runs that were trained between them.

Torch is not imported here.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean

from orpo_lab.beta_schedule import betas
from orpo_lab.compare.evidence import Setting, group, told_apart_by
from orpo_lab.compare.read import Run, find_runs, read_run
from orpo_lab.config import SCHEMAS
from orpo_lab.errors import UserError

# What runs between which a dial turns may differ in, by the first part of the key or the whole key
DIALLED = ("beta", "beta_end", "beta_schedule", "optimizer.r", "optimizer.alpha")


@dataclass(frozen=True)
class Ends:
    """Two settings, and settings that were trained with betas between the two."""

    low: Setting
    high: Setting
    trained: list[Setting]
    left_out: list[str]
    """A line for each run that takes no part."""

    @property
    def by_seed(self) -> dict[int, tuple[Run, Run]]:
        """The two runs of every seed that both settings have, the given two first."""
        high = {run.values["seed"]: run for run in self.high.runs}
        return {
            run.values["seed"]: (run, high[run.values["seed"]])
            for run in self.low.runs
            if run.values["seed"] in high
        }

    @cached_property
    def betas(self) -> tuple[float, float]:
        """The mean beta of the steps at both ends; see `mean_beta`."""
        return mean_beta(self.low.runs[0]), mean_beta(self.high.runs[0])

    def share_of(self, setting: Setting) -> float:
        """Return the share of the high end that stands for a trained setting, 0 to 1.

        The rule is fixed before any mixture is measured: the share is linear in the logarithm of
        the mean beta; where an end has a beta of 0, in the mean beta itself.
        """
        scale = math.log if min(self.betas) > 0 else float
        low, high = map(scale, self.betas)
        return (scale(mean_beta(setting.runs[0])) - low) / (high - low)


def mean_beta(run: Run) -> float:
    """Return the mean of beta over the steps of a finished run."""
    assert run.summary is not None
    values, num = run.values, run.summary["train"]["steps"]
    own = {
        key.removeprefix("beta_schedule."): value
        for key, value in values.items()
        if key.startswith("beta_schedule.")
    }
    schedule = SCHEMAS["beta_schedule"][values["beta_schedule"]](**own)
    return mean(betas(schedule, num, beta=values["beta"], beta_end=values["beta_end"]))


def find_ends(low: Path, high: Path, trained: Sequence[Path]) -> Ends:
    """Return two runs as the ends of a dial, and the runs in other folders that fit them.

    Raises:
        UserError: the two runs cannot be mixed; or a folder cannot be read.
    """
    first, last = ends = read_run(low), read_run(high)
    for run in ends:
        if (why := _unfinished(run)) is not None:
            raise UserError(f"{run.folder} {why}; finish it with resume={run.folder}")
    if differing := _differing(first, last, DIALLED):
        raise UserError(
            f"{low} and {high} differ in {', '.join(differing)}, and a mixture has to differ in "
            "beta and its schedule alone; give two such runs"
        )
    if mean_beta(first) == mean_beta(last):
        raise UserError(
            f"{low} and {high} have the same mean beta, {mean_beta(first):g}: nothing lies between "
            "them; give two runs with different betas"
        )
    fitting, left_out = [*ends], []
    for run in find_runs(trained) if trained else []:
        why = _unfinished(run)
        if why is None and (differing := _differing(first, run, (*DIALLED, "seed"))):
            why = f"differs in {', '.join(differing)}"
        if why is None:
            fitting.append(run)
        else:
            left_out.append(f"left out: {run.folder} {why}")
    settings = group(fitting)
    found = Ends(_holding(settings, first), _holding(settings, last), [], left_out)
    for setting in settings:
        if setting is found.low or setting is found.high:
            continue
        if 0 < found.share_of(setting) < 1:
            found.trained.append(setting)
        else:
            left_out.append(f"left out: {setting.name} is not between {low} and {high}")
    return found


def _unfinished(run: Run) -> str | None:
    """Return in words why a run has no result to mix; None: it has one."""
    if not run.is_complete:
        return f"has not finished with all results (it is {run.state})"
    has_result = (run.folder / "final").is_dir()
    return None if has_result else "has no final/"


def _differing(one: Run, other: Run, but: Collection[str]) -> list[str]:
    """Return the keys in which two runs differ, without some keys and the keys of some groups."""
    # Two starts that differ in their seeds are other weights, and adapters on them cannot be mixed
    values, others = (
        told_apart_by(run)
        | {"seed": run.values["seed"], "start_from": run.contents.get("start_from")}
        for run in (one, other)
    )
    return [
        key
        for key in sorted(values.keys() | others.keys())
        if values.get(key) != others.get(key)
        and key not in but
        and key.partition(".")[0] not in but
    ]


def _holding(settings: Sequence[Setting], run: Run) -> Setting:
    return next(setting for setting in settings if any(run is other for other in setting.runs))
