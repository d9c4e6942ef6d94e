"""A run beside other work: `python benchmarks/threads.py [override ...]`, 12 minutes on two cores.

The same short run of launch.py with threads that wait for each other as the lab has them, as
libgomp has them by itself, and with one thread; on idle cores and beside as many busy processes as
there are cores, one after the other and several times. The last line is one JSON object with the
medians of the whole command's seconds: `busy_over_idle` is to be at most 3, `over_libgomps_idle`
and `over_one_idle` at most about 1. Wants a quiet machine.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from orpo_lab.records.run_folder import versions

ROOT = Path(__file__).parents[1]
NUM_REPEATS = 3
OVERRIDES = (
    "tracker=none",
    "train.max_steps=20",
    "dataset.num_eval=16",
    "dataset.num_generations=4",
)
# What a run is told; 300,000 is what libgomp takes by itself
CHOICES: dict[str, dict[str, str]] = {
    "chosen": {},
    "libgomps": {"GOMP_SPINCOUNT": "300000"},
    "one": {"OMP_NUM_THREADS": "1"},
}


@contextlib.contextmanager
def busy(num: int) -> Iterator[None]:
    """Keep cores busy meanwhile."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def seconds(environment: dict[str, str], overrides: list[str]) -> float:
    """Return how long a run takes, from its command to its end."""
    theirs = ("OMP_", "GOMP_")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "launch.py"), *OVERRIDES, *overrides]
        begun = time.monotonic()
        subprocess.run(
            [*command, f"hydra.run.dir={folder}/run"],
            env={**variables, **environment},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return time.monotonic() - begun


def main(overrides: list[str]) -> None:
    """Measure and print."""
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(NUM_REPEATS):
        for choice, environment in CHOICES.items():
            for name, num in {"idle": 0, "busy": os.cpu_count() or 1}.items():
                with busy(num):
                    found[f"{choice}_{name}"].append(seconds(environment, overrides))
                print(f"{choice} {name}: {found[f'{choice}_{name}'][-1]:.1f} s", file=sys.stderr)
    middle = {name: round(median(times), 1) for name, times in found.items()}
    figures = {
        "cores": os.cpu_count(),
        "seconds": middle,
        "busy_over_idle": round(middle["chosen_busy"] / middle["chosen_idle"], 2),
        **{
            f"over_{choice}_idle": round(middle["chosen_idle"] / middle[f"{choice}_idle"], 2)
            for choice in ("libgomps", "one")
        },
        "overrides": overrides,
        "versions": versions(),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
