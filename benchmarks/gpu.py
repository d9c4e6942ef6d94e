"""All that wants a GPU, in one command: `python benchmarks/gpu.py`, on one of 80 GB.

The step against TRL's, the attention functions, GaLore, the recipes end to end, a checkpoint, and
the memory of a sweep, each in a process of its own. `--small` runs the same on any device in a few
minutes, for checking the scripts. The last line is one JSON object with the last line of each; the
exit code is 1 if a script failed.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPTS = (
    "gpu_step",
    "gpu_attention",
    "gpu_galore",
    "gpu_recipes",
    "gpu_sweep_memory",
    "saving",
)


def run(script: str, options: list[str]) -> dict[str, Any]:
    """Return the JSON object that a script prints last, and its exit code."""
    print(f"--- {script}", flush=True)
    file = Path(__file__).with_name(f"{script}.py")
    done = subprocess.run(
        [sys.executable, str(file), *options], stdout=subprocess.PIPE, text=True, check=False
    )
    print(done.stdout, flush=True)
    try:
        return {"exit_code": done.returncode, **json.loads(done.stdout.splitlines()[-1])}
    except (IndexError, ValueError):
        return {"exit_code": done.returncode, "error": "no JSON object in the last line"}


def main() -> None:
    """Run the scripts one after the other."""
    parser = argparse.ArgumentParser(description="All that wants a GPU, in one command.")
    parser.add_argument("scripts", nargs="*", choices=[[], *SCRIPTS], help=", ".join(SCRIPTS))
    parser.add_argument("--small", action="store_true", help="on any device, in a few minutes")
    options = parser.parse_args()
    small = ["--small"] if options.small else []
    report = {script: run(script, small) for script in options.scripts or SCRIPTS}
    print(json.dumps(report))
    sys.exit(int(any("error" in figures or figures["exit_code"] for figures in report.values())))


if __name__ == "__main__":
    main()
