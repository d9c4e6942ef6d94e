"""Does a mixture of two runs predict the betas between them? Trained against predicted.

    python benchmarks/dial.py OUT        the embedded default, 15 runs: a quarter of an hour
    python benchmarks/dial.py OUT --betas 0.05 0.2 1 --override optimizer=galore
    python benchmarks/dial.py OUT --betas 0.05 0.2 1 --workload math --model SMOLLM2 --pairs PAIRS

Trains every beta with every seed, each in a folder of OUT, one after the other; a finished run is
not trained again. Then it turns the dial between the lowest and the highest beta of each seed, and
compares the mixtures with the betas between (`python -m orpo_lab dial`). The last line of the
output is one JSON object, the content of OUT/dial.json.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from methods import FILES, ROOT, SMOLLM2

from orpo_lab.__main__ import main as command
from orpo_lab.records.run_folder import RunFolder

BETAS = (0.05, 0.1, 0.2, 0.5, 1.0)
SEEDS = (1, 2, 3)


def train(folder: Path, overrides: Sequence[str]) -> None:
    """Train a run, unless it has finished."""
    if RunFolder(folder).is_complete():
        return
    given = ["tracker=none", "resume=auto", f"hydra.run.dir={folder}", *overrides]
    subprocess.run([sys.executable, str(ROOT / "launch.py"), *given], check=True)


def main() -> None:
    """Train what has not been trained, and turn the dial."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of all runs")
    parser.add_argument("--workload", choices=["embedded", *FILES], default="embedded")
    parser.add_argument("--model", type=Path, help="folder of SmolLM2, for math and chat")
    parser.add_argument("--pairs", type=Path, help="folder of the pairs, for math and chat")
    parser.add_argument("--betas", nargs="+", type=float, default=BETAS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--points", default="11", help="number of mixtures")
    parser.add_argument("--override", nargs="+", default=[], help="for every run")
    options = parser.parse_args()
    overrides = list(options.override)
    if options.workload in FILES:
        if not (options.model and options.pairs):
            parser.error("--workload math and chat need --model and --pairs")
        train_path, eval_path = (options.pairs / name for name in FILES[options.workload])
        places = [f"model.path={options.model}", f"dataset.train_path={train_path}"]
        overrides = [*SMOLLM2, *places, f"dataset.eval_path={eval_path}", *overrides]
    low, *between, high = sorted(options.betas)
    for seed in options.seeds:
        for beta in (low, high, *between):
            folder = options.out / f"beta{beta:g}-seed{seed}"
            train(folder, [*overrides, f"beta={beta:g}", f"seed={seed}"])
    ends = [str(options.out / f"beta{beta:g}-seed{options.seeds[0]}") for beta in (low, high)]
    given = ["--trained", str(options.out), "--out", str(options.out), "--points", options.points]
    command(["dial", *ends, *given])
    print((options.out / "dial.json").read_text().replace("\n", ""))


if __name__ == "__main__":
    main()
