"""Read the rows of files. A suffix says the format: JSON lines, JSON, CSV, TSV, Parquet or Arrow.

A folder that `datasets` has saved a data set to counts as a file. A row that cannot be read is
yielded as a `Fault`. A file that cannot be read raises a `UserError`.
"""

import csv
import gzip
import io
import json
import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import hf_hub_download

from orpo_lab.config.dataset import Files, expand
from orpo_lab.data import json_items
from orpo_lab.data.faults import Fault, quote
from orpo_lab.data.forms import Names
from orpo_lab.data.recognise import recognise
from orpo_lab.errors import UserError, one_line

log = logging.getLogger(__name__)

Rows = Iterator[tuple[int, Any]]
# Lines are numbered from 1, as in editors; rows are numbered from 0, as in pandas and datasets
Unit = Literal["line", "row"]

# A longer line is not a pair or a tree, and is not held in memory
MAX_LINE_BYTES = 4 * 2**20
_HINT = "if it has one object a line, name it .jsonl"
_ON_HUB = "hf://datasets/"
ROWS_PER_BATCH = 256
# No file has so many rows; see `FilesSource`
MAX_ROWS = 2**40


@dataclass(frozen=True)
class Source:
    """Numbered rows, and their names for messages; a row that cannot be read is a `Fault`."""

    name: str
    unit: Unit
    rows: Rows
    # Columns of the source that are not read; known after the rows are read
    unread: set[str] = field(default_factory=set)

    @property
    def numbered(self) -> str:
        """How a report names rows."""
        return "lines from 1" if self.unit == "line" else "rows from 0"

    def where(self, number: int) -> str:
        """Return the name of a row for a message."""
        return f"{self.name}, {self.briefly(number)}"

    def briefly(self, number: int) -> str:
        """Return the name of a row for a message about another row of this source."""
        return f"{self.unit} {number}"

    def listed(self, number: int) -> int | str:
        """Return the entry of a row in a report."""
        return number


@dataclass(frozen=True)
class FilesSource(Source):
    """The rows of several files, one file after the other.

    The number of a row is the number in its file, and MAX_ROWS for each file before.
    """

    files: tuple[Source, ...] = ()

    @property
    def numbered(self) -> str:
        """How a report names rows."""
        return "by file, lines from 1 or rows from 0"

    def where(self, number: int) -> str:
        """Return the name of a row for a message: its file and its number in the file."""
        file, number = divmod(number, MAX_ROWS)
        return self.files[file].where(number)

    briefly = listed = where


def read_files(paths: Files, columns: Names | None) -> Source:
    """Return the rows of one or several files; each row is read when it is asked for.

    Args:
        paths: a file, a pattern such as `data/*.jsonl`, a folder that `datasets` saved a data set
            to, or `hf://datasets/org/name/file` on the hub; or a list of these.
        columns: the columns that are read. None: the file is not a table (JSON lines only).

    Raises:
        UserError: the suffix is unknown, or no file fits a pattern. Reading the rows raises it if a
            file cannot be read.
    """
    given = [paths] if isinstance(paths, str) else paths
    found = [file for path in given for file in expand(path)]
    name = ", ".join(given)
    if not found:
        raise UserError(f"{name}: there is no such file")
    if found == [paths]:
        return _read_file(found[0], columns)
    log.info("%s: %d files, from %s to %s", name, len(found), found[0], found[-1])
    files = tuple(_read_file(path, columns) for path in found)
    rows = (
        (number + at * MAX_ROWS, row) for at, file in enumerate(files) for number, row in file.rows
    )
    unread: set[str] = set()
    return FilesSource(name, files[0].unit, _with_unread(rows, files, unread), unread, files)


def _with_unread(rows: Rows, files: tuple[Source, ...], unread: set[str]) -> Rows:
    """Yield the rows; then `unread` holds the columns that are not read from any file."""
    yield from rows
    unread.update(*(file.unread for file in files))


def _read_file(path: str, columns: Names | None) -> Source:
    """Return the rows of one file; see `read_files`."""
    if path and Path(path).is_dir():
        return _read_saved(path, columns)
    kind = "".join(Path(path).suffixes[-2:]) if path.endswith(".gz") else Path(path).suffix
    unread: set[str] = set()
    match kind.removesuffix(".gz"):
        case ".jsonl":
            return Source(path, "line", errors_said(path, _read_json_lines(path)))
        case ".json" if columns:
            return Source(path, "row", errors_said(path, _read_json(path)))
        case ".csv" | ".tsv" if columns:
            separator = "\t" if ".tsv" in kind else ","
            return Source(path, "line", errors_said(path, _read_csv(path, columns, separator)))
        case ".parquet" | ".arrow" if columns and kind in (".parquet", ".arrow"):
            read = _read_parquet if kind == ".parquet" else _read_arrow
            return Source(path, "row", errors_said(path, read(path, columns, unread)), unread)
    known = ".jsonl or .jsonl.gz"
    if columns:
        known = ".jsonl, .json, .csv, .tsv (each also .gz), .parquet or .arrow"
    hint = ""
    if "," in path:
        hint = "; several files are written [a.jsonl,b.jsonl]"
    raise UserError(f"{path}: the name must end in {known}, to say how its rows are written{hint}")


def _read_saved(path: str, columns: Names | None) -> Source:
    """Return the rows of a folder that `Dataset.save_to_disk` has written.

    Raises:
        UserError: the folder is not of that kind, or holds several splits.
    """
    splits = saved_splits(path)
    if splits:
        held_out = next((name for name in splits if name != "train"), splits[0])
        raise UserError(
            f"{path} holds the splits {', '.join(splits)}; name one, such as "
            f"dataset.train_path={Path(path) / splits[0]} dataset.eval_path={Path(path) / held_out}"
        )
    if not columns or not is_saved(path):
        raise UserError(
            f"{path} is a folder, and not one that datasets has saved a data set to; name its "
            f"files, such as '{Path(path) / '*.jsonl'}', or use dataset=hub dataset.path={path}"
        )
    unread: set[str] = set()
    return Source(path, "row", errors_said(path, _read_saved_rows(path, columns, unread)), unread)


def is_saved(path: str) -> bool:
    """Return whether `Dataset.save_to_disk` has written a folder."""
    return all((Path(path) / name).is_file() for name in ("state.json", "dataset_info.json"))


def saved_splits(path: str) -> list[str]:
    """Return the splits in a folder that `DatasetDict.save_to_disk` has written, or none."""
    try:
        return list(json.loads((Path(path) / "dataset_dict.json").read_text())["splits"])
    except FileNotFoundError:
        return []
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read: its dataset_dict.json names no splits ({one_line(error)})"
        ) from error


def _read_saved_rows(path: str, columns: Names, unread: set[str]) -> Rows:
    try:
        rows = datasets.load_from_disk(path)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)[:200]}") from error
    read = choose_columns(rows.column_names, columns, path, unread)
    yield from read_table(rows.select_columns(read).with_format("arrow").iter(ROWS_PER_BATCH))


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
    """Refuse a table that lacks a column that is needed, or has two columns of one name.

    Args:
        present: the columns of the table.
        columns: the columns that are read.
        name: the name of the table, for the message.

    Raises:
        UserError: it does.
    """
    if len(set(present)) < len(present):
        raise UserError(f"{name} has two columns of one name: {', '.join(present)[:200]}")
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
        UserError: see `check_columns`.
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
    try:
        key = _key_of_rows(path)
        rows = (row for name, row in _json_items(path) if name == key)
        yield from enumerate(rows)
    except RecursionError as error:
        raise UserError(f"{path} cannot be read: it is nested too deeply") from error
    except json_items.NotJsonError as error:
        raise UserError(f"{path} cannot be read: {error}; {_HINT}") from error


def _json_items(path: str) -> Iterator[tuple[str | None, Any]]:
    with _open(path) as file, io.TextIOWrapper(file, "utf-8-sig") as text:
        yield from json_items.items(text)


def _key_of_rows(path: str) -> str | None:
    """Return under which key an object holds the list of rows, such as `{"data": [...]}`.

    None: the file holds one list. An object is read to its end, to find out.

    Raises:
        UserError: no list of the object holds objects, or several do.
    """
    found: dict[str, None] = {}  # in their order
    for name, item in _json_items(path):
        if name is None:
            return None
        if isinstance(item, dict):
            found[name] = None
    match list(found):
        case [key]:
            return key
        case []:
            raise UserError(f"{path} holds no rows, since it has no array of objects; {_HINT}")
        case keys:
            names = ", ".join(map(quote, keys))
            raise UserError(
                f"{path} holds several lists of objects ({names}), of which one must be the rows; "
                f"leave the others out, or, {_HINT}"
            )


def _read_csv(path: str, columns: Names, separator: str) -> Rows:
    # A file with a longer field is refused: to find the field's end it would have to be in memory
    csv.field_size_limit(MAX_LINE_BYTES)
    with _open(path) as file:
        # Bytes that are not UTF-8 become surrogates, so that only the row with them is a fault
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, strict=True, delimiter=separator)
        header = next(reader, [])
        check_columns(header, columns, path)
        number = reader.line_num + 1
        try:
            for cells in reader:
                if separator == "\t" and any("\t" in cell and "\n" in cell for cell in cells):
                    raise csv.Error(
                        "a cell that begins with a quote takes in the cells up to the next quote, "
                        f"in line {reader.line_num}; save the rows as .jsonl, or put every cell "
                        'that holds a quote in quotes, with "" for each quote in it'
                    )
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


def _read_arrow(path: str, columns: Names, unread: set[str]) -> Rows:
    with pa.memory_map(str(_locate(path))) as file:
        # The two formats of Arrow: a file with a table of contents, and a stream
        if file.read(6) == b"ARROW1":
            whole = pa.ipc.open_file(file)
            batches = map(whole.get_batch, range(whole.num_record_batches))
        else:
            file.seek(0)
            whole = pa.ipc.open_stream(file)
            batches = iter(whole)
        read = choose_columns(whole.schema.names, columns, path, unread)
        tables = (pa.Table.from_batches([batch]).select(read) for batch in batches)
        yield from read_table(
            table.slice(start, ROWS_PER_BATCH)
            for table in tables
            for start in range(0, len(table), ROWS_PER_BATCH)
        )


def _read_row(row: pa.Table) -> Any:
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError:
        return Fault("invalid_utf8", "is not UTF-8")
