"""Every fault of a row: refused by name, dropped and counted, or kept and counted."""

import copy
import gzip
import io
import json
import os
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orpo_lab import config, data
from orpo_lab.config.dataset import KEEPABLE_FAULTS, Faults, FileDataset
from orpo_lab.data.files import MAX_LINE_BYTES, read_files
from orpo_lab.data.forms import Names
from orpo_lab.data.template import DEFAULT_CHAT_TEMPLATE
from orpo_lab.errors import UserError
from tests.conftest import compose_config

Load = Callable[..., config.Config]

ASKED = {"role": "user", "content": "add 7 and 2."}
RIGHT = {"role": "assistant", "content": "9"}
WRONG = {"role": "assistant", "content": "8"}
PAIR = {"prompt": "add 7 and 2.", "chosen": "9", "rejected": "8"}
TALK = {"prompt": [ASKED], "chosen": [RIGHT], "rejected": [WRONG]}
CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"left": 7}}}]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds numbers"}}]
HUMAN = "\n\nHuman: add 7 and 2."


def with_a_column_twice(kind: str) -> bytes:
    names = ["prompt", "chosen", "rejected", "rejected"]
    table = pa.table([["add 7 and 2."], ["9"], ["8"], ["7"]], names=names)
    file = io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, file)
    else:
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    return file.getvalue()


def pairs(question: str) -> dict[str, str]:
    return {"prompt": question, "chosen": "3", "rejected": "4"}


def implicit(question: str) -> dict[str, str]:
    return {"chosen": f"{question} 3", "rejected": f"{question} 4"}


def transcripts(question: str) -> dict[str, str]:
    asked = f"\n\nHuman: {question}\n\nAssistant:"
    return {"chosen": f"{asked} 3", "rejected": f"{asked} 4"}


@dataclass(frozen=True)
class Case:
    """Rows, or raw lines, of which those at `at` have the fault, counted from 0."""

    rows: list[Any]
    at: tuple[int, ...] = (0,)
    form: Callable[[str], dict[str, str]] = pairs
    overlong: str = "drop"
    template: str | None = None


LONG = "so, well, " * 40
CASES: dict[str, list[Case]] = {
    "invalid_json": [Case([json.dumps(PAIR)[:-9].encode()]), Case([b"[" * 100_000])],
    "invalid_utf8": [Case([json.dumps(PAIR).encode().replace(b"add", b"\xe9")])],
    "missing_column": [Case([{"prompt": "a", "chosen": "b"}]), Case([{"Prompt": "a"}])],
    "wrong_type": [
        Case([None, 5, "text", [PAIR]], (0, 1, 2, 3)),
        Case([{**PAIR, "rejected": None}, {**PAIR, "chosen": 3}], (0, 1)),
        Case([{**PAIR, "chosen": [RIGHT]}, {**TALK, "chosen": [{"role": "user"}]}], (0, 1)),
        Case([{**PAIR, "prompt": [{"role": "user", "content": ["a"]}]}]),
        Case([{"chosen": [RIGHT], "rejected": [WRONG]}], form=transcripts),
    ],
    "oversized_row": [
        Case([{**PAIR, "chosen": "9 " * 2**20}]),
        Case([{**PAIR, "chosen": "9 " * 2**22}, PAIR]),
    ],
    "lone_surrogate": [Case([{**PAIR, "chosen": "9\ud83d"}])],
    "nul_character": [Case([{**PAIR, "prompt": "add\0 7"}])],
    "empty_prompt": [Case([{**PAIR, "prompt": " \u200b"}]), Case([{**TALK, "prompt": []}])],
    "empty_completion": [
        Case([{**PAIR, "chosen": " \n"}, {**PAIR, "rejected": ""}], (0, 1)),
        Case([{**TALK, "chosen": []}]),
        Case(
            [{"chosen": f"{HUMAN}\n\nAssistant:", "rejected": f"{HUMAN}\n\nAssistant: 8"}],
            form=transcripts,
        ),
    ],
    "chosen_equals_rejected": [
        Case([{**PAIR, "chosen": "8"}]),
        Case([{"chosen": "7+2=9", "rejected": "7+2=9"}], form=implicit),
        Case([{**PAIR, "chosen": [ASKED, RIGHT], "rejected": [ASKED, RIGHT]}]),
        # The template trims what made the difference
        Case(
            [{**TALK, "rejected": [{**RIGHT, "content": " 9"}]}],
            template=DEFAULT_CHAT_TEMPLATE.replace("message['content']", "message['content']|trim"),
        ),
    ],
    "chosen_equals_rejected_after_cut": [
        Case(
            [{**PAIR, "chosen": f"{LONG}9", "rejected": f"{LONG}8"}],
            overlong="cut_completion",
        )
    ],
    "differing_prompts": [
        Case([{**PAIR, "chosen": [ASKED, RIGHT], "rejected": [{**ASKED, "content": "?"}, WRONG]}]),
        Case([{"chosen": "Q: 1 A", "rejected": "1"}], form=implicit),
        Case(
            [{"chosen": f"{HUMAN}\n\nAssistant: 9", "rejected": "\n\nHuman: ?\n\nAssistant: 8"}],
            form=transcripts,
        ),
    ],
    "ignored_column": [
        Case([{**PAIR, "system": "Be brief."}]),
        Case([{**TALK, "system_prompt": "Be brief."}]),
        Case([{**PAIR, "winner": "model_b"}]),
        Case([{**PAIR, "preference_strength": -1}]),
    ],
    "contradicting_prompt": [
        Case([{"prompt": "why?", "chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG]}])
    ],
    "turns_not_alternating": [
        Case(
            [
                {
                    "chosen": f"{HUMAN}{HUMAN}\n\nAssistant: 9",
                    "rejected": f"{HUMAN}\n\nAssistant: 8",
                },
                {"chosen": f"So:{HUMAN}\n\nAssistant: 9", "rejected": f"{HUMAN}\n\nAssistant: 8"},
                {"chosen": "\n\nAssistant: 9", "rejected": "\n\nAssistant: 8"},
                {"chosen": "9", "rejected": "8"},
            ],
            (0, 1, 2, 3),
            form=transcripts,
        )
    ],
    "unknown_role": [
        Case([{**TALK, "prompt": [{**ASKED, "role": "prompter"}]}], template=DEFAULT_CHAT_TEMPLATE)
    ],
    "no_answer": [
        Case([{**TALK, "chosen": [RIGHT, ASKED]}]),
        Case([{"chosen": HUMAN, "rejected": f"{HUMAN}\n\nAssistant: 8"}], form=transcripts),
    ],
    "prefilled_answer": [Case([{**TALK, "prompt": [ASKED, {**RIGHT, "content": "It is"}]}])],
    "other_turn_in_answer": [
        Case([{**TALK, side: [RIGHT, ASKED, WRONG]}]) for side in ("chosen", "rejected")
    ],
    "special_token_text": [
        Case([{**PAIR, "prompt": "what is <s>?"}, {**PAIR, "rejected": "8</s>"}], (0, 1)),
        Case([{**TALK, "prompt": [{**ASKED, "content": "hi<|assistant|>9"}]}]),
        Case([{**PAIR, "prompt": "hi\n<extra_id_1>Assistant\nhello\n<extra_id_1>User\nadd"}]),
    ],
    # The embedded model's template knows no tool
    "template_error": [Case([{**TALK, "prompt": [{**ASKED, "role": "tool"}]}])],
    "misrendered": [
        # The turn asked in ends otherwise once there is an answer
        Case(
            [TALK],
            template="{{ bos_token }}{% for one in messages %}{{ one.content }}"
            "{{ eos_token if loop.last }}{% endfor %}",
        ),
        # Every answer ends in a generation prompt
        Case(
            [TALK],
            template=DEFAULT_CHAT_TEMPLATE.replace("if add_generation_prompt", "if true"),
        ),
    ],
    "unrendered_text": [
        # The embedded model's template knows no tool calls, and no names
        Case([{**TALK, "chosen": [{**RIGHT, "tool_calls": CALLS}]}]),
        Case([{**TALK, "prompt": [{**ASKED, "name": "Ada"}]}, {**TALK, "tools": TOOLS}], (0, 1)),
        Case([{**TALK, "rejected": [{**WRONG, "weight": 0}]}]),
        Case(
            [{**TALK, "prompt": [{**ASKED, "content": "Ada: add 7"}]}],
            template=DEFAULT_CHAT_TEMPLATE.replace(
                "message['content']", "message['content'].split(':')[-1]"
            ),
        ),
    ],
    "duplicate": [
        Case([PAIR, PAIR, {**PAIR, "prompt": "ADD 7 and  2."}, TALK, PAIR], (1, 2, 3, 4)),
    ],
    "conflicting_duplicate": [
        Case([PAIR, {**PAIR, "chosen": "8", "rejected": "9"}], (0, 1)),
        Case([{**PAIR, "prompt": "Add 7 and 2.", "chosen": "8", "rejected": "9"}, TALK], (0, 1)),
    ],
    "leaked_prompt": [Case([{**PAIR, "prompt": "held out"}, PAIR])],
    "leaked_prompt_normalized": [
        Case([{**PAIR, "prompt": "\uff28eld\u00a0 OUT "}, {**TALK, "prompt": [ASKED]}])
    ],
}
EACH = [(fault, case) for fault, cases in CASES.items() for case in cases]
each = pytest.mark.parametrize(("fault", "case"), EACH, ids=[fault for fault, _ in EACH])
NUM_GOOD = 3


def to_line(row: Any) -> bytes:
    return row if isinstance(row, bytes) else json.dumps(row).encode()


@pytest.fixture(scope="module")
def composed() -> FileDataset:
    """The file dataset's own values; composing them takes longer than loading a few rows."""
    found = config.load(compose_config("dataset=file", "dataset.train_path=given")).dataset
    assert isinstance(found, FileDataset)
    return found


def settings_for(composed: FileDataset, folder: Path, case: Case, **policies: str) -> FileDataset:
    """Write three good rows and the case's behind them, and a held-out file."""
    good = [case.form(f"add {number} and 2.") for number in range(NUM_GOOD)]
    (folder / "train.jsonl").write_bytes(b"\n".join(map(to_line, [*good, *case.rows])) + b"\n")
    (folder / "held_out.jsonl").write_bytes(to_line(case.form("held out")))
    return replace(
        composed,
        train_path=str(folder / "train.jsonl"),
        eval_path=str(folder / "held_out.jsonl"),
        max_length=96,
        max_prompt_length=64,
        overlong=case.overlong,
        columns=replace(composed.columns, prompt="prompt" if case.form is pairs else None),
        transcripts=case.form is transcripts,
        as_messages="false",
        faults=replace(composed.faults, **policies),
    )


def tokenizer_for(case: Case, tokenizer: Any) -> Any:
    if case.template is None:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = case.template
    return tokenizer


def lines_of(case: Case) -> list[int]:
    return [NUM_GOOD + 1 + at for at in case.at]


def test_every_fault_has_a_case() -> None:
    assert list(CASES) == [field.name for field in fields(Faults)]


@each
def test_a_fault_is_dropped_and_counted_with_its_lines(
    composed: FileDataset, tokenizer: Any, tmp_path: Path, fault: str, case: Case
) -> None:
    settings = settings_for(composed, tmp_path, case, **{fault: "drop"})
    loaded = data.load(settings, tokenizer_for(case, tokenizer))
    report = loaded.report["train"]
    assert list(report["dropped"]) == [fault]
    assert report["dropped"][fault]["num"] == len(case.at)
    assert report["dropped"][fault]["rows"] == lines_of(case)
    assert report["dropped"][fault]["example"]
    assert report["numbered"] == "lines from 1"
    assert report["num_rows"] == NUM_GOOD + len(case.rows)
    assert report["num_kept"] == len(loaded.train) == NUM_GOOD + len(case.rows) - len(case.at)


@each
def test_a_fault_is_refused_by_name(
    composed: FileDataset, tokenizer: Any, tmp_path: Path, fault: str, case: Case
) -> None:
    settings = settings_for(composed, tmp_path, case, **{fault: "refuse"})
    with pytest.raises(UserError) as refusal:
        data.load(settings, tokenizer_for(case, tokenizer))
    message = str(refusal.value)
    assert f"train.jsonl, line {lines_of(case)[0]}: " in message
    assert f"dataset.faults.{fault}=drop" in message
    assert "\n" not in message
    assert len(message) < 600
    message.encode()


@pytest.mark.parametrize("fault", KEEPABLE_FAULTS)
def test_a_fault_is_kept_and_counted(
    composed: FileDataset, tokenizer: Any, tmp_path: Path, fault: str
) -> None:
    for case in CASES[fault]:
        settings = settings_for(composed, tmp_path, case, **{fault: "keep"})
        loaded = data.load(settings, tokenizer_for(case, tokenizer))
        report = loaded.report["train"]
        assert list(report["kept"]) == [fault]
        assert report["kept"][fault]["rows"] == lines_of(case)
        assert not report["dropped"]
        assert report["num_kept"] == len(loaded.train) == NUM_GOOD + len(case.rows)


def test_a_row_counts_once_however_many_faults_it_has(
    composed: FileDataset, tokenizer: Any, tmp_path: Path
) -> None:
    rows = [{**PAIR, "chosen": "<s>\0"}, {**PAIR, "chosen": "<s>\0"}, {**PAIR, "rejected": "\0"}]
    case = Case([*rows, {**PAIR, "prompt": "count " * 200}])
    settings = settings_for(composed, tmp_path, case, special_token_text="keep")
    report = data.load(settings, tokenizer).report["train"]
    assert {name: entry["num"] for name, entry in report["dropped"].items()} == {
        "nul_character": 2,
        "empty_completion": 1,
        "prompt_too_long": 1,
    }
    assert report["kept"] == {}
    assert report["num_rows"] == report["num_kept"] + 4 == NUM_GOOD + 4


def test_control_tokens_of_a_template_are_no_fault_and_those_in_a_text_are(
    composed: FileDataset, tokenizer: Any, tmp_path: Path
) -> None:
    faked = {**TALK, "chosen": [{**RIGHT, "content": "9</s><|user|>thanks"}]}
    case = Case([TALK, faked])
    kept = data.load(settings_for(composed, tmp_path, case, special_token_text="keep"), tokenizer)
    # Kept, it is read as TRL reads it: a turn of the user's in the middle of an answer
    assert tokenizer.convert_tokens_to_ids("<|user|>") in kept.train[-1]["chosen_ids"]
    dropped = data.load(settings_for(composed, tmp_path, case), tokenizer)
    assert dropped.report["train"]["dropped"]["special_token_text"]["rows"] == [NUM_GOOD + 2]
    assert len(dropped.train) == NUM_GOOD + 1


def test_nothing_left_is_refused_with_what_was_dropped(
    load: Load, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(PAIR))
    settings = load(
        "dataset=file",
        f"dataset.train_path={tmp_path}/rows.jsonl",
        f"dataset.eval_path={tmp_path}/rows.jsonl",
    ).dataset
    message = r"no train pair is left of 1 \(1 leaked_prompt\).*rows.jsonl, line 1"
    with pytest.raises(UserError, match=message):
        data.load(settings, tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "holds no rows"),
        ("a.jsonl", b"\n \n", "holds no rows"),
        ("a.json", b"[]", "holds no rows"),
        ("a.json", b'{"prompt": "a"}', "it has no array of objects; if it has one object a line"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.json", b'[{"prompt": ', "cannot be read: Expecting value"),
        ("a.json", b'{"prompt": "a"}\n{"prompt": "b"}', "one object a line, name it .jsonl"),
        ("a.json", b'[{"prompt": "\xff"}]', "cannot be read: 'utf-8'"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}' * 900, mtime=0)[:-20], "cannot be read"),
        ("a.jsonl.gz", b"plain text", "cannot be read: Not a gzipped file"),
        ("a.csv", b"prompt,chosen\na,b\n", "lacks column 'rejected'"),
        ("a.csv", b"prompt,chosen,chosen\na,b,c\n", "two columns of one name"),
        ("a.csv", b'prompt,chosen,rejected\na,b,"c\n', "line 2, cannot be read: unexpected end"),
        ("a.csv", b'prompt,chosen,rejected\n"a\nb",c,d\n' + b"x" * 2**23, "line 4, cannot be read"),
        ("a.csv", b"prompt,chosen,rejected\n", "holds no rows"),
        ("a.parquet", b"PAR1 and no more", "cannot be read"),
        ("a.parquet", with_a_column_twice("parquet"), "two columns of one name"),
        ("a.arrow", with_a_column_twice("arrow"), "two columns of one name"),
        ("a.txt", b"", "the name must end in .jsonl"),
        ("a.parquet.gz", b"", "the name must end in .jsonl"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_in_one_line(
    composed: FileDataset,
    tokenizer: Any,
    tmp_path: Path,
    name: str,
    content: bytes,
    message: str,
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as refusal:
        data.load(replace(composed, train_path=str(tmp_path / name)), tokenizer)
    assert message in str(refusal.value)
    assert name in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.jsonl", "cannot be read"),
        ("nowhere.parquet", "cannot be read"),
        ("", "the name must end in"),
        ("hf://datasets/org/name/nowhere.csv", "cannot be fetched"),
        ("hf://datasets/name.csv", "hf://datasets/org/name/file"),
    ],
)
def test_a_file_that_is_not_there_is_refused(
    composed: FileDataset, tokenizer: Any, path: str, message: str
) -> None:
    with pytest.raises(UserError) as refusal:
        data.load(replace(composed, train_path=path), tokenizer)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_text_that_is_no_utf8_inside_a_parquet_file_is_a_fault_of_its_row(
    load: Load, tokenizer: Any, tmp_path: Path
) -> None:
    raw = [b"add 1 and 2.", b"add \xff and 2.", b"add 3 and 2.", b"add 4 and 2."]
    table = {
        "prompt": pa.array(raw, pa.binary()).cast(pa.string(), safe=False),
        "chosen": ["3", "4", "5", "6"],
        "rejected": ["4", "5", "6", "7"],
    }
    (tmp_path / "hub").mkdir()
    pq.write_table(pa.table(table), tmp_path / "hub" / "train.parquet")
    for overrides in (
        ("dataset=file", f"dataset.train_path={tmp_path}/hub/train.parquet"),
        ("dataset=hub", f"dataset.path={tmp_path}/hub"),
    ):
        settings = (*overrides, "dataset.num_eval=1")
        report = data.load(
            load(*settings, "dataset.faults.invalid_utf8=drop").dataset, tokenizer
        ).report["train"]
        assert report["dropped"]["invalid_utf8"]["rows"] == [1]
        assert report["numbered"] == "rows from 0"
        with pytest.raises(UserError, match="row 1: is not UTF-8"):
            data.load(load(*settings).dataset, tokenizer)


def test_a_line_of_100_megabytes_is_counted_without_being_held(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    with file.open("wb") as out:
        out.write(to_line(PAIR) + b'\n{"prompt": "')
        for _ in range(100):
            out.write(b"x" * 1_000_000)
        out.write(b'"}\n' + to_line(PAIR))
    tracemalloc.start()
    try:
        rows = dict(read_files(str(file), Names(("prompt",), ("prompt",))).rows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert list(rows) == [1, 2, 3]
    assert rows[2].name == "oversized_row"
    assert peak < 4 * MAX_LINE_BYTES


def test_a_process_that_dies_while_it_tokenizes_ends_in_one_line(
    load: Load, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orpo_lab.data.encode.encode_row", lambda *_, **__: os._exit(9))
    settings = load("dataset.num_train=8", "dataset.num_eval=8", "dataset.num_proc=2").dataset
    with pytest.raises(UserError, match=r"a process that tokenizes has died .*dataset.num_proc"):
        data.load(settings, tokenizer)


def test_what_is_kept_and_drawn_is_the_same_in_every_run(
    load: Load, tokenizer: Any, tmp_path: Path
) -> None:
    rows = [pairs(f"add {number} and 2.") for number in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    settings = load(
        "dataset=file",
        f"dataset.train_path={tmp_path}/rows.jsonl",
        "dataset.num_eval=10",
        "dataset.num_train=20",
    ).dataset
    loaded, other = (data.load(settings, tokenizer) for _ in range(2))
    assert loaded.report == other.report
    report = loaded.report["train"]
    assert report["num_rows"] == 80  # 20 drawn, and 60 that repeat another
    assert report["num_not_drawn"] == 30
    assert report["dropped"]["duplicate"]["num"] == 60
    assert not set(loaded.train["prompt_text"]) & set(loaded.held_out["prompt_text"])
