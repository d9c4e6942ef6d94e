"""Strings of a chat model become messages, once and for all rows, or are trained as they are."""

import copy
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orpo_lab import config, data
from orpo_lab.config.dataset import FileDataset, TableDataset
from orpo_lab.data.template import DEFAULT_CHAT_TEMPLATE
from orpo_lab.errors import UserError
from tests.conftest import compose_config

TEMPLATES = Path(__file__).parent / "templates"
STRINGS = [
    {"prompt": f"what is {number} plus 1?", "chosen": str(number + 1), "rejected": "no"}
    for number in range(12)
]
Read = Callable[..., data.Data]


def as_turns(row: dict[str, Any]) -> dict[str, Any]:
    """Write a row of strings as messages."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {
        key: [{"role": roles[key], "content": value}] if key in roles else value
        for key, value in row.items()
    }


@pytest.fixture(scope="module")
def composed() -> TableDataset:
    found = config.load(compose_config("dataset=file", "dataset.train_path=given")).dataset
    assert isinstance(found, FileDataset)
    return replace(found, num_eval=2)


@pytest.fixture
def read(composed: FileDataset, tokenizer: Any, tmp_path: Path) -> Read:
    """Load rows, by default with the embedded model's tokenizer, which has a chat template."""

    def load(
        rows: list[Any], *, tokens: Any = tokenizer, settings: Any = composed, **keys: Any
    ) -> data.Data:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return data.load(replace(settings, train_path=str(file), **keys), tokens)

    return load


def with_template(tokenizer: Any, template: str) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def texts(loaded: data.Data) -> list[str]:
    pairs = [*loaded.train, *loaded.held_out]
    return sorted(pair["prompt_text"] + pair["chosen_text"] for pair in pairs)


def fingerprints(loaded: data.Data) -> list[str]:
    return [loaded.report[split]["fingerprint"] for split in ("train", "held_out")]


@pytest.mark.parametrize("as_messages", ["auto", "true"])
def test_strings_of_a_chat_model_are_trained_as_the_same_messages_would_be(
    read: Read, as_messages: str
) -> None:
    wrapped = read(STRINGS, as_messages=as_messages)
    assert "<s><|user|>what is 3 plus 1?<|assistant|>4</s>" in texts(wrapped)
    messages = read(list(map(as_turns, STRINGS)))
    assert fingerprints(wrapped) == fingerprints(messages)
    nums = [
        [loaded.report[split]["num_as_messages"] for split in ("train", "held_out")]
        for loaded in (wrapped, messages)
    ]
    assert nums == [[10, 2], [0, 0]]


def test_what_becomes_of_strings_is_said_once(read: Read, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        read(STRINGS)
    assert caplog.text.count("12 pairs are strings, and become messages") == 1
    caplog.clear()
    with caplog.at_level(logging.INFO):
        read(STRINGS, as_messages="false")
    assert caplog.text.count("12 pairs are strings and are trained as they are") == 1
    assert "dataset.as_messages=false" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        read(list(map(as_turns, STRINGS)))
    assert "strings" not in caplog.text


@pytest.mark.parametrize("before", ["\n\n", "", "\n", " \n\n\n"])
def test_a_transcript_in_one_text_never_becomes_one_turn(read: Read, before: str) -> None:
    rows = [
        {**row, "prompt": f"{before}Human: {row['prompt']}\n\nAssistant:", "chosen": "2"}
        for row in STRINGS
    ]
    with pytest.raises(UserError, match=r"line 1: the prompt is a transcript.*as_messages=false"):
        read(rows)
    plain = read(rows, as_messages="false")
    assert f"{before}Human: what is 3 plus 1?\n\nAssistant:2" in texts(plain)


def test_a_text_about_humans_is_no_transcript(read: Read) -> None:
    rows = [{**row, "prompt": f"Human: define it. {row['prompt']}"} for row in STRINGS]
    assert read(rows).report["train"]["num_as_messages"] > 0


def test_strings_stay_strings_where_the_model_has_no_chat_template(
    read: Read, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    base = with_template(tokenizer, DEFAULT_CHAT_TEMPLATE)
    plain = read(STRINGS, tokens=base)
    assert "what is 3 plus 1?4" in texts(plain)
    assert "strings" not in caplog.text
    assert fingerprints(plain) == fingerprints(read(STRINGS, as_messages="false"))
    with pytest.raises(UserError, match=r"the model has no chat template.*model\.chat_template"):
        read(STRINGS, tokens=base, as_messages="true")


def test_strings_without_a_prompt_column_stay_strings(
    read: Read, composed: FileDataset, caplog: pytest.LogCaptureFixture
) -> None:
    columns = replace(composed.columns, prompt=None)
    rows = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in STRINGS]
    assert "what is 3 plus 1?4" in texts(read(rows, columns=columns))
    assert "no column says where the prompt ends" in caplog.text
    with pytest.raises(UserError, match=r"dataset\.columns\.prompt"):
        read(rows, columns=columns, as_messages="true")


def test_prompts_in_the_models_format_are_not_wrapped_again(
    read: Read, composed: FileDataset, caplog: pytest.LogCaptureFixture
) -> None:
    keeping = replace(composed, faults=replace(composed.faults, special_token_text="keep"))
    formatted = {**STRINGS[0], "prompt": "<|user|>what?<|assistant|>"}
    loaded = read([*STRINGS[1:], formatted], settings=keeping)
    assert "<|user|>what?<|assistant|>1" in texts(loaded)
    assert "<s><|user|>what is 3 plus 1?<|assistant|>4</s>" in texts(loaded)
    assert "1 pairs are strings and are trained as they are" in caplog.text
    assert "hold control tokens already" in caplog.text
    loaded = read([*STRINGS[1:], formatted], settings=keeping, as_messages="true")
    assert "<s><|user|><|user|>what?<|assistant|><|assistant|>1</s>" in texts(loaded)


def test_the_same_rows_are_repeats_and_leaks_whether_wrapped_or_not(
    read: Read, tmp_path: Path
) -> None:
    again = {**STRINGS[2], "prompt": "WHAT is  2 plus 1?"}
    swapped = {**STRINGS[3], "chosen": "no", "rejected": "4"}
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({**STRINGS[5], "prompt": "What is 5 plus 1?"}) + "\n")
    reports = [
        read([*STRINGS, again, swapped], as_messages=as_messages, eval_path=str(held_out)).report[
            "train"
        ]["dropped"]
        for as_messages in ("true", "false")
    ]
    assert reports[0] == reports[1]
    assert set(reports[0]) == {
        "duplicate",
        "conflicting_duplicate",
        "leaked_prompt_normalized",
    }


def test_tools_beside_strings_are_rendered_or_named_as_unread(read: Read, tokenizer: Any) -> None:
    tool = {"type": "function", "function": {"name": "lookup", "description": "toolstext"}}
    rows = [{**row, "tools": [tool]} for row in STRINGS]
    calling = with_template(tokenizer, (TEMPLATES / "tool_calls.jinja").read_text())
    wrapped = read(rows, tokens=calling)
    assert all("toolstext" in text for text in texts(wrapped))
    assert wrapped.report["train"]["unread_columns"] == []
    plain = read(rows, tokens=calling, as_messages="false")
    assert plain.report["train"]["unread_columns"] == ["tools"]


def test_strings_beside_strings_with_a_system_message_are_messages_too(
    read: Read, composed: FileDataset, tokenizer: Any
) -> None:
    base = with_template(tokenizer, DEFAULT_CHAT_TEMPLATE)
    columns = replace(composed.columns, system="system")
    loaded = read(
        [{**STRINGS[0], "system": "be short"}, *STRINGS[1:]], tokens=base, columns=columns
    )
    asked = "<|user|>\nwhat is {} plus 1?</s>\n<|assistant|>\n{}</s>\n"
    assert "<s><|system|>\nbe short</s>\n" + asked.format(0, 1) in texts(loaded)
    assert "<s>" + asked.format(3, 4) in texts(loaded)


def test_single_completions_become_messages_too(read: Read, tokenizer: Any) -> None:
    found = config.load(
        compose_config("method=kto", "dataset=unpaired", "dataset.train_path=given")
    ).dataset
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in STRINGS
        for side in ("chosen", "rejected")
    ]
    loaded = read(rows, settings=replace(found, num_eval=2))
    assert all(text.startswith("<s><|user|>what is") for text in loaded.train["prompt_text"])
    assert all(text.startswith("<s><|user|>what is") for text in loaded.held_out["prompt_text"])


def test_real_strings_are_asked_by_the_models_own_template(read: Read, assets: Path) -> None:
    lines = (assets / "data/math_pairs/train.jsonl").read_text().splitlines()[:20]
    rows = list(map(json.loads, lines))
    loaded = read(rows)
    print(texts(loaded)[0])
    assert fingerprints(loaded) == fingerprints(read(list(map(as_turns, rows))))
