"""Files as people have them: several at a time, saved data sets, TSV, Arrow, lists in objects."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from orpo_lab import config, data
from orpo_lab.config import identity
from orpo_lab.config.command_line import as_typed
from orpo_lab.errors import UserError

Load = Callable[..., config.Config]

PAIRS = [
    {"prompt": f"add {number} and 2.", "chosen": str(number + 2), "rejected": "0"}
    for number in range(1, 13)
]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def read(load: Load, tokenizer: Any) -> Callable[..., data.Data]:
    """Load files of pairs, given as on the command line."""
    return lambda paths, *overrides: data.load(
        load(
            *("dataset=file", f"dataset.train_path={paths}", "dataset.num_eval=2", *overrides)
        ).dataset,
        tokenizer,
    )


def as_tsv(folder: Path) -> Path:
    lines = ["\t".join(row) for row in [list(PAIRS[0]), *(list(row.values()) for row in PAIRS)]]
    file = folder / "rows.tsv"
    file.write_text("\n".join(lines) + "\n")
    return file


def as_tsv_gz(folder: Path) -> Path:
    file = folder / "rows.tsv.gz"
    file.write_bytes(gzip.compress(as_tsv(folder).read_bytes()))
    return file


def as_arrow(folder: Path, kind: Any) -> Path:
    table, file = pa.Table.from_pylist(PAIRS), folder / "rows.arrow"
    with file.open("wb") as out, kind(out, table.schema) as writer:
        # More rows in one batch than are read at a time would be read in parts
        writer.write_table(table, max_chunksize=5)
    return file


def as_saved(folder: Path) -> Path:
    datasets.Dataset.from_list(PAIRS).save_to_disk(folder / "saved")
    return folder / "saved"


def as_split(folder: Path) -> Path:
    rows = datasets.Dataset.from_list(PAIRS)
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(folder / "both")
    return folder / "both" / "train"


def in_an_object(folder: Path) -> Path:
    file = folder / "rows.json"
    file.write_text(json.dumps({"version": 2, "splits": ["train"], "data": PAIRS}))
    return file


FORMS: list[Callable[[Path], Path]] = [
    as_tsv,
    as_tsv_gz,
    lambda folder: as_arrow(folder, pa.ipc.new_stream),
    lambda folder: as_arrow(folder, pa.ipc.new_file),
    as_saved,
    as_split,
    in_an_object,
]


def test_every_form_holds_the_same_pairs(read: Callable[..., data.Data], tmp_path: Path) -> None:
    expected = read(write(tmp_path / "rows.jsonl", PAIRS)).report["train"]
    for form in FORMS:
        report = read(form(tmp_path)).report["train"]
        assert report["fingerprint"] == expected["fingerprint"]
        assert report["num_rows"] == 10


def test_a_file_gives_the_pairs_that_it_has_always_given(
    read: Callable[..., data.Data], tmp_path: Path
) -> None:
    """As drawn and held out on 2026-11-26, when all rows were in memory; a resume relies on it."""
    rows = [
        {"prompt": f"add {number % 45} and 2.", "chosen": str(number), "rejected": "no"}
        for number in range(60)
    ]
    drawn = ("dataset.num_train=20", "dataset.num_eval=5", "dataset.as_messages=false")
    report = read(write(tmp_path / "rows.jsonl", rows), *drawn).report
    assert report["train"]["fingerprint"].startswith("905607f74bd82cd7")
    assert report["held_out"]["fingerprint"].startswith("a7b92ab104e70490")
    assert (report["train"]["num_not_drawn"], report["held_out"]["num_not_drawn"]) == (34, 1)


def test_files_are_read_as_one_and_their_rows_keep_their_names(
    read: Callable[..., data.Data], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = read(write(tmp_path / "whole.jsonl", PAIRS)).report
    one = write(tmp_path / "parts" / "a.jsonl", PAIRS[:5])
    other = write(tmp_path / "parts" / "b.jsonl", [*PAIRS[5:], {**PAIRS[0], "chosen": ""}])
    for paths in (f"[{one},{other}]", tmp_path / "parts" / "*.jsonl"):
        caplog.clear()
        caplog.set_level("INFO")
        report = read(paths).report["train"]
        assert report["fingerprint"] == whole["train"]["fingerprint"]
        assert report["numbered"] == "by file, lines from 1 or rows from 0"
        assert report["dropped"]["empty_completion"]["rows"] == [f"{other}, line 8"]
        assert f"2 files, from {one} to {other}" in caplog.text


def test_a_message_names_the_file_of_a_row(read: Callable[..., data.Data], tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", PAIRS)
    other = write(tmp_path / "b.jsonl", [{**PAIRS[3], "chosen": "9"}, PAIRS[2]])
    with pytest.raises(UserError, match=rf"{other}, line 2: is {one}, line 3 once more"):
        read(f"[{one},{other}]", "dataset.faults.duplicate=refuse")


def test_columns_that_no_file_needs_are_named(
    read: Callable[..., data.Data], tmp_path: Path
) -> None:
    for name, extra in (("a", "score"), ("b", "source")):
        rows = [{**row, extra: name} for row in PAIRS[name == "b" :: 2]]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"{name}.parquet")
    report = read(tmp_path / "*.parquet").report["train"]
    assert report["unread_columns"] == ["score", "source"]


def test_a_quote_at_the_head_of_a_cell_of_a_tsv_takes_in_no_other_cell(
    read: Callable[..., data.Data], tmp_path: Path
) -> None:
    file = as_tsv(tmp_path)
    quoted = file.read_text().replace("add 3", '"add 3').replace("add 5 and 2.", 'add 5"')
    file.write_text(quoted)
    with pytest.raises(UserError, match=r"line 4, cannot be read: a cell .* in line 6; save"):
        read(file)
    file.write_text(quoted.replace('"add 3', "add 3").replace('add 5"', '"add ""5"""'))
    assert read(file).report["train"]["num_rows"] == 10


def test_what_cannot_be_read_says_what_to_do(
    read: Callable[..., data.Data], load: Load, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "two.json").write_text(json.dumps({"train": PAIRS, "test": PAIRS}))
    both = as_split(tmp_path).parent
    (tmp_path / "plain").mkdir()
    for paths, said in (
        (tmp_path / "two.json", r"several lists of objects \(train, test\)"),
        (both, rf"splits train, test; name one, such as dataset.train_path={both}/train "),
        (tmp_path / "plain", "name its files, such as"),
        (tmp_path / "*.csv", "there is no such file"),
        (f"{tmp_path}/a.jsonl,b", r"several files are written \[a.jsonl,b.jsonl\]"),
        ("[]", "must be a path, or a list of paths"),
    ):
        with pytest.raises(UserError, match=said):
            read(paths)
    hub = load("dataset=hub", f"dataset.path={as_saved(tmp_path)}").dataset
    with pytest.raises(UserError, match=r"use dataset=file dataset\.train_path="):
        data.load(hub, tokenizer)


def test_a_list_of_paths_is_what_was_typed() -> None:
    assert as_typed(["dataset.train_path=[~a b.jsonl, 1.10]"]) == [
        "dataset.train_path=['~a b.jsonl','1.10']"
    ]
    assert as_typed(["dataset.train_path=a.jsonl"]) == ["dataset.train_path=a.jsonl"]
    sweep = ["-m", "dataset.train_path=[a,b],[c]"]
    assert as_typed(sweep) == sweep


def test_a_folder_that_there_is_is_no_pattern(load: Load, tokenizer: Any, tmp_path: Path) -> None:
    for folder, pairs in (("part[1]", PAIRS[:6]), ("part1", PAIRS[6:])):
        write(tmp_path / folder / "a.jsonl", pairs)
    given = [f"dataset.train_path='{tmp_path}/part[1]/*.jsonl'", "dataset.num_eval=2"]
    loaded = data.load(load("dataset=file", *given).dataset, tokenizer)
    assert loaded.report["train"]["num_rows"] + loaded.report["held_out"]["num_rows"] == 6
    text = "".join([*loaded.train["prompt_text"], *loaded.held_out["prompt_text"]])
    assert all(pair["prompt"] in text for pair in PAIRS[:6])


def test_the_content_of_all_files_identifies_a_run(load: Load, tmp_path: Path) -> None:
    def identify(paths: Any) -> str:
        return identity.identity(load("dataset=file", f"dataset.train_path={paths}"))

    one = write(tmp_path / "parts" / "a.jsonl", PAIRS[:5])
    other = write(tmp_path / "parts" / "b.jsonl", PAIRS[5:])
    copy = write(tmp_path / "elsewhere" / "c.jsonl", PAIRS[5:])
    pattern = tmp_path / "parts" / "*.jsonl"
    listed = identify(f"[{one},{other}]")
    assert listed == identify(f"[{one},{copy}]") == identify(pattern)
    assert identify(one) == identify(f"[{one}]") != listed
    # Rows of another order are drawn otherwise
    assert identify(f"[{other},{one}]") != listed
    write(other, PAIRS[4:])
    assert identify(pattern) != listed
