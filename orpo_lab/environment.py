"""What a run takes from its process's environment, and what it does not let libraries take.

A run is what its config.yaml says. Libraries read variables behind our back that would make another
run of the same configuration: those are taken away before torch is imported, and said. Not in the
list is what only says where files and networks are (`HF_HOME`, `HF_HUB_OFFLINE`), what memory is
cut into (`PYTORCH_ALLOC_CONF`), what helps to find a fault (`CUDA_LAUNCH_BLOCKING`), and
`PYTHONHASHSEED`: no random number and no order of ours comes from the hash of a text.
"""

import os
import socket
import sys
from fnmatch import fnmatch
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from orpo_lab.errors import UserError

# Pattern -> what it would change
UNREAD = {
    "ACCELERATE_*": "precision, device, compiler and sharding of transformers' trainer",
    "FSDP_*": "sharding",
    "PARALLELISM_CONFIG_*": "sharding",
    "MEGATRON_LM_*": "sharding",
    "FP8_*": "precision",
    "FORK_LAUNCHED": "accelerate's kind of process",
    # One process is all there is (see `use_one_device`); accelerate would look for its group
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
# And what is set instead: kernels from the hub are on by default
FIXED = {"USE_HUB_KERNELS": "NO"}

# How often a thread looks whether the others are done before it sleeps, beside other work. The
# 300,000 looks that libgomp takes keep the cores from that work, and so from the run itself. A
# thousand are too few on idle cores: a small model's step is slower (`benchmarks/threads.py`)
SPINS = "1000"
# How long it takes to see whether the cores are idle
LOOK_SECONDS = 0.1

# Of the GPU that this process has claimed, for as long as it lives
_claims: list[FileLock] = []


def settle() -> list[str]:
    """Take away the variables that would change the run, and return what is to be said of them.

    Raises:
        UserError: the run was started under torchrun or the like.
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
        # Shells and schedulers set these for every process, one alone included
        if not name.endswith(("RANK", "WORLD_SIZE")) and FIXED.get(name) != value
    ]


def _must_make_room() -> bool:
    """Return whether the cores are busy with other work, and nobody has said how threads wait."""
    has_chosen = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
    if has_chosen or "torch" in sys.modules:  # with torch libgomp has read its variables
        return False
    idle = 1 - psutil.cpu_percent(LOOK_SECONDS) / 100
    has_affinity = hasattr(os, "sched_getaffinity")  # as Linux has
    num_threads = len(os.sched_getaffinity(0)) if has_affinity else psutil.cpu_count()
    return idle * psutil.cpu_count() < num_threads - 0.5


def _changes(name: str) -> str:
    return next(what for pattern, what in UNREAD.items() if fnmatch(name, pattern))


def refuse_several_processes() -> None:
    """Refuse to be one of several processes: each would run the whole run.

    Raises:
        UserError: the run was started under torchrun or the like.
    """
    size = os.environ.get("WORLD_SIZE", "").strip()
    if size not in ("", "0", "1"):
        raise UserError(
            f"a run uses one device, and WORLD_SIZE={size}: start it with python launch.py, not "
            "with torchrun"
        )


def use_one_device(shared: Path | None) -> None:
    """See one GPU only, before torch is imported.

    A run computes on one GPU, and jobs that run at a time take one each. The first job of a process
    decides for those after it: torch looks once.

    Args:
        shared: a folder of the sweep's, in which its processes claim a GPU each; None: the first.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[0] if shared is None else _claim(visible, shared)


def _claim(visible: list[str], folder: Path) -> str:
    """Return the GPU that the fewest processes of this machine have claimed."""
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
