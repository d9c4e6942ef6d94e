"""Will it fit, and how long will it take? `python -m orpo_lab plan [override ...]`.

The overrides are those of launch.py; `-m` plans a sweep. Neither weights nor a GPU are needed: a
plan rests on shapes, on the figures of a card, and on a calibration of it.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo_lab import api, config, environment
from orpo_lab.config import Config
from orpo_lab.errors import UserError
from orpo_lab.upstream import import_libraries

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from orpo_lab.plan.cards import Card
    from orpo_lab.plan.lengths import Lengths
    from orpo_lab.plan.planned import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to a parser."""
    parser.add_argument(
        "overrides", nargs="*", metavar="override", help="as for a run: optimizer=galore"
    )
    parser.add_argument("-m", "--multirun", action="store_true", help="plan a sweep")
    parser.add_argument(
        "--card",
        metavar="NAME",
        help="a card's name, or its numbers: memory_gb=24,tflops=165,bandwidth_gbps=1008 "
        "(default: this machine)",
    )
    parser.add_argument(
        "--lengths",
        metavar="TOKENS",
        help="prompt=200,chosen=300,rejected=300 and perhaps pairs=60000 (default: measured where "
        "the data are at hand and small)",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="processes of one run under torchrun, each on a card (default: 1)",
    )
    parser.add_argument(
        "--calibrate", action="store_true", help="measure this machine, for later plans"
    )
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="the file of a calibration"
    )
    parser.add_argument("--json", action="store_true", help="print figures as JSON, no text")


def run(options: argparse.Namespace) -> None:
    """Print the plan of a run or a sweep, or calibrate this machine.

    Raises:
        UserError: the configuration is refused, as by launch.py, or an argument is wrong.
    """
    if options.processes < 1 or (options.multirun and options.processes > 1):
        raise UserError(
            f"--processes {options.processes}: a run has one process or more; the jobs of a sweep "
            "have one each"
        )
    jobs = _jobs(options.overrides) if options.multirun else [options.overrides]
    experiments = [api.compose(*overrides).config for overrides in jobs]
    environment.settle()
    import_libraries()
    from orpo_lab.plan import cards

    if options.calibrate:
        from orpo_lab.plan import calibrate  # it needs the engine's libraries

        file = options.calibration or cards.cache_file()
        card = calibrate.measure()
        cards.write(card, file)
        print(json.dumps(asdict(card)) if options.json else f"{card}\ncalibration  {file}")
        return
    card = cards.named(options.card) if options.card else cards.this_machine(options.calibration)
    if options.multirun:
        _print_sweep(experiments, card, options)
    else:
        _print_run(experiments[0], card, options)


def plan_of(loaded: Config, card: "Card", lengths: str | None = None, processes: int = 1) -> "Plan":
    """Return the plan of a configuration.

    Args:
        loaded: the configuration.
        card: what the run computes on.
        lengths: as `--lengths`; None: measured or assumed.
        processes: number of processes of the run.

    Raises:
        UserError: see `read` and `planned.plan`.
    """
    from orpo_lab.plan import planned

    own, sizes = read(loaded, lengths)
    return planned.plan(loaded, own, card, sizes, processes)


def read(loaded: Config, lengths: str | None = None) -> "tuple[PretrainedConfig, Lengths]":
    """Return what a plan needs of the model and the data, whatever the card.

    Args:
        loaded: the configuration.
        lengths: as `--lengths`; None: measured or assumed.

    Raises:
        UserError: the model's configuration cannot be read, or `lengths` is wrong.
    """
    from transformers import AutoConfig

    from orpo_lab.config.model import local_path
    from orpo_lab.model.source import load_config
    from orpo_lab.plan import lengths as of_pairs

    folder = local_path(loaded.model.path)
    if (folder / "config.json").is_file() and not loaded.model.trust_remote_code:
        own = AutoConfig.from_pretrained(folder)  # a plan needs no weights beside it
    else:
        own = load_config(loaded.model)
    return own, of_pairs.given(lengths, loaded) if lengths else of_pairs.of(loaded, own)


def _print_run(loaded: Config, card: "Card", options: argparse.Namespace) -> None:
    from orpo_lab.plan import words

    found = plan_of(loaded, card, options.lengths, options.processes)
    lower = [] if found.fits else _lower(loaded, card, options)
    if options.json:
        print(json.dumps(found.figures() | {"remedies": dict(lower)}, indent=2))
    else:
        print("\n".join(words.text(found, loaded, lower)))


def _lower(loaded: Config, card: "Card", options: argparse.Namespace) -> list[tuple[str, str]]:
    """Return what takes less memory, by key, and what the run would need with it."""
    from orpo_lab import memory
    from orpo_lab.plan.words import gb

    shorter = f"dataset.max_length={loaded.dataset.max_length // 2}"
    found = []
    for remedy in memory.remedies(loaded):
        override = shorter if remedy.startswith("dataset.max_length") else remedy
        try:
            other = api.compose(*options.overrides, override).config
            given = None if override == shorter else options.lengths
            plan = plan_of(other, card, given, options.processes)
        except UserError:
            found.append((remedy, ""))  # it is no override, or does not go with the others
        else:
            fits = "fits" if plan.fits else "does not fit"
            found.append((override, f"{gb(plan.memory.needed)}, {fits}"))
    return found


def _jobs(overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of every job of a sweep.

    Raises:
        UserError: an override cannot be read.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from orpo_lab.config.command_line import NOT_COMPOSED, as_typed, explain

    config.register()
    try:
        typed = [each for each in as_typed(["-m", *overrides]) if each != "-m"]
        parsed = OverridesParser.create().parse_overrides(typed)
        batches = BasicSweeper.split_arguments(parsed, None)
    except NOT_COMPOSED as error:
        raise UserError(explain(error)) from error
    return [list(job) for batch in batches for job in batch]


def _print_sweep(experiments: Sequence[Config], card: "Card", options: argparse.Namespace) -> None:
    from orpo_lab.plan import sweep
    from orpo_lab.plan.words import duration, gb

    plans: dict[str, Plan] = {}
    for each in experiments:
        key = sweep.key_of(each)
        if key not in plans:
            plans[key] = plan_of(each, card, options.lengths)
    total = sweep.total(experiments, plans)
    largest = max(plans.values(), key=lambda plan: plan.memory.needed)
    figures: dict[str, Any] = asdict(total) | {
        "seconds": total.seconds,
        "needed_bytes": largest.memory.needed,
        "fits": largest.fits,
    }
    if options.json:
        print(json.dumps(figures, indent=2))
        return
    references = f", {total.references} references" if total.references else ""
    print(
        f"{total.jobs} jobs on {card.name}, one after another: {duration(total.seconds)}\n"
        f"  {total.steps:,} steps, {total.shared:,} others are trained once for several jobs\n"
        f"  {total.befores} evaluations before training, {total.jobs} after{references}\n"
        f"the largest job needs {gb(largest.memory.needed)}: "
        f"{'fits' if largest.fits else 'DOES NOT FIT'} ({gb(card.memory)})"
    )
