"""Does a job of a sweep stay on the GPU? `python benchmarks/gpu_sweep_memory.py [override ...]`.

Eight GaLore jobs in one process, as `launch.py -m` runs them; `--small` makes them short enough for
a CPU, where the figures are the process's. The last line is one JSON object with the peak of each
job and what is allocated after it; the exit code is 1 if the last peak is more than 2 % from the
second one's.
"""

import json
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

from orpo_lab import run
from orpo_lab.run_folder import versions

ROOT = Path(__file__).parents[1]
NUM_JOBS = 8
MAX_APART = 0.02
OVERRIDES = (f"seed=range({NUM_JOBS})", "optimizer=galore", "tracker=none", "train.max_steps=10")
SMALL = (
    "dataset.num_train=32",
    "dataset.num_eval=8",
    "dataset.num_generations=1",
    "dataset.max_new_tokens=4",
    "train.max_steps=2",
    "train.batch_size=4",
)


def sweep(overrides: list[str]) -> tuple[list[int], list[int]]:
    """Run the jobs; return each one's peak, and what is allocated on the GPU after it, in bytes."""
    peaks: list[int] = []
    after: list[int] = []
    train = run.train

    def watched(*args: Any, **kwargs: Any) -> run.RunResult:
        import torch

        result = train(*args, **kwargs)
        peaks.append(result.summary["train"]["peak_memory_bytes"])
        after.append(torch.cuda.memory_allocated() if torch.cuda.is_available() else 0)
        return result

    run.train = watched
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["launch.py", "-m", *OVERRIDES, f"hydra.sweep.dir={folder}", *overrides]
        try:
            runpy.run_path(str(ROOT / "launch.py"), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
    return peaks, after


def main(arguments: list[str]) -> None:
    """Run the sweep, print what it held, and judge."""
    overrides = [one for one in arguments if one != "--small"]
    small = SMALL if "--small" in arguments else ()
    peaks, after = sweep([*small, *overrides])
    apart = peaks[-1] / peaks[1] - 1
    figures = {
        "peak_memory_bytes": peaks,
        "allocated_after_bytes": after,
        "last_over_second": round(1 + apart, 4),
        "overrides": overrides,
        "versions": versions(),
    }
    print(json.dumps(figures))
    sys.exit(int(abs(apart) > MAX_APART or len(peaks) != NUM_JOBS))


if __name__ == "__main__":
    main(sys.argv[1:])
