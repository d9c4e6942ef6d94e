"""Which GaLore settings? `python benchmarks/galore_choices.py MODEL PAIRS`.

Trains the model in folder MODEL on the pairs in folder PAIRS (`train.jsonl`, `test.jsonl`), once
per setting and seed, two runs at a time, and prints what each setting changes against the default:
the mean over seeds of the paired differences of held-out metrics, and its standard error. About 15
minutes for a model of 15 M parameters on two CPU cores. The last line is one JSON object.
"""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).parents[1]
SEEDS = (1, 2, 3)
METRICS = ("chosen_nll", "logp_margin")
SETTINGS = (
    "",
    "refresh=exact",
    "refresh=randomized",
    "stagger_refresh=false",
    "rotate_moments=true",
    "update_proj_gap=30",
    "implementation=galore_torch",
)


def run(model: str, pairs: str, setting: str, seed: int) -> dict[str, float]:
    """Return the metrics of one run."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        command = [
            sys.executable,
            str(ROOT / "launch.py"),
            "model=local",
            f"model.path={model}",
            "model.dtype=fp32",
            "dataset=jsonl",
            "dataset.as_messages=false",
            f"dataset.train_path={pairs}/train.jsonl",
            f"dataset.eval_path={pairs}/test.jsonl",
            "dataset.max_length=192",
            "dataset.max_prompt_length=96",
            "dataset.num_eval=64",
            "dataset.num_generations=2",
            "dataset.max_new_tokens=8",
            "optimizer=galore",
            "optimizer.learning_rate=1e-3",
            "optimizer.rank=64",
            "optimizer.update_proj_gap=6",
            *([f"optimizer.{setting}"] if setting else []),
            "train.max_steps=30",
            "train.batch_size=4",
            "engine=trl",
            "engine.micro_batch_size=4",
            "tracker=none",
            f"seed={seed}",
            f"hydra.run.dir={folder}",
        ]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=env)
        after = json.loads((folder / "summary.json").read_text())["after"]
    return {metric: after[metric] for metric in METRICS}


def main(model: str, pairs: str) -> None:
    """Run the grid and print it."""
    grid = [(setting, seed) for seed in SEEDS for setting in SETTINGS]
    with ThreadPoolExecutor(2) as pool:
        ended = pool.map(lambda case: run(model, pairs, *case), grid)
        results = dict(zip(grid, ended, strict=True))
    report: dict[str, Any] = {}
    for setting in SETTINGS:
        for metric in METRICS:
            values = [results[setting, seed][metric] for seed in SEEDS]
            changes = [
                value - results["", seed][metric] for value, seed in zip(values, SEEDS, strict=True)
            ]
            error = stdev(changes) / len(changes) ** 0.5
            row = {"mean": mean(values), "change": mean(changes), "standard_error": error}
            report[f"{setting or 'default'} {metric}"] = row
            print(
                f"{setting or 'default':28} {metric:12} {row['mean']:8.4f}  "
                f"change {row['change']:+.4f} +- {error:.4f}"
            )
    print(json.dumps(report))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: python {sys.argv[0]} MODEL PAIRS")
    main(*sys.argv[1:])
