"""Does beta matter on the embedded default? `python benchmarks/beta.py [override ...]`, 5 minutes.

Runs beta 0, 0.1 and 1 with three seeds each, one job after the other, and prints the held-out
preference accuracy and exact match of both halves. The last line is one JSON object.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).parents[1]
BETAS = (0.0, 0.1, 1.0)
SEEDS = (1, 2, 3)
FIGURES = ("preference_accuracy", "exact_match")


def run(beta: float, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Return the summary of one run."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        subprocess.run(
            [
                sys.executable,
                str(ROOT / "launch.py"),
                f"beta={beta}",
                f"seed={seed}",
                "tracker=none",
                f"hydra.run.dir={folder}",
                *overrides,
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return json.loads((folder / "summary.json").read_text())


def main(overrides: list[str]) -> None:
    """Run the grid and print it."""
    result: dict[str, Any] = {}
    for beta in BETAS:
        summaries = [run(beta, seed, overrides) for seed in SEEDS]
        for half in ("free", "terse"):
            for figure in FIGURES:
                values = [summary["after"]["by_wording"][half][figure] for summary in summaries]
                result[f"beta_{beta:g}_{half}_{figure}"] = round(mean(values), 4)
                each = " ".join(f"{value:.3f}" for value in values)
                print(
                    f"beta {beta:<4g} {half:6} {figure:20} mean {mean(values):.3f}  ({each})",
                    flush=True,
                )
    result["versions"] = summaries[0]["versions"]
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
