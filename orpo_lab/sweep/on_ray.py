"""Hydra's launcher for Ray: `hydra/launcher=ray`.

Each job is a task of Ray in a process of its own. Ray decides on which machine and which GPU the
job runs. All state is in the sweep's folder, so all machines need that folder under the same path.

A signal to this process ends the sweep. Every job gets SIGINT then, on whatever machine it runs. It
saves and ends, as under joblib. If this process is killed, Ray ends its jobs at once.
"""

import os
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager, nullcontext
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from orpo_lab import config
from orpo_lab.errors import UserError, one_line
from orpo_lab.stop import PROCESS, SIGNALS, Stopped
from orpo_lab.sweep.jobs import JOBS

# Ray reads them as it is imported: nothing is sent to its makers, no line of a job is left out
# because another job has said the same, a log has no colours, and jobs have the sweep's priority
VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_worker_niceness": "0",
}
# Bytes in which a cluster of this machine keeps what is sent to jobs and back; Ray accepts no less
# than 75 MiB
STORE_BYTES = 100 * 2**20
# Seconds that Ray needs to bring the last lines of jobs here
LAST_LINES = 1.0
# How a machine's resources name its type of GPU
TYPE = "accelerator_type:"
# The value of `accelerator_type` that has the jobs' plans choose
BY_PLAN = "plan"


class RayLauncher(Launcher):
    """Hydra's launcher whose jobs are tasks of Ray; the keys are explained in their file."""

    def __init__(
        self,
        address: str | None,
        num_cpus_per_job: int,
        jobs_per_gpu: int,
        accelerator_type: str | None,
    ) -> None:
        self.address = address
        self.num_cpus_per_job = num_cpus_per_job
        self.jobs_per_gpu = jobs_per_gpu
        self.accelerator_type = accelerator_type

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Take what every job needs."""
        self.shared = (config, hydra_context, task_function, Singleton.get_state(), os.getcwd())

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run jobs, and return when all of them have ended.

        Raises:
            UserError: a key is out of range, the cluster cannot be reached, or no machine of the
                cluster has what a job needs.
            Stopped: a signal ended the sweep; all jobs have saved and ended.
        """
        with _cluster(self.address) as ray:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            needs = self._needs(nodes)
            kinds = self._kinds(nodes, job_overrides)
            print(_in_words(nodes, needs, kinds), flush=True)
            # A process for each job: torch reads only once which GPU it may use
            task = ray.remote(max_calls=1, max_retries=0, **needs)(_run)
            shared = ray.put(self.shared)
            jobs = [
                task.options(name=f"job {number + 1}", **kind).remote(
                    shared, list(overrides), number
                )
                for number, (overrides, kind) in enumerate(
                    zip(job_overrides, kinds, strict=True), initial_job_idx
                )
            ]
            _wait(ray, jobs)
            return [_result(ray, job, n) for n, job in enumerate(jobs, initial_job_idx)]

    def _needs(self, nodes: list[dict[str, float]]) -> dict[str, Any]:
        """Return what a job needs of a machine, as Ray names it.

        Args:
            nodes: what each machine of the cluster has.

        Raises:
            UserError: a key is out of range; or no machine has that, and Ray would wait for one.
        """
        for key in ("num_cpus_per_job", "jobs_per_gpu"):
            value = getattr(self, key)
            if not isinstance(value, int) or value < 1:
                raise UserError(
                    f"hydra.launcher.{key}={value} must be a whole number of at least 1"
                )
        most = max((node.get("CPU", 0) for node in nodes), default=0)
        if most < self.num_cpus_per_job:
            raise UserError(
                f"hydra.launcher.num_cpus_per_job={self.num_cpus_per_job} is above the {most:g} "
                "CPU cores of the cluster's largest machine"
            )
        needs: dict[str, Any] = {"num_cpus": self.num_cpus_per_job}
        if any(node.get("GPU") for node in nodes):
            needs["num_gpus"] = 1 / self.jobs_per_gpu
        known = _gpus_by_type(nodes)
        if self.accelerator_type not in (None, BY_PLAN, *known):
            raise UserError(
                f"hydra.launcher.accelerator_type={self.accelerator_type}: the cluster has "
                f"{', '.join(sorted(known)) or 'no GPU'}"
            )
        return needs

    def _kinds(
        self, nodes: list[dict[str, float]], job_overrides: Sequence[Sequence[str]]
    ) -> list[dict[str, str]]:
        """Return the type of GPU that each job needs, as Ray's option; empty: any type.

        Args:
            nodes: what each machine of the cluster has.
            job_overrides: of each job.

        Raises:
            UserError: see `placing.choose`.
        """
        if self.accelerator_type != BY_PLAN:
            kind = self.accelerator_type
            return [{"accelerator_type": kind} if kind else {} for _ in job_overrides]
        from orpo_lab.upstream import import_libraries

        import_libraries()
        from orpo_lab.plan import placing

        loader, given = self.shared[1].config_loader, self.shared[0]
        composed = (loader.load_sweep_config(given, list(each)) for each in job_overrides)
        loaded = [config.load(config.without_hydra(each)) for each in composed]
        chosen = placing.choose(loaded, _gpus_by_type(nodes), self.jobs_per_gpu)
        return [{"accelerator_type": kind} for kind in chosen]


def _gpus_by_type(nodes: list[dict[str, float]]) -> dict[str, float]:
    """Return the number of GPUs of each type, by Ray's name of the type."""
    found: dict[str, float] = {}
    for node in nodes:
        for name in node:
            if name.startswith(TYPE) and node.get("GPU"):
                kind = name.removeprefix(TYPE)
                found[kind] = found.get(kind, 0) + node["GPU"]
    return found


@contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """Inside this context, be connected to a cluster of Ray, and yield the module `ray`.

    Args:
        address: of a cluster; None: one on this machine is begun, and ends with the context.

    Raises:
        UserError: no cluster can be reached there.
    """
    if address not in (None, "auto"):
        _check_answers(address)
    os.environ.update(VARIABLES)
    with _own_cluster() if address is None else nullcontext({"address": address}) as options:
        import ray

        try:
            # The processes of a cluster inherit the blocked signals. So a signal to the whole
            # process group does not end them before the jobs have saved
            with _signals_blocked():
                _connect(ray, options)
                PROCESS.listen()  # Ray has set a handler of its own
            yield ray
        finally:
            ray.shutdown()


def _check_answers(address: str) -> None:
    """Check that there is something at the host and port of a cluster; Ray would try for minutes.

    Raises:
        UserError: there is nothing.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"hydra.launcher.address={address}: {one_line(error)}; give auto, or the host:port of "
            "a cluster that runs"
        ) from error


def _connect(ray: Any, options: dict[str, Any]) -> None:
    """Begin a cluster, or connect to one.

    Raises:
        UserError: there is none at the address, or it has another version of Python or Ray.
    """
    try:
        ray.init(logging_level="error", **options)
    except (ConnectionError, RuntimeError) as error:
        raise UserError(
            f"hydra.launcher.address={options['address']}: {one_line(error)}"
        ) from error


@contextmanager
def _own_cluster() -> Iterator[dict[str, Any]]:
    """Inside this context, have a folder for the files of a cluster; yield the cluster's options.

    A killed sweep leaves the folder.
    """
    # The ports of a cluster are open to the network, and who may use them can run anything here
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex())
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        yield {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": STORE_BYTES,
            "_temp_dir": folder,
        }


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Inside this context, have signals wait."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _in_words(
    nodes: list[dict[str, float]], needs: dict[str, Any], kinds: Sequence[dict[str, str]]
) -> str:
    """Return a line that says what the cluster has, and what a job takes of it."""
    cpus, gpus = (sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
    on_gpu = f", {needs['num_gpus']:.3g} GPU" if "num_gpus" in needs else ", on the CPU"
    num = Counter(kind for each in kinds for kind in each.values())
    on_types = "; " + ", ".join(f"{num[kind]} on {kind}" for kind in sorted(num)) if num else ""
    return (
        f"ray: {cpus:g} CPU cores, {gpus:g} GPUs on {len(nodes)} "
        f"machine{'s' * (len(nodes) > 1)}; a job takes {needs['num_cpus']} CPU{on_gpu}{on_types}"
    )


def _wait(ray: Any, jobs: list[Any]) -> None:
    """Wait until all jobs have ended; a signal is passed on to all of them.

    Raises:
        Stopped: there was a signal. After a second signal some jobs may not have ended.
    """
    # Unlike Ray's own functions, a future is waited for in Python, where a signal ends the wait
    futures = [job.future() for job in jobs]
    try:
        wait(futures)
    except Stopped:
        for job in jobs:
            ray.cancel(job)  # in the job's process this is SIGINT
        wait(futures)
        raise
    finally:
        time.sleep(LAST_LINES)


def _run(shared: Any, overrides: list[str], number: int) -> JobReturn:
    """Run a job, in a process of Ray."""
    given, hydra_context, task_function, singletons, folder = shared
    os.chdir(folder)
    Singleton.set_state(singletons)
    setup_globals()
    composed = hydra_context.config_loader.load_sweep_config(given, overrides)
    with open_dict(composed):
        composed.hydra.job.id = f"{composed.hydra.job.name}_{number}"
        composed.hydra.job.num = number
    HydraConfig.instance().set_config(composed)
    return run_job(
        hydra_context=hydra_context,
        config=composed,
        task_function=task_function,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )


def _result(ray: Any, job: Any, number: int) -> JobReturn:
    """Return the result of a job that has ended; why it has none is printed, and kept."""
    try:
        return ray.get(job)
    except ray.exceptions.RayError as error:
        JOBS.fail(f"error: job {number + 1}: {one_line(error)}")
        print(JOBS.failures[-1], file=sys.stderr)
    # Hydra would leave the other results unread
    return JobReturn(status=JobStatus.COMPLETED)
