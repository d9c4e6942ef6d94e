"""Control which environment variables may affect a run.

Only config.yaml may decide what a run computes. Libraries read environment variables that would
change a run without a change of its configuration. These variables are removed before torch is
imported. The log names them, except those that `settle` leaves out.

Some variables are not in the list. They only say where files and networks are (`HF_HOME`,
`HF_HUB_OFFLINE`), how memory is divided (`PYTORCH_ALLOC_CONF`), or help to find a fault
(`CUDA_LAUNCH_BLOCKING`). `PYTHONHASHSEED` is not in the list either: none of our random numbers or
orders depends on the hash of a text.
"""

import os
import socket
import sys
from fnmatch import fnmatch
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from orpo_lab.errors import UserError

# Pattern of a variable's name -> what the variable would change
UNREAD = {
    "ACCELERATE_*": "precision, device, compiler and sharding of transformers' trainer",
    "FSDP_*": "sharding",
    "PARALLELISM_CONFIG_*": "sharding",
    "MEGATRON_LM_*": "sharding",
    "FP8_*": "precision",
    "FORK_LAUNCHED": "accelerate's kind of process",
    # A run has one process (see `use_one_device`); accelerate would look for a group of processes
    "WORLD_SIZE": "the number of processes",
    "RANK": "the number of processes",
    "LOCAL_RANK": "the number of processes",
    "LOCAL_WORLD_SIZE": "the number of processes",
    "*_LOCAL_RANK": "the number of processes",
    "TORCHELASTIC_*": "the folder of transformers' output",
    "USE_TORCH_XLA": "the device",
    "PJRT_DEVICE": "the device",
    "NVIDIA_TF32_OVERRIDE": "the precision of matrix products on a GPU",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "the precision of matrix products on a GPU",
    "ONEDNN_DEFAULT_FPMATH_MODE": "the precision of matrix products on a CPU",
    "DNNL_DEFAULT_FPMATH_MODE": "the precision of matrix products on a CPU",
    "USE_HUB_KERNELS": "the kernels, and whether code from the hub is run",
    "TRANSFORMERS_DISABLE_DEEPGEMM_LINEAR": "the kernels",
    "USE_TF": "the framework that datasets reads for",
    "USE_JAX": "the framework that datasets reads for",
    "USE_TORCH": "the framework that datasets reads for",
}
# Variables that are set instead: kernels from the hub are on by default
FIXED = {"USE_HUB_KERNELS": "NO"}

# How often a waiting thread checks whether the other threads are done before it sleeps, if the
# cores have other work too. libgomp's default of 300,000 checks would keep the cores from that
# work, and so slow the run itself. 1,000 checks are too few on idle cores: the step of a small
# model is slower (`benchmarks/threads.py`)
SPINS = "1000"
# Seconds for measuring whether the cores are idle
LOOK_SECONDS = 0.1

# The lock of the GPU that this process has claimed, held until the process ends
_claims: list[FileLock] = []


def settle() -> list[str]:
    """Remove the variables that would change the run, and return lines for the log about them.

    There is no line for variables that are set for every process (ranks and numbers of processes),
    or that already have the value in FIXED.

    Raises:
        UserError: the run was started under torchrun or a similar launcher.
    """
    refuse_several_processes()
    found = [
        name for name in sorted(os.environ) if any(fnmatch(name, pattern) for pattern in UNREAD)
    ]
    before = {name: os.environ.pop(name) for name in found}
    os.environ.update(FIXED)
    if _must_make_room():
        os.environ["GOMP_SPINCOUNT"] = SPINS
    return [
        f"{name}={value} is not read: it would change {_changes(name)}, and the run is what its "
        "configuration says"
        for name, value in before.items()
        # Shells and schedulers set these variables for every process, even for a single one
        if not name.endswith(("RANK", "WORLD_SIZE")) and FIXED.get(name) != value
    ]


def _must_make_room() -> bool:
    """Return whether the cores are busy with other work, and no variable says how threads wait."""
    has_chosen = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
    if has_chosen or "torch" in sys.modules:  # torch has loaded libgomp, which reads them once
        return False
    idle = 1 - psutil.cpu_percent(LOOK_SECONDS) / 100
    has_affinity = hasattr(os, "sched_getaffinity")  # on Linux
    num_threads = len(os.sched_getaffinity(0)) if has_affinity else psutil.cpu_count()
    return idle * psutil.cpu_count() < num_threads - 0.5


def _changes(name: str) -> str:
    return next(what for pattern, what in UNREAD.items() if fnmatch(name, pattern))


def refuse_several_processes() -> None:
    """Refuse to run as one of several processes, each of which would do the whole run.

    Raises:
        UserError: the run was started under torchrun or a similar launcher.
    """
    size = os.environ.get("WORLD_SIZE", "").strip()
    if size not in ("", "0", "1"):
        raise UserError(
            f"a run uses one device, and WORLD_SIZE={size}: start it with python launch.py, not "
            "with torchrun"
        )


def use_one_device(shared: Path | None) -> None:
    """Make only one GPU visible; called before torch is imported.

    A run computes on one GPU, and jobs that run at the same time take one GPU each. The first job
    of a process decides for all its jobs, since torch reads the visible GPUs only once.

    Args:
        shared: a folder of the sweep, in which each of its processes claims a GPU. None: the first
            visible GPU is taken.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[0] if shared is None else _claim(visible, shared)


def _claim(visible: list[str], folder: Path) -> str:
    """Claim a GPU for this process, and return its name.

    The GPU is one that the fewest processes of this machine have claimed.
    """
    if _claims or len(visible) == 1:
        return visible[0]
    folder.mkdir(parents=True, exist_ok=True)
    turn = 0
    while True:
        for device in visible:
            claim = FileLock(folder / f"gpu-{socket.gethostname()}-{device}-{turn}.lock")
            try:
                claim.acquire(blocking=False)
            except Timeout:
                continue
            _claims.append(claim)
            return device
        turn += 1
