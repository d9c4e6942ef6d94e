"""Where rows come from: the embedded generator, the Hugging Face hub, JSON lines.

Each returns a `datasets.Dataset` of raw rows; what a row means is told by `pairs` and `encode`.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from orpo_lab.config import Columns, EmbeddedDataset, HubDataset, JsonlDataset
from orpo_lab.config import Dataset as DatasetConfig
from orpo_lab.data import embedded
from orpo_lab.data.pairs import num_shared, to_content
from orpo_lab.errors import UserError, one_line

# The embedded pairs are the same in every run: what differs between seeds is training alone
EMBEDDED_SEED = 0
EMBEDDED_COLUMNS = Columns(prompt="prompt", chosen="chosen", rejected="rejected")


def columns_of(config: DatasetConfig) -> Columns:
    """Return which columns of the source hold a pair."""
    match config:
        case HubDataset() | JsonlDataset():
            return config.columns
    return EMBEDDED_COLUMNS


def read(config: DatasetConfig) -> tuple[Dataset, Dataset]:
    """Return the raw rows to train on and the raw rows held out, cut to num_train and num_eval.

    Raises:
        UserError: the source cannot be reached, is empty, or lacks a column.
    """
    match config:
        case EmbeddedDataset():
            return (
                _generate("train", config.num_train),
                _generate("eval", config.num_eval),
            )
        case HubDataset():
            train = _read_hub(config, config.train_split)
            held_out = config.eval_split and _read_hub(config, config.eval_split)
        case JsonlDataset():
            train = _read_jsonl(config.train_path, config.columns)
            held_out = config.eval_path and _read_jsonl(config.eval_path, config.columns)
        case _:
            raise TypeError(f"no dataset source: {config!r}")
    if not held_out:
        train, held_out = _hold_out(train, config.num_eval, columns_of(config))
    return _sample(train, config.num_train), _sample(held_out, config.num_eval)


def _generate(split: embedded.Split, num: int | None) -> Dataset:
    if num is None:
        raise UserError(f"dataset.num_{split} must be a number: dataset=embedded has no end")
    try:
        return Dataset.from_list(embedded.pairs(split, num=num, seed=EMBEDDED_SEED))
    except ValueError as error:
        raise UserError(one_line(error)) from error


def _read_hub(config: HubDataset, split: str) -> Dataset:
    source = config.path if Path(config.path).is_dir() else f"dataset.path={config.path}"
    try:
        rows = datasets.load_dataset(config.path, revision=config.revision, split=split)
    except Exception as error:  # datasets raises a dozen types here, from the network to YAML
        raise UserError(
            f"{source}, split {split}, cannot be loaded ({one_line(error)[:200]}); check the name, "
            "the split and the connection to the hub, or give a local folder"
        ) from error
    _check_columns(rows.column_names, config.columns, source)
    return rows


def _read_jsonl(path: str, columns: Columns) -> Dataset:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    rows = [
        _parse(line, f"{path}, line {number}", columns)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not rows:
        raise UserError(f"{path} holds no rows")
    try:
        return Dataset.from_list(rows)
    except Exception as error:  # pyarrow's: one row holds a string where another holds messages
        raise UserError(f"{path}: rows differ in their form: {one_line(error)[:200]}") from error


def _parse(line: str, where: str, columns: Columns) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {one_line(error)}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where} holds {line.strip()[:40]}, not an object with columns")
    _check_columns(list(row), columns, where)
    names = (columns.prompt, columns.chosen, columns.rejected)
    return {name: to_content(row[name], f"{where}: {name}") for name in names if name}


def _check_columns(present: list[str], columns: Columns, where: str) -> None:
    for key in ("prompt", "chosen", "rejected"):
        name = getattr(columns, key)
        if name is not None and name not in present:
            null = ", or null where there is none" if key == "prompt" else ""
            raise UserError(
                f"{where} lacks column '{name}' (it has {', '.join(sorted(present))}); "
                f"name the right one with dataset.columns.{key}=...{null}"
            )


def _hold_out(rows: Dataset, num_eval: int, columns: Columns) -> tuple[Dataset, Dataset]:
    """Split rows by the hash of their prompt, so that no prompt is on both sides."""

    def rank(row: dict[str, Any]) -> str:
        chosen, rejected = row[columns.chosen], row[columns.rejected]
        shared = chosen[: num_shared(chosen, rejected)]
        prompt = row[columns.prompt] if columns.prompt else shared
        return hashlib.sha256(json.dumps(prompt).encode()).hexdigest()

    ranks = [rank(row) for row in rows]
    if len(set(ranks)) <= num_eval:
        raise UserError(
            f"{len(set(ranks))} distinct prompts are too few to hold out dataset.num_eval="
            f"{num_eval}; lower it, or give dataset.eval_split or dataset.eval_path"
        )
    border = sorted(set(ranks))[num_eval]
    train = [index for index, one in enumerate(ranks) if one >= border]
    return rows.select(train), rows.select(sorted(set(range(len(rows))) - set(train)))


def _sample(rows: Dataset, num: int | None) -> Dataset:
    """Return `num` rows drawn over the whole dataset, the same ones in every run."""
    if num is None or num >= len(rows):
        return rows
    return rows.shuffle(seed=0).select(range(num))
