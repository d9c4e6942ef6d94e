"""Preference data: rows -> pairs -> token ids, with every fault counted and reported.

A row passes through `sources` and `files` (raw rows), `pairs` or `trees` (prompt, chosen and
rejected), `splits` (repeated rows and held-out rows), `render` (the chat template) and `encode`
(token ids). Anything wrong with a row is a `Fault`; `dataset.faults` says what happens to the row.
`warn` logs what is not a fault of a row, but may not be what the user expects.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from orpo_lab.config.dataset import (
    Dataset,
    EmbeddedDataset,
    LabelledColumns,
    OasstDataset,
    TableDataset,
)
from orpo_lab.data import sources
from orpo_lab.data.encode import FOUND, Encoder, special_tokens
from orpo_lab.data.files import Source
from orpo_lab.data.pairs import find_faults, from_label, from_transcripts, to_pair
from orpo_lab.data.splits import NUM_EVAL, Split
from orpo_lab.data.trees import Trees
from orpo_lab.data.warn import (
    warn_of_lengths,
    warn_of_losses,
    warn_of_plain_text,
    warn_of_unread,
    warn_of_unused_ending,
)
from orpo_lab.errors import UserError

log = logging.getLogger(__name__)

# Columns with which the answers to embedded prompts are checked
CHECKS = ("answer", "family", "wording")


@dataclass(frozen=True)
class Data:
    """Tokenized pairs: columns `prompt_ids`, `chosen_ids`, `rejected_ids`, and texts to read.

    The rows of the embedded dataset also have the columns with which answers are checked.
    """

    train: datasets.Dataset
    held_out: datasets.Dataset
    report: dict[str, Any]
    checkable: bool

    def save(self, folder: Path) -> None:
        """Write the pairs and their report to a folder."""
        self.train.save_to_disk(folder / "train")
        self.held_out.save_to_disk(folder / "held_out")
        rest = {"report": self.report, "checkable": self.checkable}
        (folder / "data.json").write_text(json.dumps(rest))

    @classmethod
    def restore(cls, folder: Path) -> "Data":
        """Read what `save` has written."""
        train, held_out = (
            datasets.load_from_disk(str(folder / name)) for name in ("train", "held_out")
        )
        return cls(train, held_out, **json.loads((folder / "data.json").read_text()))


# Gets the name of a split, and all its rows that were tokenized, also those dropped then
Watch = Callable[[str, datasets.Dataset], None]


def load(
    config: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    today: date | None = None,
    watch: Watch | None = None,
) -> Data:
    """Read, check and tokenize the training pairs and the held-out pairs.

    Args:
        config: the source of the rows, and what happens to rows with a fault.
        tokenizer: the model's tokenizer.
        today: the date for chat templates that ask for a date; None: the date of the clock.
        watch: called for each split with what `encode_row` returned for the rows that were judged.

    Raises:
        UserError: the source cannot be read, a row has a fault that `config.faults` refuses, or no
            pair is left.
    """
    encoder = Encoder(config, tokenizer, today or date.today())
    train_source, held_out_source = sources.read(config)
    train, about_train = _read("train", train_source, config, tokenizer)
    if held_out_source:
        held_out, about_held_out = _read("held_out", held_out_source, config, tokenizer)
        train.drop_leaks(held_out)
    else:
        held_out, about_held_out = train.hold_out(config.num_eval, encoder.encode), {}
    train_pairs, train_report = _draw(train, config.num_train, config, encoder, watch)
    num_eval = config.num_eval or NUM_EVAL
    held_out_pairs, held_out_report = _draw(held_out, num_eval, config, encoder, watch)
    warn_of_plain_text(train, tokenizer)
    report = {"train": train_report | about_train, "held_out": held_out_report | about_held_out}
    return Data(train_pairs, held_out_pairs, report, isinstance(config, EmbeddedDataset))


def without_undesirable(data: Data) -> Data:
    """Return the data without training rows that have no chosen completion, and log their number.

    A method that learns from chosen completions alone has no use for such rows.
    """
    indices = [at for at, ids in enumerate(data.train["chosen_ids"]) if ids]
    num = len(data.train) - len(indices)
    if not num:
        return data
    if not indices:
        raise UserError("no training row has a desirable completion, and method=sft needs some")
    log.info("train: %d undesirable completions are not trained on", num)
    return replace(data, train=data.train.select(indices))


def _read(
    name: str, source: Source, config: Dataset, tokenizer: PreTrainedTokenizerBase
) -> tuple[Split, dict[str, Any]]:
    """Return the pairs of a split, and what its report says in addition to `Split.report`."""
    find = partial(find_faults, special_tokens=special_tokens(tokenizer))
    split = Split(name, source, config.faults)
    about: dict[str, Any] = {}
    match config:
        case OasstDataset():
            trees = Trees(config)
            split.read(trees.pairs, find)
            about = {"replies": trees.report()}
        case TableDataset():
            parse = from_transcripts if config.transcripts else to_pair
            columns = sources.of_pairs(config)
            if name == "train" and isinstance(config.columns, LabelledColumns):
                parse, columns = from_label, sources.needed(config)
            split.read(lambda raw, _: [parse(raw, config.columns)], find, columns=columns)
            warn_of_unread(split)
        case _:
            split.read(lambda raw, _: [to_pair(raw, sources.EMBEDDED_COLUMNS)], find, checks=CHECKS)
    split.drop_repeats()
    return split, about


def _draw(
    split: Split, num: int | None, config: Dataset, encoder: Encoder, watch: Watch | None
) -> tuple[datasets.Dataset, dict[str, Any]]:
    """Return `num` good pairs of a split as token ids, and its report."""
    _check_any_left(split)
    judged = encoder.encoded(split.draw(num, encoder.encode))
    if watch:
        watch(split.name, judged)
    warn_of_lengths(split, judged, config)
    warn_of_losses(split)
    _check_any_left(split)
    kept = encoder.encoded(split.rows)
    warn_of_unused_ending(split, kept)
    report = split.report() | {
        "num_cut": sum(kept["cut"]),
        "num_repeated_prompts": sum(row.pair.repeated for row in split.rows),
        "fingerprint": _fingerprint(kept),
    }
    labels = [row.pair.label for row in split.rows]
    if None not in labels:
        report["num_desirable"] = sum(map(bool, labels))
    _say(split, report)
    return kept.remove_columns([*FOUND, "faults", "cut"]), report


def _check_any_left(split: Split) -> None:
    if split.rows:
        return
    raise UserError(
        f"no {split.name} pair is left of {split.num_rows} ({split.dropped}) in "
        f"{split.source.name}; {split.dropped.examples()}; see docs/data.md for what drops a pair"
    )


def _fingerprint(kept: datasets.Dataset) -> str:
    digest = hashlib.sha256()
    for row in kept.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]):
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def _say(split: Split, report: dict[str, Any]) -> None:
    said = [f"{entry['num']} dropped ({fault})" for fault, entry in report["dropped"].items()]
    said += [f"{entry['num']} kept in spite of {fault}" for fault, entry in report["kept"].items()]
    for key, what in (
        ("num_cut", "cut to fit"),
        ("num_repeated_prompts", "repeat their prompt in both answers (removed)"),
        ("num_not_drawn", "not drawn"),
    ):
        if report[key]:
            said.append(f"{report[key]} {what}")
    what = "pairs"
    if "num_desirable" in report:
        what = f"completions ({report['num_desirable']} desirable)"
    log.info("%s", ", ".join([f"{split.name}: {report['num_kept']} {what}", *said]))
