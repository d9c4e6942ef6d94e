"""Read the rows of a file. Its suffix says the format: JSON lines, JSON, CSV or Parquet.

A row that cannot be read is yielded as a `Fault`. A file that cannot be read raises a `UserError`.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import hf_hub_download

from orpo_lab.data.faults import Fault
from orpo_lab.data.forms import Names
from orpo_lab.data.recognise import recognise
from orpo_lab.errors import UserError, one_line

Rows = Iterator[tuple[int, Any]]
# Lines are numbered from 1, as in editors; rows are numbered from 0, as in pandas and datasets
Unit = Literal["line", "row"]

# A longer line is not a pair or a tree, and is not held in memory
MAX_LINE_BYTES = 4 * 2**20
_HINT = "if it has one object a line, name it .jsonl"
_ON_HUB = "hf://datasets/"
ROWS_PER_BATCH = 256


@dataclass(frozen=True)
class Source:
    """Numbered rows, and their names for messages; a row that cannot be read is a `Fault`."""

    name: str
    unit: Unit
    rows: Rows
    # Columns of the source that are not read; known after the rows are read
    unread: set[str] = field(default_factory=set)

    def where(self, number: int) -> str:
        """Return the name of a row for a message."""
        return f"{self.name}, {self.unit} {number}"


def read_file(path: str, columns: Names | None) -> Source:
    """Return the rows of a file; each row is read when it is asked for.

    Args:
        path: a file, or `hf://datasets/org/name/file` on the hub.
        columns: the columns that are read. None: the file is not a table (JSON lines only).

    Raises:
        UserError: the suffix is unknown. Reading the rows raises it if the file cannot be read.
    """
    kind = "".join(Path(path).suffixes[-2:]) if path.endswith(".gz") else Path(path).suffix
    match kind.removesuffix(".gz"):
        case ".jsonl":
            return Source(path, "line", errors_said(path, _read_json_lines(path)))
        case ".json" if columns:
            return Source(path, "row", errors_said(path, _read_json(path)))
        case ".csv" if columns:
            return Source(path, "line", errors_said(path, _read_csv(path, columns)))
        case ".parquet" if columns and kind == ".parquet":
            unread: set[str] = set()
            return Source(
                path, "row", errors_said(path, _read_parquet(path, columns, unread)), unread
            )
    known = ".jsonl, .json, .csv (each also .gz) or .parquet" if columns else ".jsonl or .jsonl.gz"
    raise UserError(f"{path}: the name must end in {known}, to say how its rows are written")


def read_table(batches: Iterator[pa.Table]) -> Rows:
    """Yield the numbered rows of Arrow tables; a row with text that is not UTF-8 is a `Fault`."""
    number = 0
    for batch in batches:
        try:
            rows: list[Any] = batch.to_pylist()
        except UnicodeDecodeError:
            rows = [_read_row(batch.slice(index, 1)) for index in range(len(batch))]
        for row in rows:
            yield number, _without_fillers(row)
            number += 1


def _without_fillers(row: Any) -> Any:
    """Return a row without the nulls inside its values.

    In a table all messages have the same keys, and all arguments of tool calls too. A key that a
    message does not have is null there.
    """
    if not isinstance(row, dict):
        return row
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def check_columns(present: list[str], columns: Names, name: str) -> None:
    """Refuse a table that lacks a column that is needed.

    Args:
        present: the columns of the table.
        columns: the columns that are read.
        name: the name of the table, for the message.

    Raises:
        UserError: the table lacks such a column.
    """
    if missing := [column for column in columns.needed if column not in present]:
        raise UserError(
            f"{name} lacks column '{missing[0]}' (it has {', '.join(sorted(present)[:20])}); "
            "name the right ones with dataset.columns.prompt=... (null where there is none), "
            "dataset.columns.chosen=..., dataset.columns.rejected=... and so on"
            f"{recognise(present, columns.read)}"
        )


def choose_columns(present: list[str], columns: Names, name: str, unread: set[str]) -> list[str]:
    """Return the columns of a table that are looked at; add all other columns to `unread`.

    Raises:
        UserError: the table lacks a column that is needed.
    """
    check_columns(present, columns, name)
    seen = columns.seen(present)
    unread.update(column for column in present if column not in seen)
    return seen


def errors_said(name: str, rows: Rows) -> Rows:
    """Yield the rows of a reader; if it fails or yields no rows, raise a `UserError`."""
    is_empty = True
    try:
        for row in rows:
            is_empty = False
            yield row
    except (OSError, EOFError, zlib.error, csv.Error, pa.ArrowException, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name} cannot be read: {one_line(error)[:200]}") from error
    if is_empty:
        raise UserError(f"{name} holds no rows")


def _open(path: str) -> io.BufferedReader:
    file = _locate(path)
    return io.BufferedReader(gzip.open(file)) if path.endswith(".gz") else file.open("rb")


def _locate(path: str) -> Path:
    if not path.startswith(_ON_HUB):
        return Path(path)
    parts = path.removeprefix(_ON_HUB).split("/", 2)
    if len(parts) < 3:
        raise UserError(f"{path}: a file of the hub is named {_ON_HUB}org/name/file")
    try:
        return Path(hf_hub_download("/".join(parts[:2]), parts[2], repo_type="dataset"))
    except Exception as error:  # a dozen types, from the network to the name
        raise UserError(
            f"{path} cannot be fetched ({one_line(error)[:200]}); check the name and the "
            "connection to the hub, or give a local file"
        ) from error


def _read_json_lines(path: str) -> Rows:
    with _open(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                size = len(line)
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES)
                    size += len(line)
                yield (
                    number,
                    Fault("oversized_row", f"is {size} bytes long, more than {MAX_LINE_BYTES}"),
                )
            elif line.strip():
                yield number, _parse(line)


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Fault("invalid_utf8", f"is not UTF-8: byte {error.start + 1} of the line is wrong")
    except (ValueError, RecursionError) as error:
        return Fault("invalid_json", f"is not JSON: {one_line(error)}")


def _read_json(path: str) -> Rows:
    with _open(path) as file:
        try:
            rows = json.loads(file.read().decode("utf-8-sig"))
        except RecursionError as error:
            raise UserError(f"{path} cannot be read: it is nested too deeply") from error
        except json.JSONDecodeError as error:
            raise UserError(f"{path} cannot be read: {one_line(error)}; {_HINT}") from error
    if not isinstance(rows, list):
        raise UserError(f"{path} holds no array of objects; {_HINT}")
    yield from enumerate(rows)


def _read_csv(path: str, columns: Names) -> Rows:
    # A file with a longer field is refused: to find the field's end it would have to be in memory
    csv.field_size_limit(MAX_LINE_BYTES)
    with _open(path) as file:
        # Bytes that are not UTF-8 become surrogates, so that only the row with them is a fault
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, strict=True)
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise UserError(f"{path} has two columns of one name: {', '.join(header)[:200]}")
        check_columns(header, columns, path)
        number = reader.line_num + 1
        try:
            for cells in reader:
                if cells:
                    yield number, _to_row(header, cells)
                number = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}, line {number}, cannot be read: {one_line(error)}") from error


def _to_row(header: list[str], cells: list[str]) -> Any:
    if len(cells) != len(header):
        detail = f"has {len(cells)} cells, not {len(header)} as the first line has"
        return Fault("missing_column", detail)
    if any("\udc80" <= part <= "\udcff" for cell in cells if not cell.isascii() for part in cell):
        return Fault("invalid_utf8", "is not UTF-8")
    return dict(zip(header, cells, strict=True))


def _read_parquet(path: str, columns: Names, unread: set[str]) -> Rows:
    with pq.ParquetFile(_locate(path)) as file:
        read = choose_columns(file.schema_arrow.names, columns, path, unread)
        batches = file.iter_batches(ROWS_PER_BATCH, columns=read)
        yield from read_table(pa.Table.from_batches([batch]) for batch in batches)


def _read_row(row: pa.Table) -> Any:
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError:
        return Fault("invalid_utf8", "is not UTF-8")
