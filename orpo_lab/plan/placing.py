"""Which type of GPU each job of a sweep runs on, by the jobs' plans."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from orpo_lab.config import Config
from orpo_lab.errors import UserError
from orpo_lab.plan import cards
from orpo_lab.plan.command import read
from orpo_lab.plan.planned import Plan, plan
from orpo_lab.plan.sweep import key_of
from orpo_lab.plan.words import gb


def choose(jobs: Sequence[Config], gpus: Mapping[str, float], jobs_per_gpu: int) -> list[str]:
    """Return the type of GPU for each job: where it fits, and where its plan ends first.

    Each job in its turn goes to the type on which it would end first behind the jobs placed before
    (Graham 1969). Types that `cards` does not know get no job.

    Args:
        jobs: the configurations of the jobs.
        gpus: type, as Ray names it -> number of GPUs of this type.
        jobs_per_gpu: jobs that share a GPU's memory and its time.

    Raises:
        UserError: no type is known, or a job fits on none; or a job cannot be planned.
    """
    known = {kind: cards.named(name) for kind in gpus if (name := cards.like(kind))}
    if not known:
        raise UserError(
            f"hydra.launcher.accelerator_type=plan: of the cluster's GPUs "
            f"({', '.join(sorted(gpus)) or 'none'}) no figures are known; name a type"
        )
    shares = {
        kind: replace(card, memory_gb=card.memory_gb / jobs_per_gpu) for kind, card in known.items()
    }
    # Jobs that differ in what no plan reads, as beta and seed, have one plan for each type
    plans: dict[str, dict[str, Plan]] = {}
    # When each share of a GPU is free again
    free = {kind: [0.0] * int(gpus[kind] * jobs_per_gpu) for kind in known}
    chosen = []
    for number, job in enumerate(jobs, 1):
        key = key_of(job)
        if key not in plans:
            own, sizes = read(job)
            plans[key] = {kind: plan(job, own, card, sizes) for kind, card in shares.items()}
        ends = {
            kind: min(free[kind]) + found.seconds.total * jobs_per_gpu
            for kind, found in plans[key].items()
            if found.fits
        }
        if not ends:
            largest = max(shares, key=lambda kind: shares[kind].memory)
            needed = plans[key][largest].memory.needed
            raise UserError(
                f"hydra.launcher.accelerator_type=plan: job {number} needs {gb(needed)}, and a "
                f"job's share of {largest} has {gb(shares[largest].memory)}"
            )
        kind = min(ends, key=lambda kind: ends[kind])
        free[kind][free[kind].index(min(free[kind]))] = ends[kind]
        chosen.append(kind)
    return chosen
