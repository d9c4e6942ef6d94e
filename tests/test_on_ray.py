"""What a job gets of a cluster of Ray; test_sweep.py and test_stop.py have whole sweeps on Ray."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from faults import processes
from orpo_lab.errors import UserError
from orpo_lab.sweep import start
from orpo_lab.sweep.folder import Sweep
from orpo_lab.sweep.on_ray import VARIABLES, RayLauncher, _cluster, _in_words
from tests.conftest import ROOT

NODES = [{"CPU": 8.0}, {"CPU": 4.0, "GPU": 2.0, "accelerator_type:A100": 1.0}]


def launcher(**keys: Any) -> RayLauncher:
    defaults = {"address": None, "num_cpus_per_job": 1, "jobs_per_gpu": 1, "accelerator_type": None}
    return RayLauncher(**{**defaults, **keys})


@pytest.mark.parametrize(
    ("keys", "nodes", "needs"),
    [
        ({}, NODES[:1], {"num_cpus": 1}),
        ({}, NODES, {"num_cpus": 1, "num_gpus": 1.0}),
        ({"jobs_per_gpu": 4, "num_cpus_per_job": 2}, NODES, {"num_cpus": 2, "num_gpus": 0.25}),
        ({"accelerator_type": "A100"}, NODES, {"num_cpus": 1, "num_gpus": 1.0}),
    ],
)
def test_a_job_takes_its_share_of_a_gpu_where_there_are_gpus(
    keys: dict[str, Any], nodes: list[dict[str, float]], needs: dict[str, Any]
) -> None:
    assert launcher(**keys)._needs(nodes) == needs


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"jobs_per_gpu": 0}, "jobs_per_gpu=0 must be a whole number of at least 1"),
        ({"jobs_per_gpu": 0.5}, "jobs_per_gpu=0.5 must be a whole number"),
        ({"num_cpus_per_job": 0}, "num_cpus_per_job=0 must be a whole number"),
        ({"num_cpus_per_job": 9}, "num_cpus_per_job=9 is above the 8 CPU cores"),
        ({"accelerator_type": "H100"}, "accelerator_type=H100: the cluster has A100"),
    ],
)
def test_what_no_machine_has_is_refused_and_not_waited_for(
    keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=rf"hydra\.launcher\.{message}"):
        launcher(**keys)._needs(NODES)


def test_a_sweep_says_what_its_jobs_run_on() -> None:
    half = launcher(jobs_per_gpu=2)
    assert _in_words(NODES, half._needs(NODES), [{}]) == (
        "ray: 12 CPU cores, 2 GPUs on 2 machines; a job takes 1 CPU, 0.5 GPU"
    )
    assert _in_words(NODES[:1], half._needs(NODES[:1]), [{}]).endswith(
        "a job takes 1 CPU, on the CPU"
    )


def test_jobs_of_a_named_type_all_need_that_type() -> None:
    named = launcher(accelerator_type="A100")
    assert named._kinds(NODES, [["beta=0.1"], ["beta=0.2"]]) == [{"accelerator_type": "A100"}] * 2
    assert launcher()._kinds(NODES, [[]]) == [{}]


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert start._missing("ray").startswith("ray, which is not installed: pip install")
    assert "[ray]" in start._missing("ray")
    assert start._missing("joblib") == ""


# Four jobs at once on two GPUs that Ray believes in. Each says which GPU torch would see in its
# process
FOUR_JOBS = """
import json, os, sys, time
from pathlib import Path
from orpo_lab import environment
from orpo_lab.sweep.on_ray import RayLauncher, _cluster

def job(folder, number):
    (folder / f"here-{number}").touch()
    while len(list(folder.glob("here-*"))) < 4:
        time.sleep(0.05)
    environment.use_one_device(folder / "claims")
    return os.environ["CUDA_VISIBLE_DEVICES"]

with _cluster(None) as ray:
    nodes = [node["Resources"] for node in ray.nodes()]
    needs = RayLauncher(None, 1, 2, None)._needs(nodes)
    task = ray.remote(max_calls=1, **needs)(job)
    folder = Path(sys.argv[1])
    print(json.dumps(ray.get([task.remote(folder, number) for number in range(4)], timeout=120)))
"""


@pytest.mark.slow
def test_jobs_use_the_gpu_that_ray_gives_them_two_to_a_gpu(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_OVERRIDE_RESOURCES": '{"CPU": 4, "GPU": 2}'}
    done = subprocess.run(
        [sys.executable, "-c", FOUR_JOBS, str(tmp_path)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Counter(json.loads(done.stdout)) == {"0": 2, "1": 2}
    assert not (tmp_path / "claims").exists(), "a second choice of GPU"


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nowhere", "ray://127.0.0.1:10001"])
def test_where_no_cluster_is_one_line_says_so(address: str) -> None:
    with (
        pytest.raises(UserError, match=f"address={address}: .* give auto, or the host:port"),
        _cluster(address),
    ):
        pass


# Two machines of one core each, as far as Ray knows, until the other end is closed. Each may have a
# GPU of some type, which is only a name
CLUSTER = """
import sys
from ray.cluster_utils import Cluster

first, second = (
    {"num_gpus": 1, "resources": {"accelerator_type:" + kind: 1}} if kind else {}
    for kind in (sys.argv[1:] or [None, None])
)
head = {"num_cpus": 1, "include_dashboard": False, **first}
cluster = Cluster(initialize_head=True, head_node_args=head)
cluster.add_node(num_cpus=1, **second)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a cluster of two machines, with GPUs of the types that are asked for."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **VARIABLES}
    command = [sys.executable, "-c", CLUSTER, *getattr(request, "param", [])]
    with subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()


@pytest.mark.slow
def test_jobs_on_the_machines_of_a_cluster_end_with_a_killed_sweep_and_go_on(
    tmp_path: Path, cluster: str
) -> None:
    command = ["-m", "hydra/launcher=ray", f"hydra.launcher.address={cluster}", "beta=0.1,0.2"]
    command += ["tracker=none", "train.max_steps=24", "train.save_steps=4", "dataset.num_eval=8"]
    command += ["dataset.num_generations=0", "hydra.sweep.dir=sweep"]
    said, folder = tmp_path / "said", tmp_path / "sweep"
    first = processes.start(said, command, at=tmp_path, fresh=True)
    saved = "*/checkpoints/*/manifest.json"
    first.wait_for(lambda: len({file.parents[2] for file in folder.glob(saved)}) == 2)
    jobs = [job for job in psutil.process_iter() if job.name().startswith("ray::job")]
    assert len({job.ppid() for job in jobs}) == 2, "a machine each"
    first.signal(signal.SIGKILL)
    assert first.wait().code == -signal.SIGKILL
    psutil.wait_procs(jobs, timeout=30)
    assert not any(job.is_running() for job in jobs)
    done = processes.start(said, command, at=tmp_path, fresh=True).wait()
    assert done.code == 0, done.stderr
    assert done.stdout.startswith("ray: 2 CPU cores, 0 GPUs on 2 machines;")
    for job in Sweep(folder).jobs():
        assert job.is_complete()
        assert "resuming from step" in job.file("run.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [["T4", "H100"]], indirect=True)
def test_jobs_go_to_the_type_of_gpu_on_which_they_end_first(tmp_path: Path, cluster: str) -> None:
    command = ["-m", "hydra/launcher=ray", f"hydra.launcher.address={cluster}", "beta=0.1,0.2"]
    command += ["hydra.launcher.accelerator_type=plan", "tracker=none", "train.max_steps=1"]
    command += ["dataset.num_eval=8", "dataset.num_generations=0", "hydra.sweep.dir=sweep"]
    done = processes.start(tmp_path / "said", command, at=tmp_path, fresh=True).wait()
    assert done.code == 0, done.stderr
    # Behind the first job the second one would end later on the faster GPU
    assert "a job takes 1 CPU, 1 GPU; 1 on H100, 1 on T4" in done.stdout
    jobs = Sweep(tmp_path / "sweep").jobs()
    assert [job.is_complete() for job in jobs] == [True, True]
