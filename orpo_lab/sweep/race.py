"""A race over seeds: `python launch.py -m hydra/sweeper=race beta=... beta_schedule=...`.

A grid gives every setting the same number of seeds. A race gives seeds where they decide something.
Every setting begins with `min_seeds` seeds. After each round the race looks at the verdict, and the
settings on which the winner still depends get one seed more (`compare.race`).

The race has no state of its own. A look reads the run folders of the rounds before, and nothing
else. So a race that was killed looks again at the rounds that are complete, decides the same, and
goes on with what is missing.
"""

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

from orpo_lab import config
from orpo_lab.config.guard import leave_out_what_cannot_be
from orpo_lab.config.identity import identity
from orpo_lab.errors import UserError
from orpo_lab.metrics import MARGINS
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.redaction import redact
from orpo_lab.stop import PROCESS
from orpo_lab.sweep.folder import Sweep
from orpo_lab.sweep.jobs import JOBS

if TYPE_CHECKING:
    from orpo_lab.compare.evidence import Comparison
    from orpo_lab.compare.race import Step

SEED = "seed="


@dataclass
class Entrant:
    """A setting that takes part in a race."""

    overrides: list[str]
    loaded: config.Config
    seeds: list[int]
    """The seeds that the setting may have, in their order."""
    num_seeds: int
    """How many of these seeds the race has given to the setting."""

    def jobs(self) -> dict[str, list[str]]:
        """Return the overrides of the runs that the race has given, by their hashes."""
        return {
            identity(replace(self.loaded, seed=seed)): [*self.overrides, f"{SEED}{seed}"]
            for seed in self.seeds[: self.num_seeds]
        }


class Race(BasicSweeper):
    """Hydra's sweeper, with the jobs of each round decided by the runs of the rounds before."""

    def __init__(
        self,
        max_batch_size: int | None,
        params: dict[str, str] | None,
        min_seeds: int,
        max_seeds: int,
        max_hours: float | None,
    ) -> None:
        super().__init__(max_batch_size, params)
        self.min_seeds = min_seeds
        self.max_seeds = max_seeds
        self.max_hours = max_hours
        self._batches: Iterator[list[list[str]]] | None = None
        self._batch: list[list[str]] | None = None

    def is_done(self) -> bool:
        """Return whether the race is over; if it is not, `get_job_batch` has the next jobs."""
        if self._batches is None:
            self._batches = self._race()
        self._batch = next(self._batches, None)
        return self._batch is None

    def get_job_batch(self) -> Sequence[Sequence[str]]:
        """Return the overrides of the next jobs."""
        assert self._batch is not None
        return self._batch

    def _race(self) -> Iterator[list[list[str]]]:
        """Yield the jobs of each round that have not run yet, and print each look.

        Raises:
            UserError: a key of the race is out of range, or there is no setting.
        """
        assert self.config is not None
        self._check()
        entrants = entrants_of(self, self.min_seeds, self.max_seeds)
        most = len(entrants[0].seeds)
        sweep = Sweep(Path(self.config.hydra.sweep.dir))
        sweep.note_race(most)
        begun: set[str] = set()
        for JOBS.round in itertools.count(1):
            runs = _runs(sweep)
            missing = [
                (run, job)
                for entrant in entrants
                for run, job in entrant.jobs().items()
                if run not in begun and not (run in runs and runs[run].is_complete())
            ]
            # A run that fails does not begin a second time
            begun |= {run for run, _ in missing}
            if missing:
                jobs = [job for _, job in missing]
                yield from self.split_overrides_to_chunks(jobs, self.max_batch_size)
            PROCESS.check()
            more = _look(entrants, _runs(sweep), most, self.max_hours)
            if not more:
                return
            for entrant in more:
                entrant.num_seeds += 1

    def _check(self) -> None:
        for key, least in (("min_seeds", 1), ("max_seeds", 2)):
            value = getattr(self, key)
            if not isinstance(value, int) or value < least:
                raise UserError(
                    f"hydra.sweeper.{key}={value} must be a whole number of at least {least}"
                )
        if self.min_seeds > self.max_seeds:
            raise UserError(
                f"hydra.sweeper.min_seeds={self.min_seeds} must not be above "
                f"hydra.sweeper.max_seeds={self.max_seeds}"
            )
        hours = self.max_hours
        if hours is not None and not (isinstance(hours, int | float) and hours > 0):
            raise UserError(f"hydra.sweeper.max_hours={hours} must be above 0, or null")


def entrants_of(sweeper: Any, min_seeds: int, max_seeds: int) -> list[Entrant]:
    """Return the settings of a sweep; those that cannot be are left out, and the reason is printed.

    Seeds that the sweep lists are drawn from in their order. Otherwise seeds count up from the one
    that is set.

    Raises:
        UserError: there is no setting, or a seed is no whole number.
    """
    jobs = list(itertools.chain.from_iterable(sweeper.overrides))
    listed = [_seed(text) for text in dict.fromkeys(itertools.chain(*jobs)) if _is_seed(text)]
    settings = [
        list(setting)
        for setting in dict.fromkeys(
            tuple(text for text in job if not _is_seed(text)) for job in jobs
        )
    ]
    all_composed, left_out = leave_out_what_cannot_be(sweeper, settings)
    found: dict[str, Entrant] = {}
    for overrides, composed in zip(settings, all_composed, strict=True):
        try:
            loaded = config.load(config.without_hydra(composed))
        except UserError as error:
            left_out.append(redact(f"error: {' '.join(overrides)}: {error}"))
            print(left_out[-1], file=sys.stderr)
            continue
        first = listed[0] if listed else loaded.seed
        seeds = listed if len(listed) > 1 else list(range(first, first + max_seeds))
        entrant = Entrant(overrides, loaded, seeds[:max_seeds], min(min_seeds, len(seeds)))
        # Settings that come to the same are one
        found.setdefault(identity(replace(loaded, seed=first)), entrant)
    JOBS.count([], left_out)
    if not found:
        raise UserError("no setting of this race can be run")
    return list(found.values())


def _is_seed(override: str) -> bool:
    return override.lstrip("+").startswith(SEED)


def _seed(override: str) -> int:
    text = override.partition("=")[2]
    if not text.isdecimal():
        raise UserError(f"seed={text} is no whole number of at least 0")
    return int(text)


def _runs(sweep: Sweep) -> dict[str, RunFolder]:
    """Return the sweep's run folders by the hashes of their configurations."""
    return {job.status()["config_hash"]: job for job in sweep.jobs()}


def _look(
    entrants: Sequence[Entrant], runs: dict[str, RunFolder], most: int, max_hours: float | None
) -> list[Entrant]:
    """Compare the runs of the rounds so far, print the result, and return who gets another seed.

    Args:
        entrants: all settings of the race.
        runs: the sweep's run folders by the hashes of their configurations.
        most: the largest number of seeds of a setting.
        max_hours: the budget of the race; None: there is none.
    """
    from orpo_lab.compare.evidence import compare
    from orpo_lab.compare.race import next_step
    from orpo_lab.compare.read import read_run

    places = {
        runs[run].path: entrant
        for entrant in entrants
        for run in entrant.jobs()
        if run in runs and runs[run].is_complete()
    }
    num_given = sum(entrant.num_seeds for entrant in entrants)
    print(
        f"\nlook {JOBS.round}: {num_given} runs, where the whole grid of {most} seeds takes "
        f"{most * len(entrants)}"
    )
    if num_failed := num_given - len(places):
        print(f"  {num_failed} of them did not finish, and other seeds do not replace them")
    if not places:
        print("  the race ends: no run has finished")
        return []
    complete = [read_run(place) for place in places]
    try:
        compared = compare(complete, MARGINS)
    except UserError as error:
        print(f"  the race ends: {error}")
        return []
    # Settings without a finished run are not compared
    racing = [places[setting.runs[0].folder] for setting in compared.settings]
    step = next_step(compared.verdict, [entrant.num_seeds for entrant in racing], most)
    for line in standing_text(compared, step):
        print(f"  {line}")
    hours = sum(run.seconds for run in complete) / 3600
    reason = step.reason
    if step.more and max_hours and hours * (1 + len(step.more) / len(complete)) > max_hours:
        reason = f"{hours:.2f} hours are spent, and another round would exceed {max_hours:g}"
    if reason:
        print(f"  the race ends: {reason}")
        return []
    names = ", ".join(compared.settings[number].name for number in step.more)
    print(f"  one seed more: {names}")
    return [racing[number] for number in step.more]


def standing_text(compared: "Comparison", step: "Step") -> list[str]:
    """Return lines that say which settings are out of a race and why, and which are open."""
    verdict = compared.verdict
    names = [setting.name for setting in compared.settings]
    worse = {number: standing.worse_in for number, standing in enumerate(verdict.qualities)}
    open_ = [step.leader, *step.rivals]
    beaten = [number for number in worse if not worse[number] and number not in open_]
    lines = [f"out, beaten: {', '.join(names[number] for number in beaten)}"] if beaten else []
    out = [f"{names[number]} ({', '.join(found)})" for number, found in worse.items() if found]
    lines += [f"out, worse in quality: {', '.join(out)}"] if out else []
    rivals = ", ".join(names[n] for n in step.rivals if n not in step.waiting) or "none"
    lines.append(f"ahead: {names[step.leader]}; not separated from it: {rivals}")
    waiting = ", ".join(names[number] for number in step.waiting)
    return [*lines, f"one run, whose quality is in doubt: {waiting}"] if waiting else lines
