"""The price of a sweep: the full grid, the grid with forks, and races over seeds with forks.

    python benchmarks/sweep_cost.py OUT                    hours on two cores
    python benchmarks/sweep_cost.py OUT --small            every part, a few steps: minutes

The sweep: 4 betas x 7 schedules (constant, linear, cosine, step, and hold_then_anneal with
fractions 0.2, 0.4 and 0.6) on the embedded default, every setting with 3 seeds in the grids. Each
part is a process of its own. The races begin with two seeds, or with one, for every setting. A part
that has finished in OUT is not made again, so the same command goes on after an interruption;
`--parts` names those to make.

Printed: CPU seconds of each part, its runs and its verdict, and what annealing does to preference
accuracy and to the share of preference in the gradient. The last line is one JSON object, which is
also written to OUT/sweep_cost.json.
"""

import argparse
import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

from orpo_lab.compare.evidence import compare
from orpo_lab.compare.page import setting_rows
from orpo_lab.compare.read import find_runs
from orpo_lab.compare.words import verdict_text
from orpo_lab.metrics import MARGINS, PREFERENCE_SHARE
from orpo_lab.records.run_folder import versions

ROOT = Path(__file__).parents[1]
SCHEDULES = (
    "constant",
    "linear",
    "cosine",
    "step",
    "hold_then_anneal_02",
    "hold_then_anneal_04",
    "hold_then_anneal_06",
)
SWEEP = (
    f"--config-dir={ROOT / 'benchmarks' / 'schedules'}",
    "-m",
    "beta=0.05,0.1,0.2,0.5",
    f"beta_schedule={','.join(SCHEDULES)}",
    "train.meter_steps=30",
    "tracker=none",
)
SEEDS = "seed=1,2,3"
PARTS: dict[str, tuple[str, ...]] = {
    "grid": (SEEDS, "train.forks=false"),
    "forks": (SEEDS,),
    "race": ("hydra/sweeper=race", "hydra.sweeper.max_seeds=3"),
    "race_of_one": (
        "hydra/sweeper=race",
        "hydra.sweeper.min_seeds=1",
        "hydra.sweeper.max_seeds=3",
    ),
}
SMALL = (
    "train.max_steps=8",
    "train.meter_steps=4",
    "dataset.num_train=64",
    "dataset.num_eval=16",
    "dataset.num_generations=4",
)


def make(part: str, out: Path, more: list[str]) -> None:
    """Run a part's sweep, unless it has finished already; record its CPU seconds."""
    record = out / f"{part}.json"
    if record.exists():
        return
    command = [sys.executable, str(ROOT / "launch.py"), *SWEEP, *PARTS[part], *more]
    command.append(f"hydra.sweep.dir={out / part}")
    before = (
        json.loads((out / f"{part}.part").read_text()) if (out / f"{part}.part").exists() else 0
    )
    with (out / f"{part}.log").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
    seconds = before + used.ru_utime + used.ru_stime
    if status:
        (out / f"{part}.part").write_text(json.dumps(seconds))
        raise SystemExit(f"{part} has failed; see {log.name}")
    record.write_text(json.dumps({"cpu_seconds": seconds}))


def figures(part: str, out: Path) -> dict[str, Any]:
    """Return what a part has cost and found."""
    runs = find_runs([out / part])
    compared = compare(runs, MARGINS)
    train = [run.summary["train"] for run in runs if run.summary]
    return {
        **json.loads((out / f"{part}.json").read_text()),
        "runs": len(runs),
        "steps": sum(one["steps"] - one.get("shared_steps", 0) for one in train),
        "verdict": verdict_text(compared),
        "winner": None if (won := compared.verdict.winner) is None else compared.settings[won].name,
        "leader": compared.settings[compared.verdict.leader].name,
        "settings": setting_rows(compared),
    }


def annealing(part: str, out: Path) -> list[dict[str, Any]]:
    """Return for every setting the share of preference in the gradient, first and last measured."""
    compared = compare(find_runs([out / part]), MARGINS)
    rows = []
    for setting, row in zip(compared.settings, setting_rows(compared), strict=True):
        shares = [
            [line[PREFERENCE_SHARE] for line in run.metrics if PREFERENCE_SHARE in line]
            for run in setting.runs
        ]
        ends = [sum(of_run[at] for of_run in shares) / len(shares) for at in (0, -1)]
        rows.append(row | {"first share": round(ends[0], 3), "last share": round(ends[1], 3)})
    return rows


def main() -> None:
    """Make the parts, and print what they cost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of all parts")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--small", action="store_true", help="a few steps, to see that all works")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        make(part, options.out, [*SMALL] if options.small else [])
    found = {part: figures(part, options.out) for part in options.parts}
    for row in annealing(options.parts[0], options.out):
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    grid = found.get("grid")
    for part, made in found.items():
        ratio = f", {made['cpu_seconds'] / grid['cpu_seconds']:.2f} of the grid's" if grid else ""
        print(f"{part}: {made['cpu_seconds']:.0f} CPU s{ratio}, {made['runs']} runs")
        print("\n".join(made["verdict"]))
    report = {"date": str(date.today()), "versions": versions()}
    line = json.dumps(report | found)
    (options.out / "sweep_cost.json").write_text(line)
    print(line)


if __name__ == "__main__":
    main()
