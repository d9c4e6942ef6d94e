"""Memory, the device's above all: its peak, its end, and that a run leaves nothing in it."""

import contextlib
import gc
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from orpo_lab.config import Config
from orpo_lab.config.engine import TrlEngine
from orpo_lab.config.optimizer import Lora
from orpo_lab.errors import UserError, one_line

# How libraries say it that raise a plain RuntimeError: CUDA's own calls, cuBLAS, torch on a CPU
WORDS = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory")


def reset_peak() -> None:
    """Let the peak begin anew, from what is held now: a process may have trained before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # elsewhere than on Linux it stays the process's
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Return the peak since `reset_peak`: the GPU's allocations, or a CPU process's size."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would count what a larger process held when it started this one
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ran_out(error: BaseException) -> bool:
    """Return whether an error says that there is no memory left, on a GPU or on a CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in WORDS)


@contextlib.contextmanager
def trouble_said(config: Config) -> Iterator[None]:
    """Turn an error of no memory into a line that names what takes less.

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
    """Return what a run of this configuration can change to take less memory, the best first.

    `engine.tokens_per_microbatch` is not among them: where that helps, the engine has halved the
    budget already.
    """
    found = []
    if isinstance(config.engine, TrlEngine):
        found += ["engine=shared_prefix", "engine.micro_batch_size lower"]
    if not config.train.gradient_checkpointing:
        found.append("train.gradient_checkpointing=true")
    found.append(f"dataset.max_length below {config.dataset.max_length}")
    if not isinstance(config.optimizer, Lora):
        found.append("optimizer=qlora")
    return [*found, "a smaller model"]


@contextlib.contextmanager
def given_back() -> Iterator[None]:
    """Leave nothing of what is done meanwhile in memory: the next job may need all of it.

    An error that ends it may be kept by whoever catches it, and with it every frame's variables:
    those are cleared, and the traceback's lines stay.
    """
    try:
        yield
    except BaseException as error:
        _clear_frames(error)
        raise
    finally:
        give_back()


def give_back() -> None:
    """Free what nothing refers to any more: models and trainers are full of cycles."""
    gc.collect()
    if torch.cuda.is_available():
        # What was compiled for one model's shapes would decide how the next one's are compiled
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def _clear_frames(error: BaseException | None) -> None:
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
