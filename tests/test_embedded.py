"""The embedded data and the tiny model that was pretrained on it."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import orpo_lab.tiny
from orpo_lab.data import embedded
from orpo_lab.tiny import make

TINY = Path(orpo_lab.tiny.__file__).parent
Row = dict[str, Any]


def prompt_of(row: Row) -> str:
    return str(row["prompt"][0]["content"])


def completion_of(row: Row, side: str) -> str:
    return str(row[side][0]["content"])


def task_of(row: Row) -> tuple[str, ...]:
    """What a prompt asks about, however it is phrased and in whatever form it wants the answer."""
    text = prompt_of(row)
    for suffix in (" answer only.", " answer in square brackets."):
        text = text.removesuffix(suffix)
    if row["family"] == "count":
        return tuple(text.strip(".?").rpartition(": ")[2].split())
    return tuple(sorted(re.findall(r"\d+", text)))


@pytest.fixture(scope="module")
def train_rows() -> list[Row]:
    return embedded.pairs("train", num=4000, seed=0)


@pytest.fixture(scope="module")
def eval_rows() -> list[Row]:
    return embedded.pairs("eval", num=800, seed=0)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def test_no_held_out_content_is_in_the_training_split(
    train_rows: list[Row], eval_rows: list[Row]
) -> None:
    seen = {(row["family"], task_of(row)) for row in train_rows}
    seen |= {(r["family"], task_of(r)) for r in embedded.pairs("train", num=4000, seed=1)}
    assert not seen & {(row["family"], task_of(row)) for row in eval_rows}


def test_pairs_depend_on_split_num_and_seed_only() -> None:
    rows = embedded.pairs("train", num=50, seed=3)
    assert rows == embedded.pairs("train", num=50, seed=3)
    assert rows == embedded.pairs("train", num=80, seed=3)[:50]
    assert rows != embedded.pairs("train", num=50, seed=4)


def test_the_split_is_stable_across_processes_and_versions() -> None:
    first = embedded.pairs("eval", num=2, seed=0)
    assert [prompt_of(row) for row in first] == [
        "hello! a small question: add 15 and 7.",
        "hello! a small question: what is 16 plus 7? answer only.",
    ]


def test_prompts_are_distinct_and_wordings_are_half_and_half(eval_rows: list[Row]) -> None:
    assert len({prompt_of(row) for row in eval_rows}) == len(eval_rows)
    assert Counter(row["wording"] for row in eval_rows) == {"free": 400, "terse": 400}
    assert {row["family"] for row in eval_rows} == set(embedded.FAMILIES)


def test_a_prompt_has_one_wrong_answer_whatever_the_seed() -> None:
    wrong: dict[str, str] = {}
    shared = 0
    for seed in range(8):
        for row in embedded.pairs("eval", num=600, seed=seed):
            answer = completion_of(row, "rejected")
            if row["wording"] == "free":
                answer = answer.split()[-1]
            shared += prompt_of(row) in wrong
            assert wrong.setdefault(prompt_of(row), answer) == answer
    assert shared > 100


def test_chosen_and_rejected_are_equally_long(tokenizer: Any, train_rows: list[Row]) -> None:
    for row in train_rows[:1000]:
        chosen, rejected = completion_of(row, "chosen"), completion_of(row, "rejected")
        assert len(chosen.split()) == len(rejected.split())
        assert len(tokenizer(chosen)["input_ids"]) == len(tokenizer(rejected)["input_ids"])


def test_chosen_is_correct_and_rejected_is_not(train_rows: list[Row], eval_rows: list[Row]) -> None:
    for row in train_rows + eval_rows:
        assert embedded.is_correct(completion_of(row, "chosen"), row)
        assert not embedded.is_correct(completion_of(row, "rejected"), row)


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "13",
        "so, well, it is 13",
        "so, well, it is 13. it is 13.",
        "so, well, it is 3.",
        "so, it is 13.",
        "so, well, now, it is 13.",
        "so, banana, it is 13.",
        "so, well, it is it is 13.",
        "so, well, it is 13 or 14.",
    ],
)
def test_a_free_answer_must_be_one_well_formed_sentence(completion: str) -> None:
    row = {"answer": "13", "wording": "free"}
    assert embedded.is_correct("so, well, it is 13.", row)
    assert not embedded.is_correct(completion, row)


@pytest.mark.parametrize(
    "completion", ["", "13", "(13)", "[13", "[13]]", "[13] [13]", "it is [13]"]
)
def test_a_terse_answer_must_be_exact(completion: str) -> None:
    row = {"answer": "[13]", "wording": "terse"}
    assert embedded.is_correct("[13]", row)
    assert not embedded.is_correct(completion, row)


@pytest.mark.parametrize(("split", "num"), [("train", 10**6), ("eval", 10**5), ("eval", 0)])
def test_an_impossible_number_of_pairs_names_the_key_to_change(split: Any, num: int) -> None:
    with pytest.raises(ValueError, match=f"dataset.num_{split}"):
        embedded.pairs(split, num=num, seed=0)


def test_prompt_tokens_are_a_prefix_of_the_dialogues_tokens(
    tokenizer: Any, eval_rows: list[Row]
) -> None:
    for row in eval_rows[:200]:
        for side in ("chosen", "rejected"):
            prompt = tokenizer.apply_chat_template(
                row["prompt"], add_generation_prompt=True, tokenize=False
            )
            full = tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
            prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            full_ids = tokenizer(full, add_special_tokens=False)["input_ids"]
            assert full_ids[: len(prompt_ids)] == prompt_ids
            assert full_ids[0] == tokenizer.bos_token_id
            assert full_ids[-1] == tokenizer.eos_token_id
            assert full_ids.count(tokenizer.bos_token_id) == 1


def test_the_template_takes_system_turns_and_refuses_unknown_roles(tokenizer: Any) -> None:
    turns = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "bye"},
    ]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert text == "<s><|system|>be kind<|user|>hello<|assistant|>hi</s><|user|>bye<|assistant|>"
    with pytest.raises(Exception, match="roles are system, user and assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


@pytest.mark.parametrize("text", ["Hello, World! 3.14", "naïve 東京 🙂\n\ttab", "  two  spaces  "])
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_special_tokens_are_distinct(tokenizer: Any) -> None:
    ids = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert len(ids) == 3


@pytest.mark.slow
def test_the_tokenizer_is_the_one_the_script_makes(tokenizer: Any) -> None:
    made = json.loads(make.make_tokenizer().backend_tokenizer.to_str())
    assert made["model"] == json.loads((TINY / "tokenizer.json").read_text())["model"]


def test_the_committed_model_is_small_and_fits_nf4_blocks(model: Any) -> None:
    assert (TINY / "model.safetensors").stat().st_size <= 8_000_000
    assert 1_000_000 <= model.num_parameters() <= 3_000_000
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            assert module.in_features % 64 == 0
            assert module.out_features % 64 == 0


@pytest.mark.slow
def test_the_base_model_is_indifferent_and_competent(
    model: Any, tokenizer: Any, eval_rows: list[Row]
) -> None:
    rows = eval_rows[:400]
    with torch.no_grad():
        chosen = make.mean_logps(model, tokenizer, rows, "chosen")
        rejected = make.mean_logps(model, tokenizer, rows, "rejected")
        answers = make.generate(model, tokenizer, rows)
    assert 0.4 <= (chosen > rejected).float().mean().item() <= 0.6
    right = sum(map(embedded.is_correct, answers, rows))
    decisive = [completion_of(row, "rejected").split()[-1] for row in rows]
    wrong = sum(answer.split()[-1:] == [end] for answer, end in zip(answers, decisive, strict=True))
    assert right / len(rows) <= 0.6
    assert (right + wrong) / len(rows) >= 0.9
