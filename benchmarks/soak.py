"""Does a long sweep grow? `python benchmarks/soak.py [override ...]`, about 10 minutes on a CPU.

A sweep of 200 short jobs in one process, as `launch.py -m` runs them. After each job it notes what
the process holds: resident memory (without a garbage collection of its own), open files, threads.
With `tracker=wandb tracker.mode=offline` every job is a W&B run too. The last line is one JSON
object; the exit code is 1 if memory after the last job is more than 3 % from that after job 20, or
files or threads are more than they were then.
"""

import json
import os
import runpy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from orpo_lab import run
from orpo_lab.records.run_folder import versions

T = TypeVar("T")

ROOT = Path(__file__).parents[1]
NUM_JOBS = 200
# Until here imports, caches and the allocator's arenas come to their size
NUM_WARMUP_JOBS = 20
MAX_GROWTH = 0.03
# Jobs of a few seconds on a CPU
SHORT = (
    "dataset.num_train=32",
    "dataset.num_eval=8",
    "dataset.num_generations=1",
    "dataset.max_new_tokens=4",
    "train.max_steps=2",
    "train.batch_size=4",
)


def held(result: run.RunResult) -> dict[str, int]:
    """Return what this process holds now that a job has ended; memory in bytes."""
    process = Path("/proc/self")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return {
        "memory_bytes": int(status["VmRSS"].split()[0]) * 1024,
        "files": len(os.listdir(process / "fd")),
        "threads": int(status["Threads"]),
    }


def sweep(overrides: list[str], measure: Callable[[run.RunResult], T]) -> list[T]:
    """Run launch.py's sweep in this process, and return what is measured after each job."""
    after: list[T] = []
    train = run.train

    def watched(*args: Any, **kwargs: Any) -> run.RunResult:
        result = train(*args, **kwargs)
        after.append(measure(result))
        print(f"job {len(after)}: {after[-1]}", file=sys.stderr)
        return result

    run.train = watched
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["launch.py", "-m", f"hydra.sweep.dir={folder}", *overrides]
        try:
            runpy.run_path(str(ROOT / "launch.py"), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
    return after


def main(overrides: list[str]) -> None:
    """Run the sweep, print what it held, and judge."""
    after = sweep([f"seed=range({NUM_JOBS})", *SHORT, *overrides], held)
    early, late = after[NUM_WARMUP_JOBS - 1], after[-1]
    growth = late["memory_bytes"] / early["memory_bytes"] - 1
    sizes = [job["memory_bytes"] for job in after[NUM_WARMUP_JOBS:]]
    figures = {
        "jobs": len(after),
        f"after_{NUM_WARMUP_JOBS}": early,
        "after_last": late,
        "memory_growth": round(growth, 4),
        "memory_bytes_range": [min(sizes), max(sizes)],
        "overrides": overrides,
        "versions": versions(),
    }
    print(json.dumps(figures))
    is_flat = all(late[key] <= early[key] for key in ("files", "threads"))
    is_good = abs(growth) <= MAX_GROWTH and is_flat and len(after) == NUM_JOBS
    sys.exit(int(not is_good))


if __name__ == "__main__":
    main(sys.argv[1:])
