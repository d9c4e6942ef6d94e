"""`python -m faults [--family NAME] [--only TEXT] [--jobs N] [--list]`.

Prints every fault with its ending, a table by family, and as the last line a JSON object. The
exit code is 1 if any fault ended silently. All of it takes an hour and more on two cores.
"""

import argparse
import importlib
import json
import pkgutil
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from faults import families, processes
from faults.bench import Bench, Injection, References
from faults.judge import Ending, Outcome, silent

FAMILIES = sorted(module.name for module in pkgutil.iter_modules(families.__path__))


def collect(names: list[str], bench: Bench) -> list[tuple[str, Injection]]:
    """Return the faults of these families; some need a run of their own to know theirs."""
    modules = [importlib.import_module(f"{families.__name__}.{name}") for name in names]
    return [
        (name, fault)
        for name, module in zip(names, modules, strict=True)
        for fault in module.faults(bench)
    ]


def happen(fault: Injection, bench: Bench) -> Outcome:
    """Make a fault happen; what goes wrong with that counts as silent too."""
    try:
        outcome = fault.happen(bench)
    except Exception as error:
        return silent(f"{type(error).__name__}: {error}")
    if outcome.ending != Ending.SILENT:
        shutil.rmtree(bench.folder)
    return outcome


def run(
    chosen: list[tuple[str, Injection]], scratch: Path, jobs: int
) -> dict[str, Counter[Ending]]:
    """Make faults happen, some at a time; print each, and return the endings by family."""
    references = References(scratch / "references")
    counts: dict[str, Counter[Ending]] = {}

    def inject(number: int) -> Outcome:
        family, fault = chosen[number]
        begun = time.monotonic()
        outcome = happen(fault, Bench(scratch / str(number), references))
        seconds = time.monotonic() - begun
        print(f"{outcome.ending:8}  {family}: {fault.name}  ({seconds:.1f} s)", flush=True)
        if outcome.detail:
            print(f"          {outcome.detail}\n          see {scratch / str(number)}", flush=True)
        return outcome

    with ThreadPoolExecutor(jobs) as busy, ThreadPoolExecutor(2 * jobs) as waiting:
        endings = [
            (family, (waiting if fault.waits else busy).submit(inject, number))
            for number, (family, fault) in enumerate(chosen)
        ]
        for family, outcome in endings:
            counts.setdefault(family, Counter())[outcome.result().ending] += 1
    return counts


def table(counts: dict[str, Counter[Ending]]) -> str:
    """Return the table that docs/reliability.md shows."""
    head = "| family | tried | survived | refused clearly | failed silently |"
    rows = [head, "|---|---:|---:|---:|---:|"]
    whole = sum(counts.values(), Counter())
    for name, count in [*counts.items(), ("**all**", whole)]:
        figures = " | ".join(str(count[ending]) for ending in Ending)
        rows.append(f"| {name} | {count.total()} | {figures} |")
    return "\n".join(rows)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    options: dict[str, dict[str, Any]] = {
        "--family": {"action": "append", "choices": FAMILIES, "help": "of this one; may repeat"},
        "--only": {"default": "", "metavar": "TEXT", "help": "with TEXT in their names"},
        "--jobs": {"type": int, "default": 2, "help": "at a time, beside those that wait"},
        "--list": {"action": "store_true", "help": "print the names and do nothing"},
    }
    for name, settings in options.items():
        parser.add_argument(name, **settings)
    asked = parser.parse_args()
    # Under nohup the suite's runs would inherit that SIGHUP is ignored, and rightly pass over it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    scratch = Path(tempfile.mkdtemp(prefix="faults-"))
    begun = time.monotonic()
    with processes.server():
        bench = Bench(scratch / "collect", References(scratch / "collect" / "references"))
        found = collect(asked.family or FAMILIES, bench)
        chosen = [(family, fault) for family, fault in found if asked.only in fault.name]
        if asked.list:
            print("\n".join(f"{family}: {fault.name}" for family, fault in chosen))
            return
        counts = run(chosen, scratch, asked.jobs)
    whole = sum(counts.values(), Counter[Ending]())
    print(f"\n{table(counts)}\n\n{time.monotonic() - begun:.0f} seconds\n")
    endings = {ending.value: whole[ending] for ending in Ending}
    print(json.dumps({"tried": whole.total()} | endings))
    if whole[Ending.SILENT]:
        sys.exit(1)
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
