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
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from orpo_lab import api, config, environment
from orpo_lab.errors import UserError, one_line
from orpo_lab.redaction import redact
from orpo_lab.upstream import silence

NUM_ROWS = 3
FOLDER = Path("outputs", "preview")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to a parser."""
    parser.add_argument(
        "overrides", nargs="*", metavar="override", help="as for launch.py: dataset=ultrafeedback"
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
        UserError: the configuration or the data are refused, as by launch.py, or an argument is out
            of range.
    """
    if options.rows < 0:
        raise UserError(f"--rows {options.rows} must be 0 or more")
    composed = config.without_hydra(api.compose_unchecked(*options.overrides))
    loaded = config.load(composed)
    environment.settle()
    silence()
    # What the data room logs (counts, warnings) belongs to the preview, but not to its JSON
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logging.getLogger("orpo_lab").setLevel(logging.INFO)

    from orpo_lab import data, methods
    from orpo_lab.model.source import load_config
    from orpo_lab.model.start import origin_of
    from orpo_lab.model.tokenizer import check_context, check_ids, load_tokenizer
    from orpo_lab.preview import figures, page
    from orpo_lab.preview.rows import Reader

    origin = origin_of(loaded)
    model_config = load_config(origin.base.model)
    check_context(model_config, loaded.dataset)
    tokenizer = load_tokenizer(loaded.model, model_config)
    origin.check_tokenizer(tokenizer)
    lengths: dict[str, figures.Lengths] = {}

    def watch(split: str, judged: Any) -> None:
        lengths[split] = figures.Lengths.of(judged)

    def of_length(max_length: int) -> Any:
        other = composed.copy()
        OmegaConf.update(other, "dataset.max_length", max_length)
        try:
            dataset = config.load(other).dataset
            check_context(model_config, dataset)
        except UserError:
            return None
        return dataset

    pairs = data.load(loaded.dataset, tokenizer, watch=watch)
    check_ids(tokenizer, model_config, pairs)
    method = methods.build(loaded)
    if not method.reads_rejected:
        pairs = data.without_undesirable(pairs)
    found = {
        "overrides": redact(options.overrides),
        "max_length": loaded.dataset.max_length,
        "overlong": loaded.dataset.overlong,
        "splits": {
            split: {"report": pairs.report[split], "lengths": lengths[split].percentiles()}
            for split in lengths
        },
        "candidates": figures.candidates(lengths["train"], loaded.dataset, of_length),
        "near_duplicates": figures.duplicates(pairs),
        "length_bias": figures.length_bias(pairs),
    }
    reader = Reader(tokenizer, method.scores_prompt, method.reads_rejected)
    shown = [
        reader.read(row) for row in pairs.train.select(range(min(options.rows, len(pairs.train))))
    ]
    out = options.out or FOLDER / f"{datetime.now():%Y%m%d-%H%M%S}"
    preview = page.Preview(found, shown)
    try:
        file = page.write(preview, out)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written to: {one_line(error)}; choose another with --out"
        ) from error
    if options.json:
        print(json.dumps(found | {"page": str(file)}, indent=2))
        return
    has_colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print("\n".join([*page.text(preview, has_colour=has_colour), "", f"preview  {file}"]))
