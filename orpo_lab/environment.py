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
from collections.abc import Iterable
from dataclasses import dataclass
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
# Names of the variables that tell a process which one of several it is. We read them ourselves
# (`process`). accelerate and transformers must not: they would form a group of their own
RANKS = (
    *("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "*_LOCAL_RANK"),
    *("GROUP_*", "ROLE_*", "TORCHELASTIC_*", "MASTER_ADDR", "MASTER_PORT"),
)
# What `accelerate launch` writes into variables of settings that nobody has asked for
NOT_ASKED = {"no", "false", "default"}
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


@dataclass(frozen=True)
class Process:
    """Which one of the processes of a run this process is, as torchrun has said."""

    index: int = 0
    """Number of this process, from 0 on. The first process writes the run's files."""
    num: int = 1
    """Number of processes on all machines."""
    on_machine: int = 0
    """Number of this process among those of its machine, from 0 on."""


def process() -> Process:
    """Return which process this is; called before `forget_processes`.

    Raises:
        UserError: there are several processes, and a variable that torchrun sets is missing or is
            not a number.
    """
    size = os.environ.get("WORLD_SIZE", "").strip()
    if size in ("", "0", "1"):
        return Process()
    try:
        given = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        found = Process(*given)
        is_whole = bool(os.environ["MASTER_ADDR"] and os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        is_whole = False
    if not is_whole or not 0 <= found.index < found.num:
        raise UserError(
            f"WORLD_SIZE={size} asks for several processes, and RANK, LOCAL_RANK, MASTER_ADDR and "
            "MASTER_PORT do not say which one this is; start the run by torchrun, or unset "
            "WORLD_SIZE"
        )
    return found


def forget_processes() -> None:
    """Remove the variables that say which process this is, once the processes have met."""
    for name in _matching(RANKS):
        del os.environ[name]


def _matching(patterns: Iterable[str]) -> list[str]:
    return [name for name in sorted(os.environ) if any(fnmatch(name, each) for each in patterns)]


def settle() -> list[str]:
    """Remove the variables that would change the run, and return lines for the log about them.

    There is no line for variables that already have the value in FIXED, nor for those in which
    `accelerate launch` has written that nothing is asked. The variables of several
    processes stay until `forget_processes`.

    Raises:
        UserError: see `process`.
    """
    if process().num == 1:
        forget_processes()
    before = {name: os.environ.pop(name) for name in _matching(UNREAD)}
    os.environ.update(FIXED)
    if _must_make_room():
        os.environ["GOMP_SPINCOUNT"] = SPINS
    return [
        f"{name}={value} is not read: it would change {_changes(name)}, and the run is what its "
        "configuration says"
        for name, value in before.items()
        if FIXED.get(name) != value and not _asks_nothing(name, value)
    ]


def _asks_nothing(name: str, value: str) -> bool:
    return name.startswith("ACCELERATE_") and value.lower() in NOT_ASKED


def _must_make_room() -> bool:
    """Return whether the cores are busy with other work, and no variable says how threads wait."""
    has_chosen = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
    if has_chosen or "torch" in sys.modules:  # torch has loaded libgomp, which reads them once
        return False
    idle = 1 - psutil.cpu_percent(LOOK_SECONDS) / 100
    return idle * psutil.cpu_count() < num_cores() - 0.5


def num_cores() -> int:
    """Return how many cores this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")  # on Linux
    return len(os.sched_getaffinity(0)) if has_affinity else psutil.cpu_count() or 1


def _changes(name: str) -> str:
    return next(what for pattern, what in UNREAD.items() if fnmatch(name, pattern))


def use_one_device(shared: Path | None) -> None:
    """Make only one GPU visible; called before torch is imported.

    A process computes on one GPU. Jobs that run at the same time take one GPU each, and so do the
    processes of a run. The first job of a process decides for all its jobs, since torch reads the
    visible GPUs only once.

    Args:
        shared: a folder of the sweep, in which each of its processes claims a GPU. None: the first
            visible GPU is taken; of several processes of a machine, each takes the next one.

    Raises:
        UserError: the machine has more processes of this run than visible GPUs.
    """
    place = process().on_machine
    all_gpus = ",".join(map(str, range(place + 1)))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", all_gpus).split(",")
    if place >= len(visible):
        raise UserError(
            f"this is process {place + 1} of its machine, and CUDA_VISIBLE_DEVICES names "
            f"{len(visible)}: start as many processes as there are GPUs (--nproc-per-node)"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = (
        visible[place] if shared is None else _claim(visible, shared)
    )


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
