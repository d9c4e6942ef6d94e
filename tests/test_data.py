"""From rows to token ids: what TRL does with rows that fit, and what happens to the others."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from orpo_lab import config, data
from orpo_lab.data.encode import fit, render, tokenize
from orpo_lab.data.pairs import Pair, split
from orpo_lab.errors import UserError

ASKED = {"role": "user", "content": "what is 2 plus 2?"}
RIGHT = {"role": "assistant", "content": "it is 4."}
WRONG = {"role": "assistant", "content": "it is 5."}
WHERE = "rows, row 0"

Load = Callable[..., config.Config]


def write_rows(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def jsonl(load: Load, file: Path, *overrides: str) -> config.Dataset:
    return load(
        "dataset=jsonl",
        f"dataset.train_path={file}",
        f"dataset.eval_path={file}",
        "dataset.max_length=96",
        "dataset.max_prompt_length=64",
        *overrides,
    ).dataset


def test_the_prompt_is_what_both_conversations_share() -> None:
    pair = split("what is 2 plus 2?", [ASKED, RIGHT], [ASKED, WRONG], WHERE)
    assert pair == Pair([ASKED], [RIGHT], [WRONG])
    assert split(None, [ASKED, RIGHT], [ASKED, WRONG], WHERE) == pair


def test_a_prompt_column_that_contradicts_the_messages_is_counted() -> None:
    assert split("what is 3 plus 3?", [ASKED, RIGHT], [ASKED, WRONG], WHERE).contradicted


def test_whole_conversations_outrank_an_explicit_prompt_that_contradicts_them() -> None:
    other = [{"role": "user", "content": "what is 3 plus 3?"}]
    pair = split(other, [ASKED, RIGHT], [ASKED, WRONG], WHERE)
    assert pair == Pair([ASKED], [RIGHT], [WRONG], contradicted=True)


def test_explicit_prompts_stay_as_they_are() -> None:
    assert split([ASKED], [RIGHT], [WRONG], WHERE) == Pair([ASKED], [RIGHT], [WRONG])
    assert split("2+2=", "4", "5", WHERE) == Pair("2+2=", "4", "5")
    assert split("2+2?", [RIGHT], [WRONG], WHERE).prompt == [{"role": "user", "content": "2+2?"}]


def test_a_prompt_repeated_in_both_answers_is_trained_once() -> None:
    assert split("2+2=", "2+2=4", "2+2=5", WHERE) == Pair("2+2=", "4", "5", repeated=True)
    pair = split([ASKED], [ASKED, RIGHT], [ASKED, WRONG], WHERE)
    assert pair == Pair([ASKED], [RIGHT], [WRONG], repeated=True)


def test_identical_conversations_keep_their_last_turn_as_completion() -> None:
    assert split(None, [ASKED, RIGHT], [ASKED, RIGHT], WHERE) == Pair([ASKED], [RIGHT], [RIGHT])


def test_an_implicit_plain_prompt_is_cut_as_trl_cuts_it() -> None:
    from trl.data_utils import maybe_extract_prompt

    row = {"chosen": "Q: 2+2? A: four", "rejected": "Q: 2+2? A: five"}
    theirs = maybe_extract_prompt(row)
    ours = split(None, row["chosen"], row["rejected"], WHERE)
    assert (ours.prompt, ours.chosen, ours.rejected) == tuple(
        theirs[key] for key in ("prompt", "chosen", "rejected")
    )


def test_a_string_beside_messages_is_refused() -> None:
    with pytest.raises(UserError, match="row 0: chosen and rejected must both be"):
        split(None, "text", [ASKED, WRONG], WHERE)


def test_bos_and_eos_stand_once_and_the_generation_prompt_once(tokenizer: Any) -> None:
    prompt, chosen, rejected = tokenize(
        *render(Pair([ASKED], [RIGHT], [WRONG]), tokenizer), tokenizer
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

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            ids, vocabulary = [], {"ab": 3, "a": 1, "b": 2, "c": 4}
            while text:
                word = next(word for word in vocabulary if text.startswith(word))
                ids.append(vocabulary[word])
                text = text[len(word) :]
            return {"input_ids": ids}

    tokenizer: Any = Merging()
    assert tokenize("ca", "b", "c", tokenizer) == ([4], [3, 0], [1, 4, 0])


PROMPT, LONG, SHORT = list(range(1, 11)), list(range(20, 32)), list(range(40, 44))


@pytest.mark.parametrize(
    ("overlong", "max_length", "max_prompt_length", "expected"),
    [
        ("drop", 22, 10, ((PROMPT, LONG, SHORT), "", False)),
        ("drop", 21, 10, (None, "pair_too_long", False)),
        ("drop", 40, 9, (None, "prompt_too_long", False)),
        ("cut_prompt", 40, 6, (([1, 6, 7, 8, 9, 10], LONG, SHORT), "", True)),
        ("cut_prompt", 15, 10, (([1, 9, 10], LONG, SHORT), "", True)),
        ("cut_prompt", 13, 10, (None, "pair_too_long", False)),
        ("cut_completion", 16, 10, ((PROMPT, LONG[:6], SHORT), "", True)),
        ("cut_completion", 16, 9, (None, "prompt_too_long", False)),
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
    ids, fault, cut = fit(PROMPT, LONG, SHORT, settings)
    assert (fault, cut) == expected[1:]
    if expected[0]:
        assert ids == expected[0]
        assert all(ids)


def test_a_cut_that_makes_both_sides_equal_drops_the_pair(load: Load) -> None:
    settings = load(
        "dataset.overlong=cut_completion", "dataset.max_length=12", "dataset.max_prompt_length=10"
    ).dataset
    assert fit(PROMPT, [1, 2, 3], [1, 2, 4], settings)[1] == "chosen_equals_rejected_after_cut"


def test_every_fault_is_counted_with_its_rows(load: Load, tokenizer: Any, tmp_path: Path) -> None:
    good = {"prompt": "add 1 and 2.", "chosen": "3", "rejected": "4"}
    rows = [
        good,
        {**good, "prompt": "count " * 200},
        {**good, "chosen": "  "},
        {**good, "rejected": "3"},
        {**good, "prompt": ""},
        {**good, "chosen": "add 1 and 2.3", "rejected": "add 1 and 2.4"},
    ]
    loaded = data.load(jsonl(load, write_rows(tmp_path / "rows.jsonl", rows)), tokenizer)
    report = loaded.report["train"]
    assert report["num_rows"] == 6
    assert report["num_kept"] == len(loaded.train) == 2
    assert report["dropped"] == {
        "prompt_too_long": {"num": 1, "rows": [1]},
        "empty_completion": {"num": 1, "rows": [2]},
        "chosen_equals_rejected": {"num": 1, "rows": [3]},
        "empty_prompt": {"num": 1, "rows": [4]},
    }
    assert report["num_repeated_prompts"] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no rows"),
        ('{"prompt": "a", "chosen": "b"}\n', "line 1 lacks column 'rejected'"),
        ("null\n", "line 1 holds null, not an object"),
        ("5\n", "line 1 holds 5, not an object"),
        ('{"prompt": "a", "chosen": "b", "rejected": null}\n', "line 1: rejected is null"),
        ('{"prompt": "a", "chosen": 3, "rejected": "c"}\n', "line 1: chosen is of type int"),
        ('{"prompt": "a", "chosen": [{}], "rejected": "c"}\n', "without a role and a content"),
        ('{"prompt": "a"', "line 1 is not JSON"),
        (
            '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
            '{"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "c"}\n',
            "rows differ in their form",
        ),
        ('{"prompt": "", "chosen": "b", "rejected": "c"}\n', "no train pair is left of 1"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(
    load: Load, tokenizer: Any, tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    with pytest.raises(UserError) as refusal:
        data.load(jsonl(load, file), tokenizer)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_missing_file_is_refused(load: Load, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.jsonl cannot be read"):
        data.load(jsonl(load, tmp_path / "nowhere.jsonl"), tokenizer)


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


ULTRAFEEDBACK = [
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
    for i in range(20)
]


def test_a_folder_laid_out_like_ultrafeedback_loads(
    load: Load, tokenizer: Any, tmp_path: Path
) -> None:
    folder = hub_folder(tmp_path / "uf", train_prefs=ULTRAFEEDBACK, test_prefs=ULTRAFEEDBACK[:5])
    settings = load("dataset=ultrafeedback", f"dataset.path={folder}", "dataset.num_proc=2").dataset
    loaded = data.load(settings, tokenizer)
    assert len(loaded.train) == 20
    assert len(loaded.held_out) == 5
    assert tokenizer.decode(loaded.train[3]["chosen_ids"], skip_special_tokens=True) == "5"


def test_one_split_is_divided_by_prompt(load: Load, tokenizer: Any, tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "uf", train=ULTRAFEEDBACK * 2)
    settings = load(
        "dataset=ultrafeedback_cleaned", f"dataset.path={folder}", "dataset.num_eval=6"
    ).dataset
    loaded = data.load(settings, tokenizer)
    train, held_out = (set(one["prompt_text"]) for one in (loaded.train, loaded.held_out))
    assert not train & held_out
    assert len(loaded.held_out) == 6
    # Six prompts are held out, and with them both rows of each
    assert len(loaded.train) == 28


def test_too_few_prompts_to_hold_out_are_refused(
    load: Load, tokenizer: Any, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    settings = load("dataset=jsonl", f"dataset.train_path={file}").dataset
    with pytest.raises(UserError, match="too few to hold out"):
        data.load(settings, tokenizer)


@pytest.mark.parametrize("columns", [("question", "better", "worse")])
def test_columns_may_have_other_names(
    load: Load, tokenizer: Any, tmp_path: Path, columns: tuple[str, str, str]
) -> None:
    row = dict(zip(columns, ("add 1 and 2.", "3", "4"), strict=True))
    overrides = [
        f"dataset.columns.{key}={name}"
        for key, name in zip(("prompt", "chosen", "rejected"), columns, strict=True)
    ]
    file = write_rows(tmp_path / "rows.jsonl", [row])
    assert len(data.load(jsonl(load, file, *overrides), tokenizer).train) == 1


@pytest.mark.parametrize(
    "name", ["chat_pairs/multiturn", "chat_pairs/test_prefs", "math_pairs/test"]
)
def test_real_rows_load_and_the_report_adds_up(
    load: Load, tokenizer: Any, assets: Path, name: str
) -> None:
    settings = jsonl(
        load,
        assets / "data" / f"{name}.jsonl",
        "dataset.max_length=4096",
        "dataset.max_prompt_length=2048",
        "dataset.overlong=cut_prompt",
    )
    loaded = data.load(settings, tokenizer)
    report = loaded.report["train"]
    dropped = sum(entry["num"] for entry in report["dropped"].values())
    assert report["num_kept"] == len(loaded.train) == report["num_rows"] - dropped
    assert len(loaded.train) >= 0.6 * report["num_rows"]
