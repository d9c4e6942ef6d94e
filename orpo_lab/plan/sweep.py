"""The time of a sweep: jobs that agree up to a step train that part once (`sweep.forks`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orpo_lab import methods
from orpo_lab.config import Config
from orpo_lab.config.identity import identity, start_of
from orpo_lab.engine import reference
from orpo_lab.plan.planned import Plan
from orpo_lab.sweep.forks import MIN_SHARE, Job, num_shared


@dataclass(frozen=True)
class Total:
    """What the jobs of a sweep take, one after another."""

    jobs: int
    """Number of jobs; jobs that come to the same run are one."""
    steps: int
    """Number of steps that are trained."""
    shared: int
    """Number of steps that a job takes over from another one."""
    befores: int
    """Number of evaluations before training; jobs that start alike share one."""
    references: int
    """Number of references that are computed; jobs that start alike share one."""
    seconds_of_steps: float
    seconds_of_others: float

    @property
    def seconds(self) -> float:
        """All together."""
        return self.seconds_of_steps + self.seconds_of_others


def key_of(config: Config) -> str:
    """Return a text that is equal for configurations of equal plans."""
    groups = ("model", "quantization", "optimizer", "dataset", "method", "engine", "train")
    return repr([getattr(config, group) for group in groups])


def total(jobs: Sequence[Config], plans: Mapping[str, Plan]) -> Total:
    """Return what a sweep takes.

    Args:
        jobs: the configurations of its jobs.
        plans: of each of them, by `key_of`.
    """
    different: dict[str, Config] = {}
    for each in jobs:
        different.setdefault(identity(each), each)  # of equal jobs a sweep runs the first
    done: list[Job] = []
    starts: set[str] = set()
    references: set[str] = set()
    steps = shared = 0
    of_steps = others = 0.0
    for config in different.values():
        plan, job = plans[key_of(config)], Job.of(config)
        taken = 0
        if config.train.forks and config.beta_schedule.is_known_before:
            agreed = max((num_shared(job, other, plan.num_steps) for other in done), default=0)
            taken = agreed if agreed >= MIN_SHARE * plan.num_steps else 0
            done.append(job)
        steps, shared = steps + plan.num_steps - taken, shared + taken
        of_steps += plan.seconds.steps * (1 - taken / plan.num_steps)
        others += plan.seconds.total - plan.seconds.steps
        start = start_of(config)
        others -= plan.seconds.before if start in starts else 0
        starts.add(start)
        if methods.build(config).needs_reference:
            shared_as = reference.name_of(config)
            others -= plan.seconds.reference if shared_as in references else 0
            references.add(shared_as)
    return Total(len(different), steps, shared, len(starts), len(references), of_steps, others)
