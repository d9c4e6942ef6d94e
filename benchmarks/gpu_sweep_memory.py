"""Does a job of a sweep stay on the GPU? `python benchmarks/gpu_sweep_memory.py [override ...]`.

Eight GaLore jobs in one process, as `launch.py -m` runs them; `--small` makes them short enough for
a CPU, where the figures are the process's. The last line is one JSON object with the peak of each
job and what is allocated after it; the exit code is 1 if the last peak is more than 2 % from the
second one's.
"""

import json
import sys

from soak import SHORT, sweep

from orpo_lab import run
from orpo_lab.records.run_folder import versions

NUM_JOBS = 8
MAX_APART = 0.02
OVERRIDES = (f"seed=range({NUM_JOBS})", "optimizer=galore", "tracker=none", "train.max_steps=10")


def held(result: run.RunResult) -> tuple[int, int]:
    """Return a job's peak, and what is allocated on the GPU now that it has ended, in bytes."""
    import torch

    allocated = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    return result.summary["train"]["peak_memory_bytes"], allocated


def main(arguments: list[str]) -> None:
    """Run the sweep, print what it held, and judge."""
    overrides = [argument for argument in arguments if argument != "--small"]
    short = SHORT if "--small" in arguments else ()
    peaks, after = zip(*sweep([*OVERRIDES, *short, *overrides], held), strict=True)
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
