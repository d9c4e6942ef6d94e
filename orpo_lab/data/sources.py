"""The sources of rows: the embedded generator, the Hugging Face hub, files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from orpo_lab.config.dataset import (
    Dataset,
    EmbeddedDataset,
    FileDataset,
    HubDataset,
    OasstDataset,
    PairColumns,
)
from orpo_lab.data import embedded
from orpo_lab.data.files import (
    ROWS_PER_BATCH,
    Source,
    choose_columns,
    errors_said,
    is_saved,
    read_files,
    read_table,
    saved_splits,
)
from orpo_lab.data.forms import Names, names_of
from orpo_lab.errors import UserError, one_line

# The embedded pairs are the same in every run, so runs with other seeds differ in training only
EMBEDDED_SEED = 0
EMBEDDED_COLUMNS = PairColumns(prompt="prompt", chosen="chosen", rejected="rejected")


def read(config: Dataset) -> tuple[Source, Source | None]:
    """Return the rows to train on, and the held-out rows.

    None as the second value: the held-out rows must be taken from the rows to train on.

    Raises:
        UserError: the source cannot be reached, is empty, or lacks a column. Reading the returned
            rows raises it too.
    """
    match config:
        case EmbeddedDataset():
            return _generate("train", config.num_train), _generate("eval", config.num_eval)
        case HubDataset():
            train = _read_hub(config, config.train_split, names_of(config.columns))
            if config.eval_split is None:
                return train, None
            of_pairs = names_of(config.columns, of_pairs=True)
            return train, _read_hub(config, config.eval_split, of_pairs)
        case FileDataset():
            train = read_files(config.train_path, names_of(config.columns))
            if config.eval_path is None:
                return train, None
            return train, read_files(config.eval_path, names_of(config.columns, of_pairs=True))
        case OasstDataset():
            train = read_files(config.train_path, None)
            return train, read_files(config.eval_path, None) if config.eval_path else None
    raise TypeError(f"no dataset source: {config!r}")


def _generate(split: embedded.Split, num: int | None) -> Source:
    if num is None:
        raise UserError(f"dataset.num_{split} must be a number: dataset=embedded has no end")
    try:
        rows = embedded.pairs(split, num=num, seed=EMBEDDED_SEED)
    except ValueError as error:
        raise UserError(one_line(error)) from error
    return Source(f"dataset=embedded, {split}", "row", enumerate(rows))


def _read_hub(config: HubDataset, split: str, columns: Names) -> Source:
    is_local = Path(config.path).is_dir()
    if is_local and (is_saved(config.path) or saved_splits(config.path)):
        raise UserError(
            f"dataset.path={config.path} is a folder that datasets has saved a data set to; use "
            f"dataset=file dataset.train_path={config.path}"
        )
    name = config.path if is_local else f"dataset.path={config.path}"
    try:
        # `datasets` keeps a copy of the data it has read. It takes a folder for unchanged as long
        # as its files have the same times. A stream has no copy
        rows = datasets.load_dataset(
            config.path, revision=config.revision, split=split, streaming=is_local
        )
        present = _column_names(rows)
    except Exception as error:  # datasets raises a dozen types here, from the network to YAML
        raise UserError(
            f"{name}, split {split}, cannot be loaded ({one_line(error)[:200]}); check the name, "
            "the split and the connection to the hub, or give a local folder"
        ) from error
    unread: set[str] = set()
    read = choose_columns(present, columns, name, unread)
    batches: Iterator[pa.Table] = (
        rows.select_columns(read).with_format("arrow").iter(ROWS_PER_BATCH)
    )
    name = f"{name}, split {split}"
    return Source(name, "row", errors_said(name, read_table(batches)), unread)


def _column_names(rows: Any) -> list[str]:
    """Return the column names of a table; for a stream the first rows may have to be read."""
    if rows.column_names is None:
        rows = rows._resolve_features()
    return list(rows.column_names)
