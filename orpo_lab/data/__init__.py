"""Preference data: rows -> pairs -> token ids, with every fault counted and reported.

A row passes through `sources` and `files` (raw rows), `pairs` or `trees` (prompt, chosen and
rejected), `splits` (what it shares with other rows, what is held out) and `encode` (ids). What can
be wrong on the way is a `Fault`, and `dataset.faults` says what becomes of it.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from orpo_lab.config import Dataset, EmbeddedDataset, OasstDataset, TableDataset
from orpo_lab.data import sources
from orpo_lab.data.encode import encode_row, special_tokens
from orpo_lab.data.faults import Fault
from orpo_lab.data.files import Source
from orpo_lab.data.pairs import Pair, find_faults, from_transcripts, to_pair
from orpo_lab.data.splits import Split
from orpo_lab.data.trees import Trees
from orpo_lab.errors import UserError, one_line

log = logging.getLogger(__name__)

# What the answers to embedded prompts are checked with
CHECKS = ("answer", "family", "wording")


@dataclass(frozen=True)
class Data:
    """Tokenized pairs: `prompt_ids`, `chosen_ids`, `rejected_ids` and the texts for people.

    The held-out rows of the embedded dataset also have what their answers are checked with.
    """

    train: datasets.Dataset
    held_out: datasets.Dataset
    report: dict[str, Any]
    checkable: bool

    def save(self, folder: Path) -> None:
        """Write it all to a folder."""
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


def load(config: Dataset, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Read, check and tokenize the training pairs and the held-out pairs.

    Raises:
        UserError: the source cannot be read, a row has a fault that `config.faults` refuses, or no
            pair is left.
    """
    train_source, held_out_source = sources.read(config)
    train, about_train = _read("train", train_source, config, tokenizer)
    if held_out_source:
        held_out, about_held_out = _read("held_out", held_out_source, config, tokenizer)
        train.drop_leaks(held_out)
    else:
        held_out, about_held_out = train.hold_out(config.num_eval), {}
    train.draw(config.num_train)
    held_out.draw(config.num_eval)
    train_pairs, train_report = _encode(train, config, tokenizer)
    held_out_pairs, held_out_report = _encode(held_out, config, tokenizer)
    report = {"train": train_report | about_train, "held_out": held_out_report | about_held_out}
    return Data(train_pairs, held_out_pairs, report, isinstance(config, EmbeddedDataset))


def _read(
    name: str, source: Source, config: Dataset, tokenizer: PreTrainedTokenizerBase
) -> tuple[Split, dict[str, Any]]:
    """Return a split's pairs, and what its report has to say beside them."""
    find = partial(find_faults, special_tokens=special_tokens(tokenizer))
    split = Split(name, source, config.faults)
    match config:
        case OasstDataset():
            trees = Trees(config)
            split.read(trees.pairs, find)
            about = {"replies": trees.report()}
        case TableDataset():
            parse = from_transcripts if config.transcripts else to_pair
            split.read(lambda raw, _: [parse(raw, config.columns)], find)
            about = {}
        case _:
            split.read(lambda raw, _: [to_pair(raw, sources.EMBEDDED_COLUMNS)], find, CHECKS)
            about = {}
    split.drop_repeats()
    return split, about


def _encode(
    split: Split, config: Dataset, tokenizer: PreTrainedTokenizerBase
) -> tuple[datasets.Dataset, dict[str, Any]]:
    _check_any_left(split)
    encoded = _map(split, config, tokenizer)
    faults = zip(encoded["fault"], encoded["detail"], strict=True)
    found = {row: Fault(*one) for row, one in zip(split.rows, faults, strict=True) if one[0]}
    split.filter(lambda row: [found[row]] if row in found else [])
    _check_any_left(split)
    kept = encoded.select([at for at, fault in enumerate(encoded["fault"]) if not fault])
    report = split.report() | {
        "num_cut": sum(kept["cut"]),
        "num_repeated_prompts": sum(row.pair.repeated for row in split.rows),
        "fingerprint": _fingerprint(kept),
    }
    _say(split, report)
    return kept.remove_columns(["pair", "fault", "detail", "cut"]), report


def _map(split: Split, config: Dataset, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
    """Tokenize in processes."""
    # As JSON, since a column of a dataset cannot hold strings in one row and messages in another
    rows = [{"pair": _to_json(row.pair), **row.checks} for row in split.rows]
    try:
        return datasets.Dataset.from_list(rows).map(
            encode_row,
            fn_kwargs={"dataset": config, "tokenizer": tokenizer},
            num_proc=config.num_proc,
            # A cache that outlives a change of this code would train on old ids
            load_from_cache_file=False,
            desc=f"tokenize {split.name}",
        )
    except RuntimeError as error:
        if "abruptly died" not in str(error):
            raise
        # It was killed, as when memory runs out
        raise UserError(
            f"{split.name}: a process that tokenizes has died ({one_line(error)[:200]}); lower "
            "dataset.num_proc, or set it to null"
        ) from error


def _to_json(pair: Pair) -> str:
    return json.dumps([pair.prompt, pair.chosen, pair.rejected])


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
    log.info("%s: %d pairs%s", split.name, report["num_kept"], "".join(f", {one}" for one in said))
