"""Plant every fault that is listed, one at a time, and say which ones no quick test sees.

    python -m faults.planted [--only AREA] [--name TEXT] [--jobs N]

A fault is caught where a test that is named beside it goes red, and is green without the fault:
every such test is run once more on the tree as it is. The last line is one JSON object.
"""

import argparse
import json
import os
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from faults.planted import catalogue
from faults.planted.catalogue import ROOT, Mutant
from faults.planted.trial import Outcome, Trial

# For every trial: no network, one thread
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
}
# Between two looks at the trials in progress
POLL_SECONDS = 0.05


def preload() -> None:
    """Import what tests take seconds to import, and nothing of this repository."""
    os.environ.update(ENVIRONMENT)
    runpy.run_path(str(ROOT / "orpo_lab" / "upstream.py"))["silence"]()
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import hydra  # noqa: F401
    import hypothesis  # noqa: F401
    import matplotlib.backends.backend_agg  # noqa: F401
    import peft.tuners.lora.bnb  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama
    import transformers.trainer  # noqa: F401
    import trl.experimental.orpo  # noqa: F401
    import wandb  # noqa: F401

    # A thread that exists at a fork is lost in the child
    torch.set_num_threads(1)
    assert not any(name.startswith("orpo_lab") for name in sys.modules)


def run(
    faults: Sequence[Mutant], scratch: Path, *, jobs: int, seconds: float
) -> Iterator[tuple[Mutant, Outcome, float]]:
    """Try every fault, several at a time, and yield what came of it and the seconds it took."""
    waiting, busy = list(enumerate(faults)), list[tuple[Trial, Mutant, float]]()
    try:
        while waiting or busy:
            while waiting and len(busy) < jobs:
                number, fault = waiting.pop(0)
                begun = time.monotonic()
                trial = Trial(scratch / str(number), fault.tests, fault, seconds)
                busy.append((trial, fault, begun))
            for job in [job for job in busy if job[0].has_ended()]:
                busy.remove(job)
                trial, fault, begun = job
                yield fault, trial.outcome(), time.monotonic() - begun
            time.sleep(POLL_SECONDS)
    finally:
        for trial, *_ in busy:
            trial.kill()


def red_anyway(tests: Sequence[str], scratch: Path, *, seconds: float) -> list[str]:
    """Return those of the tests that are red on the tree as it is: they judge nothing.

    Raises:
        RuntimeError: they could not be run.
    """
    trial = Trial(scratch / "as-it-is", tests, None, seconds)
    while not trial.has_ended():
        time.sleep(POLL_SECONDS)
    outcome = trial.outcome()
    if outcome.verdict == "unclear":
        raise RuntimeError(f"the tests do not run without a fault: {outcome.detail}; see {scratch}")
    return trial.red()


def table(outcomes: Sequence[tuple[Mutant, Outcome]]) -> str:
    """Return the table that docs/reliability.md shows."""
    planted = Counter(fault.area for fault, _ in outcomes)
    caught = Counter(fault.area for fault, outcome in outcomes if outcome.verdict == "caught")
    rows = [f"| {area} | {planted[area]} | {caught[area]} |" for area in sorted(planted)]
    rows.append(f"| **all** | {planted.total()} | {caught.total()} |")
    return "\n".join(["| area | planted | caught |", "|---|---:|---:|", *rows])


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m faults.planted")
    areas = catalogue.areas()
    parser.add_argument(
        "--only", metavar="AREA", action="append", choices=areas, help="of this list; may repeat"
    )
    parser.add_argument(
        "--name", metavar="TEXT", action="append", help="with TEXT in their names; may repeat"
    )
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="at a time (default: 2)")
    parser.add_argument(
        "--seconds", type=float, default=300, help="that a fault's tests have (default: 300)"
    )
    parser.add_argument("--list", action="store_true", help="print the names and plant nothing")
    asked = parser.parse_args()
    texts = asked.name or [""]
    faults = [
        fault
        for fault in catalogue.read(asked.only or areas)
        if any(text in fault.name for text in texts)
    ]
    if asked.list:
        print("\n".join(map(str, faults)))
        return
    if flaws := [f"{fault}: {flaw}" for fault in faults for flaw in catalogue.find_flaws(fault)]:
        sys.exit("\n".join(flaws))
    preload()
    # So that trials end with what has started them
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    scratch = Path(tempfile.mkdtemp(prefix="planted-"))
    begun, outcomes = time.monotonic(), []
    for fault, outcome, seconds in run(faults, scratch, jobs=asked.jobs, seconds=asked.seconds):
        outcomes.append((fault, outcome))
        told = f"{outcome.verdict:8}  {fault}  ({seconds:.0f} s)"
        print(f"{told}  {outcome.detail}", flush=True)
    by = sorted({outcome.detail for _, outcome in outcomes if outcome.verdict == "caught"})
    if by:
        for test in red_anyway(by, scratch, seconds=10 * asked.seconds):
            print(f"red without any fault, and so no judge: {test}")
            unclear = Outcome("unclear", "its judge is red without it")
            outcomes = [
                (f, unclear if outcome.detail == test else outcome) for f, outcome in outcomes
            ]
    survived = [str(fault) for fault, outcome in outcomes if outcome.verdict != "caught"]
    print(f"\n{table(outcomes)}\n\n{time.monotonic() - begun:.0f} seconds; {scratch}\n")
    num_caught = len(outcomes) - len(survived)
    print(json.dumps({"planted": len(outcomes), "caught": num_caught, "survived": survived}))
    if not survived:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
