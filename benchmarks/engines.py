"""Does a run come out the same under both engines? `python benchmarks/engines.py`, 3 minutes.

The default run (QLoRA on the embedded pairs) with `engine=trl` and `engine=shared_prefix`, three
seeds each, in turn: seconds of training and of the whole command, the final held-out figures, and
how far the training curves of the two are apart, beside how far those of two seeds are. The last
line is one JSON object.
"""

import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

ROOT = Path(__file__).parents[1]
ENGINES = ("trl", "shared_prefix")
SEEDS = (1, 2, 3)
FINAL = ("preference_accuracy", "exact_match", "logp_margin", "chosen_nll")
CURVES = ("loss", "nll_loss", "odds_ratio_loss", "logp_margin")


def run(engine: str, seed: int) -> dict[str, Any]:
    """Return a run's summary, its curves and how long the command took."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        command = [sys.executable, str(ROOT / "launch.py"), f"engine={engine}", f"seed={seed}"]
        start = time.perf_counter()
        subprocess.run(
            [*command, "tracker=none", f"hydra.run.dir={folder}"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        seconds = time.perf_counter() - start
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((folder / "summary.json").read_text())
    return {"summary": summary, "lines": lines, "seconds": seconds}


def apart(result: dict[str, Any], other: dict[str, Any], curve: str) -> float:
    """Return the mean over logging steps of the distance between two runs' curves."""
    pairs = zip(result["lines"], other["lines"], strict=True)
    return mean(abs(left[curve] - right[curve]) for left, right in pairs)


def main() -> None:
    """Run the grid and print it."""
    runs = {(engine, seed): run(engine, seed) for seed in SEEDS for engine in ENGINES}
    report: dict[str, Any] = {}
    for figure in FINAL:
        after = {
            engine: [runs[engine, seed]["summary"]["after"][figure] for seed in SEEDS]
            for engine in ENGINES
        }
        changes = [ours - theirs for theirs, ours in zip(*after.values(), strict=True)]
        report[figure] = {
            **{engine: [round(value, 4) for value in values] for engine, values in after.items()},
            "mean_change": round(mean(changes), 4),
            "standard_error": round(stdev(changes) / len(changes) ** 0.5, 4),
        }
        print(figure, json.dumps(report[figure]), flush=True)
    for curve in CURVES:
        first, second = ENGINES
        between_engines = mean(apart(runs[first, s], runs[second, s], curve) for s in SEEDS)
        between_seeds = mean(
            apart(runs[engine, seed], runs[engine, other], curve)
            for engine in ENGINES
            for seed, other in itertools.combinations(SEEDS, 2)
        )
        report[f"{curve}_curves_apart"] = {
            "engines": round(between_engines, 5),
            "seeds": round(between_seeds, 5),
        }
        print(curve, "curves apart", json.dumps(report[f"{curve}_curves_apart"]), flush=True)
    for name, seconds in (
        ("training", lambda result: result["summary"]["train"]["wall_seconds"]),
        ("command", lambda result: result["seconds"]),
    ):
        report[f"{name}_seconds"] = {
            engine: round(median(seconds(runs[engine, seed]) for seed in SEEDS), 1)
            for engine in ENGINES
        }
        print(name, "seconds", json.dumps(report[f"{name}_seconds"]), flush=True)
    report["versions"] = runs[ENGINES[0], SEEDS[0]]["summary"]["versions"]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
