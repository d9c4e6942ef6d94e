"""Answers of several turns: only the assistant's tokens are supervised, or those of its last turn.

Every text of a conversation is a word of its own, so a test asks which words are learnt.
"""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from orpo_lab import config, engine
from orpo_lab.config import Config
from orpo_lab.config.dataset import Dataset
from orpo_lab.data import part
from orpo_lab.data.encode import MASKS, Encoder, encode_row
from orpo_lab.data.pairs import Pair, find_faults
from orpo_lab.data.rows import Row
from orpo_lab.engine import mismatched
from orpo_lab.engine.base import COLUMNS
from orpo_lab.errors import UserError
from orpo_lab.evaluate import score
from tests.conftest import compose_config
from tests.test_data_render import (
    KINDS,
    TODAY,
    WRITTEN,
    assistant,
    come_to,
    user,
    with_template,
)
from tests.test_engine_shared_prefix import make_model, make_pairs, with_masks

CHATTY = KINDS["answers of turns"].pair
CALLING = KINDS["a result in the answer"].pair
# The words of the chosen answer that are the assistant's, and those that are not
SAID = {
    "answers of turns": (("answerone", "answergood"), ("questiontwo",)),
    "a result in the answer": (("paris", "answergood"), ("resulttext",)),
}


@pytest.fixture(scope="module")
def composed() -> Dataset:
    found = config.load(compose_config()).dataset
    return replace(found, max_length=1024, max_prompt_length=900)


def encoded(pair: Pair, settings: Dataset, tokenizer: Any) -> dict[str, Any]:
    row = {"pair": json.dumps([pair.prompt, pair.chosen, pair.rejected, pair.context, None])}
    return encode_row(row, dataset=settings, tokenizer=tokenizer, today=TODAY)


def learnt(found: dict[str, Any], tokenizer: Any, side: str = "chosen") -> str:
    """Return the text of the supervised tokens; what is left out between them is a bar."""
    text, was_learnt = "", True
    for token, is_learnt in zip(found[f"{side}_ids"], found[f"{side}_mask"], strict=True):
        if is_learnt:
            text += ("" if was_learnt else "|") + tokenizer.decode([token])
        was_learnt = is_learnt
    return text


def of_template(tokenizer: Any, name: str) -> Any:
    (file,) = [path for path in WRITTEN if path.stem == name]
    return with_template(tokenizer, file.read_text())


@pytest.mark.parametrize("file", WRITTEN, ids=lambda file: file.stem)
@pytest.mark.parametrize("kind", SAID)
def test_the_assistants_words_are_learnt_and_no_others_or_the_row_is_dropped(
    composed: Dataset, tokenizer: Any, file: Path, kind: str
) -> None:
    asked = with_template(tokenizer, file.read_text())
    if come_to(KINDS[kind], asked) != "right":
        pytest.skip("the template cannot render such rows")
    for which in ("assistant", "last"):
        settings = replace(composed, supervised=which)
        found = encoded(KINDS[kind].pair, settings, asked)
        assert json.loads(found["faults"]) == []
        said, others = SAID[kind]
        text = learnt(found, asked)
        assert [word for word in said if word in text] == list(said[which == "last" :])
        assert not any(word in text for word in others)
        # The end of a turn is learnt, and the beginning of another's turn is not
        end = asked.decode(found["chosen_ids"][-1:])
        assert text.endswith(end)
        assert "user" not in text
        assert "tool_response" not in text


def test_a_turn_is_learnt_from_behind_its_generation_prompt_to_its_end(
    composed: Dataset, tokenizer: Any
) -> None:
    settings = replace(composed, supervised="assistant")
    both = "answerone</s>|answergood</s>"
    assert learnt(encoded(CHATTY, settings, tokenizer), tokenizer) == both
    last = replace(composed, supervised="last")
    assert learnt(encoded(CHATTY, last, tokenizer), tokenizer) == "|answergood</s>"
    assert learnt(encoded(CHATTY, last, tokenizer), tokenizer, "rejected") == "|answerbad</s>"
    call = '<tool_call>\n{"name": "lookup", "arguments": {"place": "paris"}}\n</tool_call>'
    qwen = of_template(tokenizer, "qwen3")
    text = learnt(encoded(CALLING, settings, qwen), qwen)
    assert text == f"{call}<|im_end|>\n|<think>\n\n</think>\n\nanswergood<|im_end|>\n</s>"


def test_a_bos_that_is_put_in_front_moves_no_mask(composed: Dataset, tokenizer: Any) -> None:
    bare = with_template(tokenizer, str(tokenizer.chat_template).replace("bos_token", "''"))
    settings = replace(composed, supervised="assistant")
    assert encoded(CHATTY, settings, bare) == {
        **encoded(CHATTY, settings, tokenizer),
        "prompt_text": "<|user|>questionone<|assistant|>",
    }


def test_an_answer_of_one_turn_is_learnt_whole(composed: Dataset, tokenizer: Any) -> None:
    for pair in (KINDS["plain"].pair, Pair("2+2=", "4", "5")):
        for which in ("assistant", "last"):
            found = encoded(pair, replace(composed, supervised=which), tokenizer)
            assert all(found["chosen_mask"])
            assert len(found["rejected_mask"]) == len(found["rejected_ids"])
    found = encoded(CHATTY, composed, tokenizer)
    assert not set(MASKS) & set(found)


def test_neighbouring_messages_of_the_assistant_are_one_turn(
    composed: Dataset, tokenizer: Any
) -> None:
    pair = Pair([user("q")], [assistant("one"), assistant("two")], [assistant("three")])
    found = encoded(pair, replace(composed, supervised="last"), tokenizer)
    assert all(found["chosen_mask"])


def test_turns_that_cannot_be_told_apart_are_a_fault(composed: Dataset, tokenizer: Any) -> None:
    counted = copy.deepcopy(tokenizer)
    counted.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ).replace("<|{{ m.role }}|>", "<|{{ m.role }}|>{{ messages|length if loop.index == 2 }}")
    found = encoded(CHATTY, replace(composed, supervised="assistant"), counted)
    ((name, _),) = json.loads(found["faults"])
    assert name == "misrendered"


def test_a_cut_leaves_no_answer_without_a_supervised_token(
    composed: Dataset, tokenizer: Any
) -> None:
    last = replace(composed, supervised="last", overlong="cut_completion", max_prompt_length=9)
    whole = encoded(CHATTY, last, tokenizer)
    first = max(whole[mask].index(True) for mask in MASKS)
    num = len(whole["prompt_ids"]) + first
    found = encoded(CHATTY, replace(last, max_length=num), tokenizer)
    assert "no supervised token" in found["faults"]
    found = encoded(CHATTY, replace(last, max_length=num + 1), tokenizer)
    assert found["cut"]
    assert min(sum(found[mask]) for mask in MASKS) == 1


def test_a_turn_that_is_not_learnt_is_no_fault() -> None:
    special = re.compile("(?!)")
    assert [fault.name for fault in find_faults(CHATTY, special)] == ["other_turn_in_answer"]
    assert not list(find_faults(CHATTY, special, other_turns=False))


def test_tokens_of_the_held_out_pairs_are_left_out_of_every_figure(
    load: Callable[..., Config], tokenizer: Any
) -> None:
    pairs, model = with_masks(make_pairs(5)), make_model("llama").eval()
    scorer = engine.scorer(load(), model=model, tokenizer=tokenizer, dtype=torch.float32)
    found = score(scorer, datasets.Dataset.from_list(pairs), "test")
    for side, logps in (("chosen", found.chosen_logps), ("rejected", found.rejected_logps)):
        for pair, mean in zip(pairs, logps, strict=True):
            ids = torch.tensor([pair["prompt_ids"] + pair[f"{side}_ids"]])
            with torch.no_grad():
                all_logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            of_side = all_logps.gather(1, ids[0, 1:, None])[len(pair["prompt_ids"]) - 1 :, 0]
            expected = of_side[torch.tensor(pair[f"{side}_mask"])].mean()
            assert float(mean) == pytest.approx(float(expected), rel=1e-4)
    assert found.chosen_sizes.tolist() == [sum(pair["chosen_mask"]) for pair in pairs]


def test_mismatched_completions_keep_their_own_masks() -> None:
    pairs = datasets.Dataset.from_list(with_masks(make_pairs(4)))
    attached = mismatched._attached("train", pairs, 40)
    partners = mismatched.partners(pairs["prompt_ids"][:])
    referred = [{**row, "reference": [0.0] * 4} for row in attached]
    for found in (mismatched.all_of(attached), mismatched.of(referred)):
        for row, other in zip(found, partners, strict=True):
            for name in (*COLUMNS[1:], *MASKS):
                assert row[name] == pairs[other][name]


def test_the_fingerprint_is_of_the_masks_too(composed: Dataset, tokenizer: Any) -> None:
    def fingerprint(which: str) -> str:
        encoder = Encoder(replace(composed, supervised=which), tokenizer, TODAY)
        rows = [Row(0, CHATTY, {})]
        encoder.encode(rows)
        return part.fingerprint(encoder.encoded(rows))

    assert len(set(map(fingerprint, ("completion", "assistant", "last")))) == 3


def test_trls_step_supervises_the_whole_completion(load: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"dataset\.supervised=last needs engine=shared_prefix"):
        load("engine=trl", "dataset.supervised=last")
    with pytest.raises(UserError, match=r"dataset\.supervised=first must be one of"):
        load("dataset.supervised=first")
