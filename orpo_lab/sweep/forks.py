"""Forks: jobs of a sweep that agree up to a step train that part once.

Two jobs are of one family if they differ in nothing but beta and its schedule. They agree up to the
step at which their betas differ for the first time. For example, a constant beta and one that is
held and then annealed agree until the annealing begins. So the jobs of a family form a tree. The
job that comes to a branching first leaves its sealed state there: a fork. The other jobs begin from
the fork, and their results are those of whole runs.

A fork is a checkpoint `checkpoints/fork-<step>` in the folder of the run that made it. A run that
begins from a fork has links to its files in an own folder, so every run folder stays complete. A
fork is deleted when its run is complete, and no other job has still to begin from it.
"""

import contextlib
import json
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from omegaconf import DictConfig

from orpo_lab import config
from orpo_lab.beta_schedule import betas
from orpo_lab.config import SCHEMAS, Config, kind
from orpo_lab.config.identity import identity, identity_without_beta
from orpo_lab.errors import UserError
from orpo_lab.records.run_folder import RunFolder
from orpo_lab.stop import Stop, Stopped
from orpo_lab.sweep.folder import CACHE, Sweep
from orpo_lab.training import checkpoint
from orpo_lab.training.checkpoint import Checkpoint, Made

log = logging.getLogger(__name__)

# A fork is left only where jobs agree on at least this share of their steps: to write and to read a
# checkpoint also takes time
MIN_SHARE = 0.1
# Seconds between two looks at a job that trains what another job waits for
WAIT = 1.0


@dataclass(frozen=True)
class Job:
    """A job of the sweep: what decides which steps it shares with others."""

    config_hash: str
    family: str
    beta: float
    beta_end: float
    schedule: str
    """The option of `beta_schedule`."""
    keys: dict[str, Any]
    """The keys of the schedule."""

    @classmethod
    def of(cls, loaded: Config) -> "Job":
        """Return the job of a configuration."""
        schedule = loaded.beta_schedule
        return cls(
            config_hash=identity(loaded),
            family=identity_without_beta(loaded),
            beta=loaded.beta,
            beta_end=loaded.beta_end,
            schedule=kind(schedule),
            keys=asdict(schedule),
        )

    def betas(self, num_steps: int) -> list[float]:
        """Return beta at every step of a run of `num_steps` steps."""
        schedule = SCHEMAS["beta_schedule"][self.schedule](**self.keys)
        return betas(schedule, num_steps, beta=self.beta, beta_end=self.beta_end)


def num_shared(one: Job, other: Job, num_steps: int) -> int:
    """Return up to which step two jobs agree: 0 if they share nothing, else at most `num_steps`."""
    if one.family != other.family:
        return 0
    both = enumerate(zip(one.betas(num_steps), other.betas(num_steps), strict=True))
    return next((step for step, (mine, its) in both if mine != its), num_steps)


def plan(sweep: Sweep, composed: Iterable[DictConfig]) -> None:
    """Record the sweep's jobs, before the first of them runs.

    Args:
        sweep: earlier jobs in its record stay there.
        composed: the configurations of the jobs, as Hydra composed them.
    """
    forks = Forks(sweep)
    with forks.locked() as record:
        for given in composed:
            with contextlib.suppress(UserError):  # the job itself reports the error
                loaded = config.load(config.without_hydra(given))
                if loaded.train.forks and loaded.beta_schedule.is_known_before:
                    job = Job.of(loaded)
                    record["jobs"][job.config_hash] = asdict(job)


class Forks:
    """The forks of a sweep.

    Args:
        sweep: its cache holds the record of all jobs.
    """

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self._file = sweep.folder / CACHE / "jobs.json"

    @contextlib.contextmanager
    def locked(self) -> Iterator[dict[str, Any]]:
        """Inside this context, no other process claims a job or changes the record of jobs.

        Yields the record, which is written when the context ends.
        """
        with FileLock(self.sweep.folder / CACHE / "claims.lock"):
            record = self._read()
            yield record
            RunFolder(self._file.parent).write_json(self._file.name, record)

    def _read(self) -> dict[str, Any]:
        """Return the record: the jobs by their `config_hash`, steps by family, and beginnings."""
        empty: dict[str, Any] = {"jobs": {}, "num_steps": {}, "begun": {}}
        return json.loads(self._file.read_text()) if self._file.exists() else empty

    def begin(
        self,
        loaded: Config,
        place: RunFolder,
        made: Made,
        start: Checkpoint | None,
        num_steps: int,
        stop: Stop,
    ) -> Checkpoint | None:
        """Return the checkpoint from which a job begins; None: the job begins with its first step.

        While another job trains a longer part that both share, this job waits. It would come to the
        same state no earlier.

        Args:
            loaded: the job's configuration.
            place: the job's run folder.
            made: what the run is made from.
            start: the run's own checkpoint, if it has one. The run goes on from there, unless
                there is a later fork.
            num_steps: number of steps of the whole run.
            stop: says whether the run should end early.

        Raises:
            Stopped: the run was asked to end while it waited.
            UserError: the copy of a fork cannot be written.
        """
        me = identity(loaded)
        said = False
        while True:
            with self.locked() as record:
                if me not in record["jobs"]:
                    return start
                job = Job(**record["jobs"][me])
                record["num_steps"][job.family] = num_steps
                tree = Tree(self.sweep, record)
                own = start.step if start else 0
                found = [fork for fork in tree.forks_for(job) if fork.step > own]
                at = max((fork.step for fork in found), default=own)
                ahead = None if start else tree.ahead(job, at)
                if ahead is None:
                    record["begun"][me] = at
                    break
            if not said:
                log.info("waiting for %s, which trains the same first steps", ahead.path.name)
                said = True
            if reason := stop.reason():
                raise Stopped(reason)
            time.sleep(WAIT)
        return _first_valid(found, place, made) or start

    def steps(self, loaded: Config) -> frozenset[int]:
        """Return the steps at which a job leaves a fork for jobs that have still to begin."""
        record = self._read()
        if (me := identity(loaded)) not in record["jobs"]:
            return frozenset()
        return Tree(self.sweep, record).branchings(Job(**record["jobs"][me]))

    def release(self) -> None:
        """Delete the forks of complete runs from which no job has still to begin."""
        with self.locked() as record:
            tree = Tree(self.sweep, record)
            for fork in tree.forks():
                if fork.place.is_complete() and not tree.is_needed(fork):
                    checkpoint.remove(fork.path)


@dataclass(frozen=True)
class Fork:
    """A fork in the folder of a job's run; perhaps it is damaged."""

    path: Path
    place: RunFolder
    job: Job

    @property
    def step(self) -> int:
        """The number of steps that were taken before the fork."""
        return checkpoint.step_of(self.path)


class Tree:
    """The jobs whose number of steps is known, with the state of their run folders now.

    Args:
        sweep: the jobs' sweep.
        record: the content of the record of jobs.
    """

    def __init__(self, sweep: Sweep, record: dict[str, Any]) -> None:
        self.num_steps, self.begun = record["num_steps"], record["begun"]
        jobs = [Job(**job) for job in record["jobs"].values()]
        self.jobs = [job for job in jobs if job.family in self.num_steps]
        self.places = {place.status()["config_hash"]: place for place in sweep.jobs()}

    def shared(self, one: Job, other: Job) -> int:
        """Return up to which step two jobs agree; 0 if this part is too short for a fork."""
        num_steps = self.num_steps[one.family]
        shared = num_shared(one, other, num_steps)
        return shared if shared >= MIN_SHARE * num_steps else 0

    def forks(self) -> Iterator[Fork]:
        """Yield every fork in the folders of the jobs."""
        for job in self.jobs:
            place = self.places.get(job.config_hash)
            if place is not None:
                yield from (Fork(path, place, job) for path in checkpoint.forks(place))

    def forks_for(self, job: Job) -> list[Fork]:
        """Return the forks from which a job may begin, the latest step first.

        A fork that is still being written is none of them: the job waits until it is sealed.
        """
        sealed = (fork for fork in self.forks() if checkpoint.is_sealed(fork.path))
        found = [fork for fork in sealed if fork.step <= self.shared(job, fork.job)]
        return sorted(found, key=lambda fork: fork.step, reverse=True)

    def ahead(self, job: Job, at: int) -> RunFolder | None:
        """Return a run that is training now, and will leave a fork for the job after step `at`."""
        for other in self.jobs:
            place = self.places.get(other.config_hash)
            if other == job or place is None or other.config_hash not in self.begun:
                continue
            if self.shared(job, other) > max(at, self.begun[other.config_hash]):
                with place.held() as is_free:
                    if not is_free:
                        return place
        return None

    def branchings(self, job: Job) -> frozenset[int]:
        """Return the steps at which others that have still to begin part from a job."""
        steps = ((other, self.shared(job, other)) for other in self.jobs if other != job)
        return frozenset(step for other, step in steps if step and self._begins(other, step))

    def is_needed(self, fork: Fork) -> bool:
        """Return whether a job has still to begin from a fork."""
        return any(
            fork.step <= self.shared(other, fork.job) and self._begins(other, fork.step)
            for other in self.jobs
            if other != fork.job
        )

    def _begins(self, job: Job, step: int) -> bool:
        """Return whether a job has still to come to a step."""
        place = self.places.get(job.config_hash)
        if place is None:
            return True
        return not place.is_complete() and checkpoint.last_step(place) < step


def _first_valid(found: Iterable[Fork], place: RunFolder, made: Made) -> Checkpoint | None:
    """Let a run begin from the first fork that is valid; None: no fork is."""
    for fork in found:
        try:
            valid = checkpoint.valid_fork(fork.path, fork.place, made)
        except UserError as error:
            log.warning("%s of %s rejected: %s", fork.path.name, fork.place.path.name, error)
            continue
        start = checkpoint.adopt(valid, place, made)
        log.info(
            "beginning at step %d: %s has trained the steps before, which are the same",
            start.step,
            fork.place.path.name,
        )
        return start
    return None
