"""Turn beta without training: `python -m orpo_lab dial RUN_LOW RUN_HIGH [--trained FOLDER...]`.

RUN_LOW and RUN_HIGH are finished runs that differ in nothing but beta and its schedule (adapters
may also differ in their rank). Every mixture of their results is evaluated on the held-out pairs of
the runs. The command writes `dial.md`, `dial.png` and `dial.json`, and prints the table. With
`--trained` it says which of the betas that were really trained between the two a mixture predicts.
With `--export` it saves a mixture: the one at `--share`, or the one with the highest preference
accuracy among those of good quality.
"""

import argparse
from pathlib import Path

from orpo_lab import environment
from orpo_lab.dial.ends import Ends, find_ends
from orpo_lab.errors import UserError
from orpo_lab.upstream import import_libraries

# Mixtures on the front, both ends included
NUM_POINTS = 11


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to a parser."""
    parser.add_argument("low", type=Path, metavar="RUN_LOW", help="the run at share 0")
    parser.add_argument("high", type=Path, metavar="RUN_HIGH", help="the run at share 1")
    parser.add_argument(
        "--points",
        type=int,
        default=NUM_POINTS,
        metavar="N",
        help=f"number of mixtures, both runs included (default: {NUM_POINTS})",
    )
    parser.add_argument(
        "--trained",
        nargs="+",
        type=Path,
        default=[],
        metavar="FOLDER",
        help="run or sweep folders with betas between the two, and with other seeds of the two",
    )
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="save a mixture there")
    parser.add_argument(
        "--share",
        type=float,
        metavar="X",
        help="share of RUN_HIGH in the saved mixture, 0 to 1 (default: the best of good quality)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="where dial.md, dial.png and dial.json go (default: dial/ beside RUN_HIGH)",
    )


def run(options: argparse.Namespace) -> None:
    """Evaluate the mixtures, write and print what they come to, and save one of them.

    Raises:
        UserError: an argument is out of range, or the runs cannot be mixed.
        OSError: the files cannot be written.
    """
    _check(options)
    ends = find_ends(options.low, options.high, options.trained)
    for line in ends.left_out:
        print(line)
    environment.settle()
    environment.use_one_device(None)
    import_libraries()
    from orpo_lab.dial import page
    from orpo_lab.dial.front import Front
    from orpo_lab.dial.mixture import Dial

    shares = _shares(options, ends)
    first, found = None, {}
    for seed, (low, high) in ends.by_seed.items():
        print(f"{low.folder} and {high.folder}")
        dial = Dial(low.folder, high.folder)
        found[seed] = dial.measure(shares)
        first = first or dial
    front = Front(ends, shares, found)
    share = front.best if options.share is None else options.share
    print("\n".join(["", *page.write(front, options.out or options.high.parent / "dial", share)]))
    if options.export:
        assert first is not None
        first.save(share, options.export, page.card(front, share))
        print(f"mixture  {options.export}")


def _check(options: argparse.Namespace) -> None:
    """Refuse arguments that are out of range."""
    if options.points < 2:
        raise UserError(f"--points {options.points} must be at least 2: both runs")
    if options.share is not None and not 0 <= options.share <= 1:
        raise UserError(f"--share {options.share:g} must lie between 0 and 1")
    if options.export and options.export.exists():
        raise UserError(f"{options.export} exists already; choose a new folder with --export")


def _shares(options: argparse.Namespace, ends: Ends) -> list[float]:
    """Return the shares to measure: evenly spaced ones, those of the rule, and the one to save."""
    last = options.points - 1
    shares = {number / last for number in range(options.points)}
    shares |= {ends.share_of(setting) for setting in ends.trained}
    return sorted(shares if options.share is None else shares | {options.share})
