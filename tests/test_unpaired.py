"""Single completions with a label: rows, faults, held-out pairs, and runs that learn from them."""

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orpo_lab import config, data, run
from orpo_lab.data import embedded
from orpo_lab.errors import UserError
from orpo_lab.records.run_folder import RunFolder

Load = Callable[..., config.Config]
Row = dict[str, Any]

LENGTHS = ("dataset.max_length=96", "dataset.max_prompt_length=64")
PAIRS = [
    {key: row[key] for key in ("prompt", "chosen", "rejected")}
    for row in embedded.pairs("train", num=40, seed=3)
]


def labelled(pair: Row, label: Any) -> Row:
    side = "chosen" if label in (True, 1, "True", "1") else "rejected"
    return {"prompt": pair["prompt"], "completion": pair[side], "label": label}


# Thumbs on one answer each, in no order
THUMBS = [labelled(pair, at % 3 != 0) for at, pair in enumerate(PAIRS[8:])]
# Both thumbs, of the same prompts
BOTH = [labelled(pair, label) for pair in PAIRS[8:24] for label in (False, True)]


def write(file: Path, rows: list[Row]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def read(load: Load, tokenizer: Any, tmp_path: Path) -> Callable[..., data.Data]:
    """Load rows; held out are pairs of other prompts, or pairs made of the rows."""

    def make(rows: list[Row], *overrides: str, evaluates: bool = True) -> data.Data:
        keys = [f"dataset.train_path={write(tmp_path / 'rows.jsonl', rows)}"]
        if evaluates:
            keys.append(f"dataset.eval_path={write(tmp_path / 'pairs.jsonl', PAIRS[:8])}")
        loaded = load("method=kto", "dataset=unpaired", *LENGTHS, *keys, *overrides)
        return data.load(loaded.dataset, tokenizer)

    return make


def test_a_completion_is_tokenized_as_in_a_pair_and_stands_on_its_labels_side(
    read: Callable[..., data.Data], load: Load, tokenizer: Any, tmp_path: Path
) -> None:
    found = read(THUMBS)
    file = write(tmp_path / "both.jsonl", PAIRS)
    keys = f"dataset.train_path={file}", f"dataset.eval_path={file}"
    paired = load("dataset=file", "dataset.faults.leaked_prompt=keep", *LENGTHS, *keys)
    expected = data.load(paired.dataset, tokenizer).train.to_list()[8:]
    assert len(found.train) == len(THUMBS)
    for row, pair, thumb in zip(found.train, expected, THUMBS, strict=True):
        assert row["prompt_ids"] == pair["prompt_ids"]
        assert row["chosen_ids"] == (pair["chosen_ids"] if thumb["label"] else [])
        assert row["rejected_ids"] == ([] if thumb["label"] else pair["rejected_ids"])
    assert found.report["train"]["num_desirable"] == sum(row["label"] for row in THUMBS)
    assert "num_desirable" not in found.report["held_out"]
    assert all(row["chosen_ids"] and row["rejected_ids"] for row in found.held_out)


@pytest.mark.parametrize("label", [True, False, 1, 0, "True", "false", "1", "0"])
def test_a_label_is_true_or_false_or_1_or_0(read: Callable[..., data.Data], label: Any) -> None:
    (row,) = read([{**THUMBS[0], "label": label}]).train
    assert bool(row["chosen_ids"]) == (label in (True, 1, "True", "1"))
    assert bool(row["chosen_ids"]) != bool(row["rejected_ids"])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"label": None}, r"line 2: label is null; it must be true or false, or 1 or 0"),
        ({"label": "good"}, r"label is good; it must be"),
        ({"label": 2}, r"label is 2; it must be"),
        ({"label": [True]}, r"label is \[True\]; it must be"),
        ({"completion": 5}, r"completion is of type int"),
    ],
)
def test_a_label_or_a_completion_of_another_kind_is_refused_or_counted(
    read: Callable[..., data.Data], changed: Row, said: str
) -> None:
    rows = [THUMBS[0], THUMBS[1] | changed, THUMBS[2]]
    with pytest.raises(UserError, match=said):
        read(rows)
    found = read(rows, "dataset.faults.wrong_type=drop")
    assert len(found.train) == 2
    assert found.report["train"]["dropped"]["wrong_type"]["rows"] == [2]


def test_a_label_may_be_a_number_of_a_table(read: Callable[..., data.Data]) -> None:
    rows = [row | {"label": float(row["label"])} for row in THUMBS]
    assert read(rows).report["train"]["num_desirable"] == sum(row["label"] for row in THUMBS)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_single_completions_in_the_place_of_pairs_are_recognised(
    read: Callable[..., data.Data], tmp_path: Path, suffix: str
) -> None:
    file = write(tmp_path / "thumbs.jsonl", THUMBS)
    if suffix == "csv":
        file = tmp_path / "thumbs.csv"
        file.write_text("prompt,completion,label\na,b,1\n")
    with pytest.raises(UserError, match=r"lacks column 'chosen'.*; held-out rows are pairs"):
        read(THUMBS, f"dataset.eval_path={file}", evaluates=False)


@pytest.mark.parametrize("name", ["prompt", "completion", "label"])
def test_a_row_without_a_column_is_refused_with_the_key_that_names_it(
    read: Callable[..., data.Data], name: str
) -> None:
    rows = [THUMBS[0], {key: value for key, value in THUMBS[1].items() if key != name}]
    with pytest.raises(UserError, match=rf"line 2: lacks column '{name}'.*dataset.columns.{name}="):
        read(rows)


def test_columns_may_have_other_names_and_a_csv_has_strings(
    read: Callable[..., data.Data], load: Load, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "rows.csv").write_text("q,a,thumb\nwhat is 1?,it is 1.,TRUE\nand 2?,no.,0\n")
    names = "{prompt: q, completion: a, label: thumb, chosen: chosen, rejected: rejected}"
    pair = {"q": "what is 3?", "chosen": "it is 3.", "rejected": "it is 4."}
    eval_file = write(tmp_path / "pairs.jsonl", [pair])
    loaded = load(
        "method=sft",
        "dataset=unpaired",
        f"dataset.train_path={tmp_path / 'rows.csv'}",
        f"dataset.eval_path={eval_file}",
        f"dataset.columns={names}",
        *LENGTHS,
    )
    found = data.load(loaded.dataset, tokenizer)
    assert [bool(ids) for ids in found.train["chosen_ids"]] == [True, False]


def test_faults_of_completions_are_counted_as_those_of_pairs(
    read: Callable[..., data.Data],
) -> None:
    good, other = THUMBS[1], THUMBS[2]
    assert good["label"]
    rows = [
        good,
        good,  # once more
        other,
        other | {"label": not other["label"]},  # desirable and not
        THUMBS[3] | {"completion": [{"role": "assistant", "content": " "}]},
        labelled(PAIRS[0], True),  # a held-out prompt
        THUMBS[4],
    ]
    found = read(rows)
    assert len(found.train) == 2
    dropped = found.report["train"]["dropped"]
    expected = {
        "duplicate": [2],
        "conflicting_duplicate": [3, 4],
        "empty_completion": [5],
        "leaked_prompt": [6],
    }
    assert {name: entry["rows"] for name, entry in dropped.items()} == expected


def test_held_out_pairs_are_made_of_prompts_that_have_both(
    read: Callable[..., data.Data], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rows = [*BOTH, *THUMBS[16:]]
    random.Random(0).shuffle(rows)
    found = read(rows, "dataset.num_eval=5", evaluates=False)
    assert len(found.held_out) == 5
    assert len(found.train) == len(rows) - 10
    prompts = {split: set(getattr(found, split)["prompt_text"]) for split in ("train", "held_out")}
    assert not prompts["train"] & prompts["held_out"]
    answers = {pair["prompt"][0]["content"]: pair for pair in PAIRS}
    for row in found.held_out:
        (pair,) = (pair for said, pair in answers.items() if said in row["prompt_text"])
        assert pair["chosen"][0]["content"] in row["chosen_text"]
        assert row["chosen_ids"] != row["rejected_ids"]
        assert row["rejected_ids"]
    assert "10 rows with a label make 5 held-out pairs" in caplog.messages
    assert any("completions (" in line and "desirable" in line for line in caplog.messages)


def test_without_held_out_pairs_the_run_is_refused_with_what_to_give(
    read: Callable[..., data.Data],
) -> None:
    with pytest.raises(
        UserError, match=r"no prompt of .* has a desirable and .* dataset.eval_path"
    ):
        read(THUMBS, evaluates=False)


@pytest.mark.parametrize("method", ["orpo", "kto"])
@pytest.mark.parametrize("dataset", ["unpaired", "unpaired_hub"])
def test_rows_are_counted_as_what_the_method_learns_from(
    load: Load, method: str, dataset: str
) -> None:
    keys = {"unpaired": "dataset.train_path=a.jsonl", "unpaired_hub": "dataset.path=org/name"}
    loaded = load(f"method={method}", f"dataset={dataset}", keys[dataset])
    assert loaded.unit == {"orpo": "pairs", "kto": "completions"}[method]


def test_a_method_of_pairs_learns_from_pairs_of_a_prompts_completions(
    load: Load, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    file = write(tmp_path / "rows.jsonl", [*BOTH, *THUMBS[16:]])
    held_out = f"dataset.eval_path={write(tmp_path / 'held_out.jsonl', PAIRS[:8])}"
    loaded = load("dataset=unpaired", *LENGTHS, f"dataset.train_path={file}", held_out)
    found = data.load(loaded.dataset, tokenizer, makes_pairs=True)
    file = write(tmp_path / "pairs.jsonl", PAIRS[8:24])
    loaded = load("dataset=file", *LENGTHS, f"dataset.train_path={file}", held_out)
    pairs = data.load(loaded.dataset, tokenizer)
    assert found.report["train"]["fingerprint"] == pairs.report["train"]["fingerprint"]
    assert found.report["train"]["num_rows"] == len(found.train) == 16
    num_left = len(THUMBS[16:])
    assert f"{32 + num_left} completions with a label make 16 pairs" in caplog.text
    assert f"{num_left} have no counterpart" in caplog.text


def test_a_method_of_pairs_is_refused_completions_without_a_counterpart(
    load: Load, tokenizer: Any, tmp_path: Path
) -> None:
    file, pairs = write(tmp_path / "rows.jsonl", THUMBS), write(tmp_path / "p.jsonl", PAIRS[:8])
    keys = f"dataset.train_path={file}", f"dataset.eval_path={pairs}"
    loaded = load("dataset=unpaired", *LENGTHS, *keys)
    with pytest.raises(UserError, match=r"no train prompt of .* use method=kto or method=sft"):
        data.load(loaded.dataset, tokenizer, makes_pairs=True)


@pytest.mark.parametrize("method", ["kto", "sft"])
def test_a_run_learns_from_single_completions(
    load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    loaded = load(
        f"method={method}",
        "dataset=unpaired",
        *LENGTHS,
        f"dataset.train_path={write(tmp_path / 'rows.jsonl', THUMBS)}",
        f"dataset.eval_path={write(tmp_path / 'pairs.jsonl', PAIRS[:8])}",
        "dataset.num_generations=0",
        "optimizer=lora",
        "train.batch_size=4",
        "train.max_steps=3",
        "train.logging_steps=1",
        "train.eval_steps=3",
        "tracker=none",
    )
    result = run.train(loaded, tmp_path / "run", choices={}, overrides=[])
    assert result.summary["after"]["num_pairs"] == 8
    *lines, evaluation = RunFolder(tmp_path / "run").metrics()
    said = (tmp_path / "run" / "run.log").read_text()
    assert "left out" not in said
    num = sum(row["label"] for row in THUMBS)
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert report["train"]["num_desirable"] == num
    if method == "sft":
        assert f"{len(THUMBS) - num} undesirable completions are not trained on" in said
        return
    assert "eval_preference_accuracy" in evaluation
    assert "preference_accuracy" not in lines[-1]
    assert {"kl", "rewards/chosen", "rewards/rejected", "preference_loss"} <= lines[-1].keys()
    assert all(line["loss"] == pytest.approx(line["preference_loss"]) for line in lines)
