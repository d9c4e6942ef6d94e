"""What a sweep costs beside its work: `python benchmarks/sweep_overhead.py`, a minute on a CPU.

A sweep of four short jobs on the embedded default, with a W&B run each (offline): from the end of
the first job's start-up to the end of the process, report included, over the sum of what the jobs
spent on training and evaluation. The last line is one JSON object.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
OVERRIDES = ("beta=0.05,0.1,0.2,0.5", "train.max_steps=60", "tracker.mode=offline")


def work(summary: Path) -> tuple[float, float]:
    """Return the seconds of a job's evaluation before, and of its training and evaluation after."""
    figures = json.loads(summary.read_text())
    evaluation = figures["evaluation_seconds"]
    return evaluation["before"], figures["train"]["wall_seconds"] + evaluation["after"]


def main() -> None:
    """Run the sweep and print its overhead."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "launch.py"), "-m", *OVERRIDES]
        command += [f"hydra.sweep.dir={folder}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        end = time.time()
        summaries = sorted(Path(folder).glob("*/summary.json"))
        parts = [work(summary) for summary in summaries]
        before = parts[0][0]  # made once, for all
        began = summaries[0].stat().st_mtime - before - parts[0][1]
        spent = before + sum(rest for _, rest in parts)
    figures = {
        "jobs": len(parts),
        "seconds": round(end - began, 1),
        "work_seconds": round(spent, 1),
    }
    print(json.dumps(figures | {"ratio": round((end - began) / spent, 3)}))


if __name__ == "__main__":
    main()
