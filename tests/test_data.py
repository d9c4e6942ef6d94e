"""From rows to token ids: what TRL does with rows that fit, and what happens to the others."""

import copy
import json
import logging
import os
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import pytest

from orpo_lab import config, data
from orpo_lab.config.dataset import Dataset
from orpo_lab.data.encode import ROWS_PER_PROCESS, Encoder, encode_row, fit, to_json, tokenize
from orpo_lab.data.faults import Fault
from orpo_lab.data.pairs import Pair, split
from orpo_lab.data.part import fingerprint
from orpo_lab.data.render import render
from orpo_lab.data.template import DEFAULT_CHAT_TEMPLATE
from orpo_lab.errors import UserError

ASKED = {"role": "user", "content": "what is 2 plus 2?"}
RIGHT = {"role": "assistant", "content": "it is 4."}
WRONG = {"role": "assistant", "content": "it is 5."}

Load = Callable[..., config.Config]


def write_rows(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def jsonl(load: Load, file: Path, *overrides: str) -> Dataset:
    held_out = {"prompt": "held out", "chosen": "b", "rejected": "c"}
    held_out_file = write_rows(file.with_name("held_out.jsonl"), [held_out])
    return load(
        "dataset=jsonl",
        f"dataset.train_path={file}",
        f"dataset.eval_path={held_out_file}",
        "dataset.max_length=96",
        "dataset.max_prompt_length=64",
        *overrides,
    ).dataset


def test_the_prompt_is_what_both_conversations_share() -> None:
    pair = split("what is 2 plus 2?", [ASKED, RIGHT], [ASKED, WRONG])
    assert pair == Pair([ASKED], [RIGHT], [WRONG])
    assert split(None, [ASKED, RIGHT], [ASKED, WRONG]) == pair


def test_a_prompt_column_that_contradicts_the_messages_is_counted() -> None:
    assert split("what is 3 plus 3?", [ASKED, RIGHT], [ASKED, WRONG]).contradicted


def test_answers_that_begin_with_the_last_question_keep_the_turns_before_it() -> None:
    prompt = [{"role": "user", "content": "hello"}, RIGHT, ASKED]
    assert split(prompt, [ASKED, RIGHT], [ASKED, WRONG]) == Pair(
        prompt, [RIGHT], [WRONG], repeated=True
    )


def test_whole_conversations_outrank_an_explicit_prompt_that_contradicts_them() -> None:
    other = [{"role": "user", "content": "what is 3 plus 3?"}]
    pair = split(other, [ASKED, RIGHT], [ASKED, WRONG])
    assert pair == Pair([ASKED], [RIGHT], [WRONG], contradicted=True)


def test_explicit_prompts_stay_as_they_are() -> None:
    assert split([ASKED], [RIGHT], [WRONG]) == Pair([ASKED], [RIGHT], [WRONG])
    assert split("2+2=", "4", "5") == Pair("2+2=", "4", "5")
    assert split("2+2?", [RIGHT], [WRONG]).prompt == [{"role": "user", "content": "2+2?"}]


def test_a_prompt_repeated_in_both_answers_is_trained_once() -> None:
    assert split("2+2=", "2+2=4", "2+2=5") == Pair("2+2=", "4", "5", repeated=True)
    pair = split([ASKED], [ASKED, RIGHT], [ASKED, WRONG])
    assert pair == Pair([ASKED], [RIGHT], [WRONG], repeated=True)


def test_identical_conversations_keep_their_last_turn_as_completion() -> None:
    assert split(None, [ASKED, RIGHT], [ASKED, RIGHT]) == Pair([ASKED], [RIGHT], [RIGHT])


def test_a_conversation_that_the_other_one_goes_on_from_keeps_its_last_turn() -> None:
    short, long = [ASKED, RIGHT], [ASKED, RIGHT, ASKED, WRONG]
    assert split(None, long, short) == Pair([ASKED], long[1:], [RIGHT])
    assert split(None, short, long) == Pair([ASKED], [RIGHT], long[1:])


# Answers that begin alike, and answers that differ from their first letter on
@pytest.mark.parametrize("rejected", ["Q: 2+2? A: five", "Q: 2+2? A: nine"])
def test_an_implicit_plain_prompt_is_cut_as_trl_cuts_it(rejected: str) -> None:
    from trl.data_utils import maybe_extract_prompt

    row = {"chosen": "Q: 2+2? A: four", "rejected": rejected}
    theirs = maybe_extract_prompt(row)
    ours = split(None, row["chosen"], row["rejected"])
    assert (ours.prompt, ours.chosen, ours.rejected) == tuple(
        theirs[key] for key in ("prompt", "chosen", "rejected")
    )


def test_a_prompt_that_ends_inside_a_word_of_an_answer_is_not_repeated() -> None:
    for chosen, rejected in (("25", "2 of 5"), ("2 of 5", "25")):
        assert split("2", chosen, rejected) == Pair("2", chosen, rejected)
    assert split("\u4e8c", "\u4e8c\u4e94", "\u4e8c\u56db").repeated


def test_a_plain_prompt_that_one_answer_alone_repeats_is_cut_from_neither() -> None:
    assert split("2+2? ", "2+2? 4", "2+2? 5") == Pair("2+2? ", "4", "5", repeated=True)
    for chosen, rejected in (("2+2? 4", "5"), ("4", "2+2? 5")):
        assert split("2+2? ", chosen, rejected) == Pair("2+2? ", chosen, rejected)


def test_a_string_beside_messages_is_refused() -> None:
    with pytest.raises(Fault, match="chosen and rejected must both be"):
        split(None, "text", [ASKED, WRONG])


def test_bos_and_eos_stand_once_and_the_generation_prompt_once(tokenizer: Any) -> None:
    rendered = render(Pair([ASKED], [RIGHT], [WRONG]), tokenizer, date(2026, 11, 26))
    prompt, chosen, rejected = tokenize(
        rendered.prompt, rendered.chosen, rendered.rejected, tokenizer
    )
    assert prompt[0] == tokenizer.bos_token_id
    assert (prompt + chosen).count(tokenizer.bos_token_id) == 1
    assert prompt == list(
        tokenizer.apply_chat_template([ASKED], add_generation_prompt=True)["input_ids"]
    )
    for side in (chosen, rejected):
        assert side[-1] == tokenizer.eos_token_id
        assert side.count(tokenizer.eos_token_id) == 1


def test_tokens_merged_across_the_boundary_belong_to_the_answer() -> None:
    class Merging:
        """Words of a greedy vocabulary in which prompt and answer can melt together."""

        bos_token_id, eos_token_id = None, 0

        def __call__(self, texts: list[str], **_: bool) -> dict[str, list[list[int]]]:
            return {"input_ids": list(map(self.ids, texts))}

        def ids(self, text: str) -> list[int]:
            ids, vocabulary = [], {"ab": 3, "a": 1, "b": 2, "c": 4}
            while text:
                word = next(word for word in vocabulary if text.startswith(word))
                ids.append(vocabulary[word])
                text = text[len(word) :]
            return ids

    tokenizer: Any = Merging()
    assert tokenize("ca", "b", "c", tokenizer) == ([4], [3, 0], [1, 4, 0])
    assert tokenize("ca", "c", "b", tokenizer) == ([4], [1, 4, 0], [3, 0])


PROMPT, LONG, SHORT = list(range(1, 11)), list(range(20, 32)), list(range(40, 44))


@pytest.mark.parametrize(
    ("overlong", "max_length", "max_prompt_length", "expected"),
    [
        ("drop", 22, 10, ((PROMPT, LONG, SHORT), False)),
        ("drop", 21, 10, "pair_too_long"),
        ("drop", 40, 9, "prompt_too_long"),
        ("cut_prompt", 40, 6, (([1, 6, 7, 8, 9, 10], LONG, SHORT), True)),
        ("cut_prompt", 15, 10, (([1, 9, 10], LONG, SHORT), True)),
        ("cut_prompt", 13, 10, "pair_too_long"),
        ("cut_completion", 16, 10, ((PROMPT, LONG[:6], SHORT), True)),
        ("cut_completion", 16, 12, ((PROMPT, LONG[:6], SHORT), True)),
        ("cut_completion", 16, 9, "prompt_too_long"),
    ],
)
def test_a_pair_that_does_not_fit_follows_the_stated_policy(
    load: Load, overlong: str, max_length: int, max_prompt_length: int, expected: Any
) -> None:
    settings = load(
        f"dataset.overlong={overlong}",
        f"dataset.max_length={max_length}",
        f"dataset.max_prompt_length={max_prompt_length}",
    ).dataset
    if isinstance(expected, str):
        for sides in ((LONG, SHORT), (SHORT, LONG)):
            with pytest.raises(Fault, match=expected):
                fit(PROMPT, *sides, settings)
    else:
        (prompt, longer, shorter), cut = expected
        assert fit(PROMPT, LONG, SHORT, settings) == ((prompt, longer, shorter), cut)
        assert fit(PROMPT, SHORT, LONG, settings) == ((prompt, shorter, longer), cut)


def test_the_lengths_of_a_pair_are_those_of_its_prompt_and_of_each_side(
    load: Load, tokenizer: Any
) -> None:
    long = [{"role": "assistant", "content": "it is four, since two and two are four"}]
    for sides in (([RIGHT], long), (long, [WRONG])):
        row = {"pair": to_json(Pair([ASKED], *sides))}
        dataset = load().dataset
        found = encode_row(row, dataset=dataset, tokenizer=tokenizer, today=date(2026, 11, 27))
        for side in ("prompt", "chosen", "rejected"):
            assert len(found[f"{side}_ids"]) == found[f"num_{side}_tokens"]


def test_a_cut_that_makes_both_sides_equal_is_a_fault(load: Load) -> None:
    settings = load(
        "dataset.overlong=cut_completion", "dataset.max_length=12", "dataset.max_prompt_length=10"
    ).dataset
    with pytest.raises(Fault, match="chosen_equals_rejected_after_cut"):
        fit(PROMPT, [1, 2, 3], [1, 2, 4], settings)


def test_an_unreachable_hub_dataset_is_refused(load: Load, tokenizer: Any) -> None:
    settings = load("dataset=ultrafeedback").dataset
    with pytest.raises(UserError, match=r"dataset.path=HuggingFaceH4/ultrafeedback_binarized") as e:
        data.load(settings, tokenizer)
    assert "\n" not in str(e.value)


def hub_folder(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    """Lay rows out as the hub does: one parquet file a split."""
    for name, rows in splits.items():
        file = folder / "data" / f"{name}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(file)
    return folder


ULTRAFEEDBACK: list[dict[str, Any]] = [
    {
        "prompt": f"add {i} and 2.",
        "prompt_id": str(i),
        "chosen": [
            {"content": f"add {i} and 2.", "role": "user"},
            {"content": str(i + 2), "role": "assistant"},
        ],
        "rejected": [
            {"content": f"add {i} and 2.", "role": "user"},
            {"content": str(i + 3), "role": "assistant"},
        ],
        "score_chosen": 9.0,
        "score_rejected": 2.0,
    }
    for i in range(25)
]


def test_a_folder_laid_out_like_ultrafeedback_loads(
    load: Load, tokenizer: Any, tmp_path: Path
) -> None:
    folder = hub_folder(
        tmp_path / "uf", train_prefs=ULTRAFEEDBACK[:20], test_prefs=ULTRAFEEDBACK[20:]
    )
    settings = load("dataset=ultrafeedback", f"dataset.path={folder}", "dataset.num_proc=2").dataset
    loaded = data.load(settings, tokenizer)
    assert len(loaded.train) == 20
    assert len(loaded.held_out) == 5
    assert tokenizer.decode(loaded.train[3]["chosen_ids"], skip_special_tokens=True) == "5"


def test_one_split_is_divided_by_prompt(load: Load, tokenizer: Any, tmp_path: Path) -> None:
    others = [
        {**row, "rejected": [row["rejected"][0], {"role": "assistant", "content": "no."}]}
        for row in ULTRAFEEDBACK
    ]
    folder = hub_folder(tmp_path / "uf", train=ULTRAFEEDBACK + others)
    settings = load(
        "dataset=ultrafeedback_cleaned", f"dataset.path={folder}", "dataset.num_eval=6"
    ).dataset
    loaded = data.load(settings, tokenizer)
    train, held_out = (set(part["prompt_text"]) for part in (loaded.train, loaded.held_out))
    assert not train & held_out
    assert len(loaded.held_out) == 6
    # Six prompts are held out, and with them both rows of each
    assert len(loaded.train) == 38
    assert loaded.report["held_out"]["num_not_drawn"] == 6


def test_a_local_folder_is_read_anew_whatever_its_files_times_say(
    load: Load, tokenizer: Any, tmp_path: Path
) -> None:
    folder = hub_folder(tmp_path / "uf", train=ULTRAFEEDBACK)
    settings = load("dataset=hub", f"dataset.path={folder}", "dataset.num_eval=5").dataset
    file = folder / "data" / "train-00000-of-00001.parquet"
    before, times = data.load(settings, tokenizer), file.stat()
    edited = json.loads(json.dumps(ULTRAFEEDBACK).replace("and 2.", "and 3."))
    hub_folder(folder, train=edited)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = data.load(settings, tokenizer)
    assert all("and 2." in text for text in before.train["prompt_text"])
    assert all("and 3." in text for text in after.train["prompt_text"])


def test_too_few_prompts_to_hold_out_are_refused(
    load: Load, tokenizer: Any, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    settings = load("dataset=jsonl", f"dataset.train_path={file}").dataset
    with pytest.raises(UserError, match=r"too few to hold out 1 and train on others; give "):
        data.load(settings, tokenizer)


def test_where_no_row_gives_a_pair_the_refusal_says_why(
    load: Load, tokenizer: Any, tmp_path: Path
) -> None:
    said = [{"role": "judge", "content": "4"}]
    rows = [{"prompt": f"{n}?", "chosen": said, "rejected": said[:1]} for n in range(9)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    given = ("dataset=file", f"dataset.train_path={file}")
    with pytest.raises(UserError, match=r"no train pair is left of 9 \(9 chosen_equals_rejected\)"):
        data.load(load(*given).dataset, tokenizer)


def test_where_too_few_pairs_fit_the_refusal_names_the_lengths(
    load: Load, tokenizer: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{n} " * 200, "chosen": "b", "rejected": "c"} for n in range(10)]
    rows.append({"prompt": "say b.", "chosen": "b", "rejected": "c"})
    file = write_rows(tmp_path / "rows.jsonl", rows)
    given = (f"dataset.train_path={file}", "dataset.max_length=64")
    with pytest.raises(
        UserError, match=r"1 distinct prompts of 11 .* 10 prompt_too_long; .*, dataset\.max_p"
    ):
        data.load(load("dataset=jsonl", *given).dataset, tokenizer)


@pytest.mark.parametrize(
    ("num_rows", "overrides", "held_out", "says"),
    [
        (60, (), 12, "train: 12 of 60 distinct prompts are held out, a fifth of them"),
        (4, (), 1, "train: 1 of 4 distinct prompts are held out"),
        (60, ("dataset.num_eval=50",), 50, None),
        (1_300, ("dataset.num_train=8",), 256, None),
    ],
)
def test_of_a_small_file_a_fifth_is_held_out_and_a_number_that_is_given_is_exact(
    load: Load,
    tokenizer: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    num_rows: int,
    overrides: tuple[str, ...],
    held_out: int,
    says: str | None,
) -> None:
    caplog.set_level(logging.INFO)
    rows = [{"prompt": f"add {a} and 2.", "chosen": "3", "rejected": "4"} for a in range(num_rows)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    settings = load("dataset=file", f"dataset.train_path={file}", *overrides).dataset
    loaded = data.load(settings, tokenizer)
    assert len(loaded.held_out) == held_out
    assert len(loaded.train) == (settings.num_train or num_rows - held_out)
    said = [
        record.getMessage() for record in caplog.records if "are held out" in record.getMessage()
    ]
    assert len(said) == (says is not None)
    assert not says or said[0].startswith(says)


def test_rows_are_drawn_over_a_whole_file_and_held_out_whatever_their_order(
    load: Load, tokenizer: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": f"add {a} and 2.", "chosen": "3", "rejected": "4"} for a in range(60)]

    def prompts(rows: list[dict[str, str]]) -> list[set[str]]:
        file = write_rows(tmp_path / "rows.jsonl", rows)
        sizes = ("dataset.num_train=20", "dataset.num_eval=10")
        loaded = data.load(
            load("dataset=file", f"dataset.train_path={file}", *sizes).dataset, tokenizer
        )
        return [set(part["prompt_text"]) for part in (loaded.train, loaded.held_out)]

    (train, held_out), (_, again) = prompts(rows), prompts(rows[::-1])
    assert held_out == again
    places = [at for at, row in enumerate(rows) if any(row["prompt"] in text for text in train)]
    assert len(places) == 20
    assert places[0] < 20 <= 40 < places[-1]


def test_without_a_number_a_split_to_evaluate_on_is_read_up_to_the_usual_one(
    load: Load, tokenizer: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": f"take {a}.", "chosen": "3", "rejected": "4"} for a in range(300)]
    file = write_rows(tmp_path / "eval.jsonl", rows)
    settings = load(
        *("dataset=file", f"dataset.train_path={write_rows(tmp_path / 'rows.jsonl', GOOD)}"),
        f"dataset.eval_path={file}",
    ).dataset
    loaded = data.load(settings, tokenizer)
    assert (len(loaded.train), len(loaded.held_out)) == (40, 256)


GOOD = [{"prompt": f"add {a} and 2.", "chosen": str(a + 2), "rejected": "0"} for a in range(40)]
LONG_ROWS = [{**row, "prompt": "so, well, " * 40 + row["prompt"]} for row in GOOD]


@pytest.mark.parametrize("given", [True, False], ids=["given", "held_out"])
def test_good_pairs_are_drawn_and_the_report_counts_every_row(
    load: Load, tokenizer: Any, tmp_path: Path, given: bool
) -> None:
    # Two of three rows do not fit, which only tokenizing shows
    rows = [
        row for a in range(30) for row in (LONG_ROWS[a], GOOD[a], {**LONG_ROWS[a], "chosen": "1"})
    ]
    held_out = [{**row, "prompt": f"take {row['prompt']}"} for row in rows]
    overrides = [f"dataset.train_path={write_rows(tmp_path / 'rows.jsonl', rows)}"]
    if given:
        overrides.append(f"dataset.eval_path={write_rows(tmp_path / 'eval.jsonl', held_out)}")
    lengths = ("dataset.max_length=96", "dataset.max_prompt_length=64")
    settings = load(
        *("dataset=file", *overrides, *lengths, "dataset.num_train=12", "dataset.num_eval=8")
    ).dataset
    loaded, other = (data.load(replace(settings, num_proc=num), tokenizer) for num in (None, 2))
    assert (len(loaded.train), len(loaded.held_out)) == (12, 8)
    assert loaded.report == other.report
    for report in loaded.report.values():
        dropped = sum(entry["num"] for entry in report["dropped"].values())
        assert report["num_rows"] == report["num_kept"] + dropped
    total = sum(report["num_rows"] + report["num_not_drawn"] for report in loaded.report.values())
    assert total == 90 * (1 + given)
    assert not set(loaded.train["prompt_text"]) & set(loaded.held_out["prompt_text"])


def test_idle_cores_tokenize_only_where_each_has_enough_rows(tokenizer: Any, load: Load) -> None:
    encoder = Encoder(load().dataset, tokenizer, date.today(), num_idle=3)
    rows = (ROWS_PER_PROCESS, 2 * ROWS_PER_PROCESS, 9 * ROWS_PER_PROCESS)
    assert list(map(encoder._num_processes, rows)) == [None, 2, 3]
    assert Encoder(load().dataset, tokenizer, date.today())._num_processes(rows[-1]) is None


def test_a_row_behind_those_that_are_drawn_is_not_looked_at(
    load: Load, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    encode = Encoder.encode

    def count(self: Encoder, rows: list[Any]) -> None:
        seen.append(len(rows))
        encode(self, rows)

    monkeypatch.setattr(Encoder, "encode", count)
    settings = jsonl(load, write_rows(tmp_path / "rows.jsonl", GOOD), "dataset.num_train=10")
    assert len(data.load(settings, tokenizer).train) == 10
    assert seen == [10, 1]


def test_too_few_prompts_with_a_pair_that_fits_are_refused(
    load: Load, tokenizer: Any, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [*LONG_ROWS, *GOOD[:3]])
    lengths = ("dataset.max_length=96", "dataset.max_prompt_length=64")
    settings = load(
        *("dataset=file", f"dataset.train_path={file}", "dataset.num_eval=5", *lengths)
    ).dataset
    with pytest.raises(
        UserError, match=r"3 distinct prompts of \d+ whose pairs can be used .* are too"
    ):
        data.load(settings, tokenizer)


def test_prompts_that_held_out_pairs_use_up_are_said(
    load: Load, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [*LONG_ROWS[:36], *GOOD[36:40]])
    lengths = ("dataset.max_length=96", "dataset.max_prompt_length=64")
    given = ("dataset=file", f"dataset.train_path={file}", "dataset.num_eval=3", *lengths)
    found = data.load(load(*given).dataset, tokenizer)
    (said,) = (record.message for record in caplog.records if "are taken" in record.message)
    match = re.search(r"train: (\d+) of 40 distinct prompts are taken to hold out 3, since", said)
    assert match
    assert int(match[1]) + found.report["train"]["num_rows"] == 40
    assert len(found.held_out) == 3


def test_where_the_template_leaves_something_out_the_refusal_says_so(
    load: Load, tokenizer: Any, tmp_path: Path
) -> None:
    # As axolotl marks turns that are not learnt
    rows = [
        {**row, "prompt": [{"role": "user", "content": row["prompt"], "weight": 0}]}
        for row in GOOD[:8]
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    settings = load("dataset=file", f"dataset.train_path={file}", "dataset.num_eval=1").dataset
    with pytest.raises(UserError, match=r"whose pairs can be used \(not .*unrendered_text.*weight"):
        data.load(settings, tokenizer)


def test_many_rows_lost_to_their_lengths_are_a_warning_with_the_lengths_that_keep_them(
    load: Load, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [*LONG_ROWS[:39], GOOD[39]])
    data.load(jsonl(load, file), tokenizer)
    (said,) = [
        record.getMessage() for record in caplog.records if "too long" in record.getMessage()
    ]
    assert "train: 39 of 40 pairs (98 %) are too long" in said
    found = re.search(r"dataset.max_length=(\d+) dataset.max_prompt_length=(\d+) would keep", said)
    assert found is not None
    lengths = (f"dataset.max_length={found[1]}", f"dataset.max_prompt_length={found[2]}")
    caplog.clear()
    assert len(data.load(jsonl(load, file, *lengths), tokenizer).train) >= 38
    assert "too long" not in caplog.text


QUESTION, REPLY = [ASKED], [RIGHT]
NEXT = {"role": "user", "content": "and 3 more?"}


@pytest.mark.parametrize(
    ("train", "held_out", "how"),
    [
        ([*QUESTION, RIGHT, NEXT], QUESTION, "goes on from the prompt"),
        (QUESTION, [*QUESTION, RIGHT, NEXT], "begins the prompt"),
        ([{**ASKED, "content": "WHAT is 2 plus 2?"}, RIGHT, NEXT], QUESTION, "goes on from nearly"),
    ],
)
def test_a_conversation_that_quotes_an_answer_to_the_other_splits_prompt_is_a_leak(
    load: Load, tokenizer: Any, tmp_path: Path, train: Any, held_out: Any, how: str
) -> None:
    answers = {"chosen": [RIGHT], "rejected": [WRONG]}
    rows = [{"prompt": train, **answers}, {"prompt": [NEXT], **answers}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    other = write_rows(tmp_path / "eval.jsonl", [{"prompt": held_out, **answers}])
    settings = jsonl(load, file, f"dataset.eval_path={other}")
    (leak,) = data.load(settings, tokenizer).report["train"]["dropped"].items()
    assert leak[0].startswith("leaked_prompt")
    assert leak[1]["rows"] == [1]
    assert how in leak[1]["example"]


def test_columns_that_nothing_reads_are_named_and_those_that_matter_are_a_warning(
    load: Load, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{**row, "input": "7", "images": ["a.png"], "score": 5, "tags": []} for row in GOOD]
    file = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(rows).to_parquet(file)
    for source in (write_rows(tmp_path / "rows.jsonl", rows), file):
        caplog.clear()
        settings = jsonl(load, tmp_path / "x.jsonl", f"dataset.train_path={source}")
        report = data.load(settings, tokenizer).report["train"]
        assert {"input", "score"} <= set(report["unread_columns"])
        assert "What 'input' says is LOST" in caplog.text
        assert "What 'images' holds is LOST" in caplog.text
        assert "the better answer, whatever 'score' says" in caplog.text


@pytest.mark.parametrize("is_talk", [True, False])
def test_a_copy_of_the_conversation_is_not_called_lost(
    load: Load, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, is_talk: bool
) -> None:
    row: dict[str, Any] = {"prompt": "what is 2 plus 2?"}
    row |= {"chosen": "it is 4.", "rejected": "it is 5."}
    if is_talk:
        row |= {"chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG]}
    file = write_rows(tmp_path / "rows.jsonl", [{**row, "messages": [ASKED, RIGHT]}])
    report = data.load(jsonl(load, file), tokenizer).report["train"]
    assert report["unread_columns"] == ["messages"]
    assert ("What 'messages' says is LOST" in caplog.text) != is_talk


def test_the_default_template_asks_by_the_tokens_that_are_trained(
    load: Load, tokenizer: Any, tmp_path: Path
) -> None:
    without = copy.copy(tokenizer)
    without.chat_template = DEFAULT_CHAT_TEMPLATE
    rows = [{"prompt": [ASKED], "chosen": [RIGHT], "rejected": [WRONG]}]
    loaded = data.load(jsonl(load, write_rows(tmp_path / "rows.jsonl", rows)), without)
    asked = without.apply_chat_template([ASKED], add_generation_prompt=True)["input_ids"]
    assert loaded.train["prompt_ids"][0] == list(asked)
    assert asked[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("columns", [("question", "better", "worse")])
def test_columns_may_have_other_names(
    load: Load, tokenizer: Any, tmp_path: Path, columns: tuple[str, str, str]
) -> None:
    rows = [
        dict(zip(columns, (f"add {number} and 2.", "3", "4"), strict=True)) for number in range(2)
    ]
    overrides = [
        f"dataset.columns.{key}={name}"
        for key, name in zip(("prompt", "chosen", "rejected"), columns, strict=True)
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    settings = load(
        "dataset=jsonl", f"dataset.train_path={file}", "dataset.num_eval=1", *overrides
    ).dataset
    assert len(data.load(settings, tokenizer).train) == 1


@pytest.mark.parametrize("column", ["prompt_ids", "chosen_ids", "rejected_ids"])
def test_a_fingerprint_is_of_every_id_of_every_pair(column: str) -> None:
    pair = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}
    rows = [pair, {**pair, "prompt_ids": [6]}]
    other = [rows[0], {**rows[1], column: [7]}]
    found, changed = (fingerprint(datasets.Dataset.from_list(each)) for each in (rows, other))
    assert found != changed
    # Scores lie by number: the order counts too
    assert found != fingerprint(datasets.Dataset.from_list(rows[::-1]))
