"""Look before training: `python -m orpo_lab preview [override ...]`, with launch.py's overrides.

Shows the first training rows as the model will see them, decoded from the token ids that training
uses. Counts lengths, faults and near-duplicate prompts, and says how often the longer answer is the
chosen one. Prints all of that, and writes it to one HTML page that opens offline. The model's
weights are not loaded.
"""

import argparse
import json
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from orpo_lab import api, config, environment, program
from orpo_lab.config.dataset import Dataset
from orpo_lab.errors import UserError, one_line
from orpo_lab.redaction import RedactingFormatter, redact
from orpo_lab.upstream import import_libraries

if TYPE_CHECKING:
    import datasets

    from orpo_lab.model.start import Origin
    from orpo_lab.preview import page

log = logging.getLogger(__name__)

NUM_ROWS = 3
FOLDER = Path("outputs", "preview")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to a parser."""
    parser.add_argument(
        "overrides", nargs="*", metavar="override", help="as for a run: dataset=ultrafeedback"
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=NUM_ROWS,
        metavar="N",
        help=f"number of rows to show (default: {NUM_ROWS})",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help=f"where preview.html goes (default: a new folder in {FOLDER})",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, no text")


def run(options: argparse.Namespace) -> None:
    """Load the data as training would, and show them.

    Raises:
        UserError: the configuration or the data are refused, as by launch.py, an argument is out of
            range, or the page cannot be written.
    """
    if options.rows < 0:
        raise UserError(f"--rows {options.rows} must be 0 or more")
    composed = config.without_hydra(api.compose_unchecked(*options.overrides))
    loaded = config.load(composed)
    environment.settle()
    import_libraries()
    from orpo_lab.preview import page

    with _logged():
        preview = _preview(composed, loaded, options)
    out = options.out or FOLDER / f"{datetime.now():%Y%m%d-%H%M%S}"
    try:
        file = page.write(preview, out)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written to: {one_line(error)}; choose another with --out"
        ) from error
    if options.json:
        print(json.dumps(preview.figures | {"page": str(file)}, indent=2))
        return
    has_colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print("\n".join([*page.text(preview, has_colour=has_colour), "", f"preview  {file}"]))
    print(f"train    {program.command('train')} {shlex.join(options.overrides)}".rstrip())


@contextmanager
def _logged() -> Iterator[None]:
    """Inside this context, show what the data room logs, apart from the command's own output."""
    package, handler = logging.getLogger("orpo_lab"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(RedactingFormatter("%(message)s"))
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.setLevel(level)
        package.removeHandler(handler)


def _preview(
    composed: DictConfig, loaded: config.Config, options: argparse.Namespace
) -> "page.Preview":
    """Load the data, and return their figures and the first rows.

    Args:
        composed: the configuration before it was checked; another `max_length` is tried in it.
        loaded: the configuration.
        options: those of the command.
    """
    # These imports take seconds, so they wait until the configuration is checked
    from orpo_lab import data, methods
    from orpo_lab.model.source import load_config
    from orpo_lab.model.tokenizer import check_context, check_ids, load_tokenizer
    from orpo_lab.preview import figures, page
    from orpo_lab.preview.rows import Reader
    from orpo_lab.training.steps import count_steps

    origin = _origin_of(loaded)
    model_config = load_config(origin.base.model if origin else loaded.model)
    check_context(model_config, loaded.dataset)
    tokenizer = load_tokenizer(loaded.model, model_config)
    if origin:
        origin.check_tokenizer(tokenizer)
    lengths: dict[str, figures.Lengths] = {}

    def watch(split: str, judged: "datasets.Dataset") -> None:
        # A mixture has several sources
        found = figures.Lengths.of(judged)
        lengths[split] = lengths[split] + found if split in lengths else found

    def of_length(max_length: int) -> Dataset | None:
        other = composed.copy()
        OmegaConf.update(other, "dataset.max_length", max_length)
        try:
            dataset = config.load(other).dataset
            check_context(model_config, dataset)
        except UserError:
            return None
        return dataset

    makes_pairs = not loaded.method.reads_unpaired
    # Somebody waits for a preview. A run may stand beside other jobs, so a run uses what
    # `dataset.num_proc` says
    num_cores = environment.num_cores()
    pairs = data.load(
        loaded.dataset, tokenizer, makes_pairs=makes_pairs, watch=watch, num_idle=num_cores
    )
    check_ids(tokenizer, model_config, pairs)
    method = methods.build(loaded)
    if not method.reads_rejected:
        pairs = data.without_undesirable(pairs)
    try:
        count_steps(loaded, len(pairs.train))
    except UserError as error:  # the figures below may say why so few are left
        log.warning("WARNING: training refuses this: %s", error)
    found = {
        "overrides": redact(options.overrides),
        "max_length": loaded.dataset.max_length,
        "overlong": loaded.dataset.overlong,
        "splits": {
            split: {"report": pairs.report[split], "lengths": of_split.percentiles()}
            for split, of_split in lengths.items()
        },
        "candidates": figures.candidates(lengths["train"], loaded.dataset, of_length),
        "near_duplicates": figures.duplicates(pairs),
        "length_bias": figures.length_bias(pairs),
    }
    reader = Reader(tokenizer, method.scores_prompt, method.reads_rejected)
    first = pairs.train.select(range(min(options.rows, len(pairs.train))))
    return page.Preview(found, [reader.read(row) for row in first])


def _origin_of(loaded: config.Config) -> "Origin | None":
    """Return what an earlier run's result leaves to start from; None: the model alone."""
    if loaded.start_from is None:
        return None
    # It imports what puts adapters on weights, which takes a second
    from orpo_lab.model.start import origin_of

    return origin_of(loaded)
