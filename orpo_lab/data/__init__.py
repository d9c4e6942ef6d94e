"""Preference data: rows -> pairs -> token ids, with every fault counted and reported.

A pair passes through `sources` (rows), `pairs` (prompt, chosen, rejected) and `encode` (ids).
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from orpo_lab.config import Dataset, EmbeddedDataset
from orpo_lab.data import sources
from orpo_lab.data.encode import encode_row
from orpo_lab.errors import UserError

log = logging.getLogger(__name__)

# Row numbers listed per fault in the report; the count beside them is of all
NUM_ROWS_LISTED = 20


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
        UserError: the source cannot be read, a row is not a pair, or no pair is left.
    """
    train, train_report, held_out, held_out_report = (
        part
        for name, rows in zip(("train", "held_out"), sources.read(config), strict=True)
        for part in _encode(rows, name, config, tokenizer)
    )
    report = {"train": train_report, "held_out": held_out_report}
    return Data(train, held_out, report, checkable=isinstance(config, EmbeddedDataset))


def _encode(
    rows: datasets.Dataset, name: str, config: Dataset, tokenizer: PreTrainedTokenizerBase
) -> tuple[datasets.Dataset, dict[str, Any]]:
    columns = sources.columns_of(config)
    encoded = rows.map(
        encode_row,
        with_indices=True,
        fn_kwargs={
            "columns": columns,
            "dataset": config,
            "tokenizer": tokenizer,
            "source": name,
        },
        # What the text said is in the ids now; a column of another name may stay
        remove_columns=[one for one in rows.column_names if one in _raw_columns(columns)],
        num_proc=config.num_proc,
        # A cache that outlives a change of this code would train on old ids
        load_from_cache_file=False,
        desc=f"tokenize {name}",
    )
    report = _report(encoded)
    kept = encoded.select([index for index, fault in enumerate(encoded["fault"]) if not fault])
    if not len(kept):
        raise UserError(
            f"no {name} pair is left of {len(rows)}: {report['dropped']}; "
            "see dataset.max_length, dataset.max_prompt_length and dataset.overlong"
        )
    report["fingerprint"] = _fingerprint(kept)
    _say(name, report)
    return kept.remove_columns(["fault", "cut", "contradicted", "repeated"]), report


def _raw_columns(columns: Any) -> set[str]:
    return {columns.prompt, columns.chosen, columns.rejected, "prompt", "chosen", "rejected"}


def _report(encoded: datasets.Dataset) -> dict[str, Any]:
    faults = encoded["fault"]
    dropped: dict[str, dict[str, Any]] = {}
    for index, fault in enumerate(faults):
        if fault:
            entry = dropped.setdefault(fault, {"num": 0, "rows": []})
            entry["num"] += 1
            if len(entry["rows"]) < NUM_ROWS_LISTED:
                entry["rows"].append(index)
    return {
        "num_rows": len(faults),
        "num_kept": len(faults) - sum(entry["num"] for entry in dropped.values()),
        "dropped": dropped,
        "num_cut": sum(encoded["cut"]),
        "num_contradicting_prompts": sum(encoded["contradicted"]),
        "num_repeated_prompts": sum(encoded["repeated"]),
    }


def _fingerprint(kept: datasets.Dataset) -> str:
    digest = hashlib.sha256()
    for row in kept.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]):
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def _say(name: str, report: dict[str, Any]) -> None:
    said = [f"{entry['num']} dropped ({fault})" for fault, entry in report["dropped"].items()]
    for key, what in (
        ("num_cut", "cut to fit"),
        ("num_contradicting_prompts", "with a prompt column that contradicts the messages"),
        ("num_repeated_prompts", "repeat their prompt in both answers (removed)"),
    ):
        if report[key]:
            said.append(f"{report[key]} {what}")
    log.info("%s: %d pairs%s", name, report["num_kept"], "".join(f", {one}" for one in said))
