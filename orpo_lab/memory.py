"""Memory of the device and the process: measure its peak, explain its end, free it after a run."""

import contextlib
import gc
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from orpo_lab.config import Config
from orpo_lab.config.engine import TrlEngine
from orpo_lab.config.optimizer import Galore, Lora
from orpo_lab.errors import UserError, one_line

# Words of plain RuntimeErrors that mean "out of memory": of CUDA's own calls, of cuBLAS, and of
# torch on a CPU
WORDS = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory")


def reset_peak() -> None:
    """Reset the peak to the memory in use now: the process may have trained another run before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # without /proc the peak stays that of the whole process
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Return the peak since `reset_peak`, in bytes: the GPU's allocations, or the process's size.

    The process's size (resident memory) is returned where there is no GPU.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would also count the memory of a larger process that started this process
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def allocated_bytes() -> int:
    """Return the bytes of all tensors on the GPU; 0 without a GPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def room_bytes() -> int | None:
    """Return how many bytes more the GPU has for tensors; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def ran_out(error: BaseException) -> bool:
    """Return whether an error means that a GPU or a CPU is out of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in WORDS)


@contextlib.contextmanager
def trouble_said(config: Config) -> Iterator[None]:
    """Inside this context, turn an out-of-memory error into a line that names what takes less.

    Raises:
        UserError: memory has run out.
    """
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        raise UserError(
            f"out of memory ({one_line(error)[:150]}); what takes less, in this order: "
            f"{', '.join(remedies(config))} (docs/hardware.md)"
        ) from error


def remedies(config: Config) -> list[str]:
    """Return settings with which a run of this configuration takes less memory, the best first.

    `engine.tokens_per_microbatch` is not among them: where a lower budget helps, the engine has
    halved the budget already.
    """
    found = []
    if isinstance(config.engine, TrlEngine):
        found += ["engine=shared_prefix", "engine.micro_batch_size lower"]
    if config.train.gradient_checkpointing == "false":
        found.append("train.gradient_checkpointing=true")
    match config.optimizer:
        case Galore(implementation="orpo_lab", layerwise=False):
            found.append("optimizer.layerwise=true")
    found.append(f"dataset.max_length below {config.dataset.max_length}")
    if not isinstance(config.optimizer, Lora):
        found.append("optimizer=qlora")
    return [*found, "a smaller model"]


@contextlib.contextmanager
def given_back() -> Iterator[None]:
    """Free all memory that was used inside this context: the next job may need all of it.

    If an error ends the context, its caller may keep the error, and with it the variables of every
    frame. So these variables are cleared. The lines of the traceback stay.
    """
    try:
        yield
    except BaseException as error:
        _clear_frames(error)
        raise
    finally:
        give_back()


def give_back() -> None:
    """Free the memory of objects that only reference cycles hold: models and trainers have many."""
    gc.collect()
    if torch.cuda.is_available():
        # Code compiled for the shapes of one model would change how the next model is compiled
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def _clear_frames(error: BaseException | None) -> None:
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
