"""Compare runs: `python -m orpo_lab compare FOLDER... [--out FOLDER]`.

A FOLDER is a run folder or a sweep folder. The command writes `report.html` (one file that opens
offline), `report.md` and `report.json`: what to ship (see `ship`), and a verdict over held-out
pairs and seeds (see `verdict`). It prints both. It reads run folders and nothing else, and does not
import torch.
"""

import argparse
from pathlib import Path

from orpo_lab.compare.evidence import compare
from orpo_lab.compare.page import write
from orpo_lab.compare.read import find_runs
from orpo_lab.compare.ship import choose
from orpo_lab.compare.words import verdict_text
from orpo_lab.errors import UserError, one_line
from orpo_lab.metrics import MARGINS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to a parser."""
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="run or sweep folders"
    )
    parser.add_argument(
        "--out", type=Path, help="where report.html, .md and .json go (default: the first FOLDER)"
    )
    for name, margin in MARGINS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}-margin",
            type=float,
            default=margin,
            metavar="X",
            help=f"how much worse {name} may be than the best setting's (default: {margin})",
        )


def run(options: argparse.Namespace) -> None:
    """Compare, write the report and print the verdict.

    Raises:
        UserError: a folder cannot be read, the runs cannot be compared, or the report cannot be
            written.
    """
    margins = {name: getattr(options, f"{name}_margin") for name in MARGINS}
    out = options.out or options.folders[0]
    comparison = compare(find_runs(options.folders), margins)
    try:
        write(comparison, out)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written to: {one_line(error)}; choose another with --out"
        ) from error
    lines = [*verdict_text(comparison), *comparison.warnings]
    report = f"report  {out / 'report.html'}"
    print("\n".join([*lines, "", *choose(comparison).brief(), report]))
