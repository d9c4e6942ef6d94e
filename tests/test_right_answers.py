"""Right answers of held-out rows: where they come from, what is counted, what is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orpo_lab import config, data
from orpo_lab.config import identity
from orpo_lab.data import checkers, embedded, right_answers
from orpo_lab.data.right_answers import RIGHT_ANSWER
from orpo_lab.errors import UserError
from tests.conftest import compose_config

Load = Callable[..., config.Config]
Read = Callable[..., data.Data]

NUM = 12
SUMS: list[dict[str, Any]] = [
    {"prompt": f"add {n} and 2.", "chosen": f"it is {n + 2}.", "rejected": "0", "solution": n + 2}
    for n in range(1, NUM + 1)
]
TALKS = [
    {"prompt": f"say word {n}.", "chosen": f"word {n} it is", "rejected": "no"} for n in range(NUM)
]


TALKS_WITHOUT_NUMBERS = [
    {"prompt": f"talk {n}", "chosen": "who knows", "rejected": "no"} for n in "ab"
]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def read(load: Load, tokenizer: Any, tmp_path: Path) -> Read:
    """Load rows to train on and held-out rows, with overrides of the command line."""

    def read(rows: list[dict[str, Any]], *overrides: str) -> data.Data:
        train = write(tmp_path / "train.jsonl", TALKS)
        held_out = write(tmp_path / "eval.jsonl", rows)
        files = (f"dataset.train_path={train}", f"dataset.eval_path={held_out}")
        return data.load(load("dataset=file", *files, *overrides).dataset, tokenizer)

    return read


def found(loaded: data.Data) -> list[str | None]:
    return list(loaded.held_out[RIGHT_ANSWER][:])


def test_the_chosen_answer_is_the_right_one_where_no_column_is_named(read: Read) -> None:
    loaded = read(SUMS, "dataset.checker=last_number")
    assert found(loaded) == [str(row["solution"]) for row in SUMS]
    assert loaded.report["held_out"]["num_checkable"] == NUM
    assert RIGHT_ANSWER not in read(SUMS).held_out.column_names


def test_a_column_names_the_right_answer(read: Read) -> None:
    rows = [row | {"solution": row["solution"] * 10} for row in SUMS]
    given = ("dataset.checker=last_number", "dataset.columns.right_answer=solution")
    loaded = read(rows, *given)
    assert found(loaded) == [str(row["solution"]) for row in rows]
    assert loaded.report["held_out"]["unread_columns"] == []
    assert read(rows).report["held_out"]["unread_columns"] == ["solution"]


def test_the_last_message_of_the_chosen_conversation_is_the_right_answer(read: Read) -> None:
    def said(*texts: str) -> list[dict[str, str]]:
        roles = ("assistant", "user", "assistant")
        return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]

    rows = [
        {"prompt": row["prompt"], "chosen": said("7?", "no.", row["chosen"]), "rejected": said("0")}
        for row in SUMS
    ]
    kept = "dataset.faults.other_turn_in_answer=keep"
    assert found(read(rows, "dataset.checker=last_number", kept)) == [
        str(row["solution"]) for row in SUMS
    ]


def test_prompts_that_cannot_be_checked_are_counted_and_named(read: Read) -> None:
    rows = [*SUMS[:4], {"prompt": "why?", "chosen": "who knows", "rejected": "no"}, *SUMS[4:]]
    loaded = read(rows, "dataset.checker=last_number")
    report = loaded.report["held_out"]
    assert (report["num_checkable"], report["not_checkable"]) == (NUM, {"num": 1, "rows": [5]})
    check = right_answers.build(config_of("last_number"))
    row = loaded.held_out[4]
    assert row[RIGHT_ANSWER] is None
    assert check("4", row) is None
    # An answer that gives nothing is wrong where the right one is known
    assert check("who knows", loaded.held_out[0]) is False
    assert check("it is 3.0", loaded.held_out[0]) is True


def config_of(checker: str, pattern: str | None = None) -> Any:
    given = {"checker": checker} | ({"checker_pattern": pattern} if pattern else {})
    overrides = [f"dataset.{key}={value}" for key, value in given.items()]
    composed = compose_config("dataset=file", "dataset.train_path=a.jsonl", *overrides)
    return config.load(composed).dataset


def test_held_out_prompts_of_the_training_file_are_checked_too(
    load: Load, tokenizer: Any, tmp_path: Path
) -> None:
    file = write(tmp_path / "rows.jsonl", SUMS)
    given = (f"dataset.train_path={file}", "dataset.num_eval=3", "dataset.checker=last_number")
    loaded = data.load(load("dataset=file", *given).dataset, tokenizer)
    assert len(found(loaded)) == loaded.report["held_out"]["num_checkable"] == 3
    for row in loaded.held_out:
        assert f"it is {row[RIGHT_ANSWER]}." in row["chosen_text"]


def test_only_a_source_with_a_checker_is_checked(
    load: Load, tokenizer: Any, tmp_path: Path
) -> None:
    sums, talks = "dataset.sources.sums", "dataset.sources.talks"
    overrides = [
        "dataset=mixture",
        "dataset.num_eval=4",
        f"{sums}.train_path={write(tmp_path / 'sums.jsonl', SUMS)}",
        f"{talks}.train_path={write(tmp_path / 'talks.jsonl', TALKS)}",
        f"{sums}.checker=last_number",
        f"{sums}.columns.right_answer=solution",
    ]
    mixed = load(*overrides).dataset
    loaded = data.load(mixed, tokenizer)
    assert loaded.report["held_out"]["num_checkable"] == 4
    check = right_answers.build(mixed)
    judged = {(row["source"], check(str(row[RIGHT_ANSWER]), row)) for row in loaded.held_out}
    assert judged == {("sums", True), ("talks", None)}
    each = load(*overrides, f"{talks}.checker=exact").dataset
    check = right_answers.build(each)
    by_source = {
        (row["source"], check(f"so {row[RIGHT_ANSWER]}", row), check(row[RIGHT_ANSWER], row))
        for row in data.load(each, tokenizer).held_out
    }
    assert by_source == {("sums", True, True), ("talks", False, True)}
    with pytest.raises(ValueError, match=r"dataset.sources.talks.checker=last must be one of"):
        load(*overrides, f"{talks}.checker=last")
    with pytest.raises(UserError, match=r"talks: dataset.sources.talks.checker=choice can"):
        data.load(load(*overrides, f"{talks}.checker=choice").dataset, tokenizer)


def test_a_run_that_can_check_nothing_is_refused(read: Read) -> None:
    with pytest.raises(UserError, match=r"checker=choice can check none of 12 .* chosen answer"):
        read(SUMS, "dataset.checker=choice")
    with pytest.raises(UserError, match=r"none of 12 held-out prompts: .* column 'answers?'"):
        read(SUMS, "dataset.checker=last_number", "dataset.columns.right_answer=answer")
    late = [*TALKS_WITHOUT_NUMBERS, *SUMS]
    few = ("dataset.checker=last_number", "dataset.num_generations=2")
    with pytest.raises(UserError, match=r"num_generations=2: none .* is number 3 of 14, so raise"):
        read(late, *few)
    assert read(late, "dataset.checker=last_number", "dataset.num_generations=3")
    assert read(late, "dataset.checker=last_number", "dataset.num_generations=0")


def test_a_table_of_held_out_rows_needs_the_column_and_one_to_train_on_does_not(
    load: Load, tokenizer: Any, tmp_path: Path
) -> None:
    paths = {}
    for name, rows in (("sums", SUMS), ("talks", TALKS)):
        paths[name] = tmp_path / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), paths[name])
    given = ("dataset=file", "dataset.checker=last_number", "dataset.columns.right_answer=solution")

    def loaded(train: str, held_out: str) -> data.Data:
        files = (f"dataset.train_path={paths[train]}", f"dataset.eval_path={paths[held_out]}")
        return data.load(load(*given, *files).dataset, tokenizer)

    assert len(found(loaded("talks", "sums"))) == NUM
    with pytest.raises(UserError, match="lacks column 'solution'"):
        loaded("sums", "talks")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checker=last"], "dataset.checker=last must be one of exact, last_number, choice, regex"),
        (["checker=lastnumber"], "choice, regex. Did you mean 'last_number'?"),
        (["checker=regex"], "dataset.checker=regex needs a pattern with one group"),
        (["checker=exact", "checker_pattern=(a)"], "read by dataset.checker=regex alone"),
        (["checker_pattern=(a)"], "read by dataset.checker=regex alone"),
        (["checker=regex", "checker_pattern=a"], "has 0 groups"),
        (["checker=regex", "checker_pattern=(a)(b)"], "has 2 groups"),
        (["checker=regex", "checker_pattern=(a"], "is no regular expression: missing )"),
    ],
)
def test_a_checker_that_cannot_check_is_refused_before_the_run(
    load: Load, overrides: list[str], message: str
) -> None:
    given = [f"dataset.{override}" for override in overrides]
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        load("dataset=file", "dataset.train_path=a.jsonl", *given)
    assert "\n" not in str(refused.value)


def test_a_pattern_that_is_too_slow_is_refused_at_a_right_answer_and_said_at_an_answer(
    read: Read, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checkers, "MAX_SECONDS", 0.05)
    slow = "((?:a|aa)+)$"
    endless = "a" * 60 + "b"
    given = ("dataset.checker=regex", f"dataset.checker_pattern={slow}")
    rows = [row | {"chosen": endless} for row in SUMS]
    with pytest.raises(UserError, match=r"checker_pattern=.* takes more than .* of 61 characters"):
        read(rows, *given)
    check = right_answers.build(config_of("regex", slow))
    with caplog.at_level("WARNING", "orpo_lab"):
        assert check(endless, {RIGHT_ANSWER: "aa"}) is False
    assert "the answer counts as wrong" in caplog.text


def test_what_is_checked_changes_figures_and_neither_pairs_nor_weights(
    read: Read, load: Load
) -> None:
    def hashes(*overrides: str) -> tuple[str, str | None]:
        report = read(SUMS, *overrides).report["held_out"]
        return report["fingerprint"], report.get("right_answers")

    pattern = ("dataset.checker=regex", r"dataset.checker_pattern=(\d+)")
    ways = [
        hashes(),
        hashes("dataset.checker=last_number"),
        hashes("dataset.checker=exact", "dataset.columns.right_answer=solution"),
        hashes(*pattern),
        hashes("dataset.checker=regex", r"dataset.checker_pattern=(\d*)"),
    ]
    assert len({pairs for pairs, _ in ways}) == 1
    assert len({how for _, how in ways}) == len(ways)

    def identities(*overrides: str) -> str:
        return identity.identity(load("dataset=file", "dataset.train_path=a.jsonl", *overrides))

    checked = ("dataset.checker=last_number",)
    assert identities() != identities(*checked)
    unread = ("dataset.num_generations=0",)
    assert identities(*unread) == identities(*checked, *unread) == identities(*pattern, *unread)
    values = identity.values(load("dataset=file", "dataset.train_path=a.jsonl"))
    assert not {key for key in identity.settings(values) if "checker" in key or "right" in key}


def test_a_run_on_a_file_says_how_many_answers_are_right(launch: Any, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", embedded.pairs("train", num=16, seed=3))
    held_out = write(tmp_path / "eval.jsonl", embedded.pairs("eval", num=24, seed=3))
    given = [
        *("dataset=file", f"dataset.train_path={train}", f"dataset.eval_path={held_out}"),
        *("dataset.checker=last_number", "dataset.columns.right_answer=answer"),
        *("dataset.max_length=96", "dataset.num_generations=24", "dataset.max_new_tokens=24"),
        *("train.max_steps=1", "train.warmup_steps=0", "tracker=none", "hydra.run.dir=run"),
    ]
    said = launch(*given).stdout
    assert "held_out: 24 pairs, 24 whose answer can be checked" in said
    folder = tmp_path / "run"
    after = json.loads((folder / "summary.json").read_text())["after"]
    scores = pq.read_table(folder / "scores.parquet", filters=[("when", "=", "after")])
    correct = scores["correct"].to_pylist()
    assert after["num_checked"] == 24
    assert after["exact_match"] == pytest.approx(sum(correct) / 24)
    # The embedded model knows some of the answers and not others
    assert 0 < sum(correct) < 24
    rows = {
        row["prompt"][0]["content"]: row
        for row in map(json.loads, held_out.read_text().splitlines())
    }
    for sample in json.loads((folder / "samples.json").read_text()):
        row = next(row for prompt, row in rows.items() if prompt in sample["prompt"])
        numbers = [re.findall(r"\d+", text) for text in (sample["after"], row["answer"])]
        is_right = numbers[0][-1:] == numbers[1][-1:]
        assert sample["after_is"] == ("right" if is_right else "wrong")
    refused = launch(*given, "resume=auto", "dataset.checker=exact", expect=1)
    assert "dataset.checker" in refused.stdout + refused.stderr
