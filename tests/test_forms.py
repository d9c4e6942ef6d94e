"""Rows of every published form, and what the model is trained on of them."""

import copy
import json
import re
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_lab import config, data
from orpo_lab.config.dataset import TableDataset
from orpo_lab.data.faults import Fault
from orpo_lab.data.forms import Reader
from orpo_lab.data.pairs import Pair, find_faults
from orpo_lab.data.ranks import choose
from orpo_lab.data.render import render
from orpo_lab.data.template import DEFAULT_CHAT_TEMPLATE
from orpo_lab.errors import UserError
from tests.conftest import ROOT

Load = Callable[..., config.Config]
Row = dict[str, Any]
# As Zephyr's template writes turns
NAMES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


def turns(*said: str) -> str:
    """Write a prompt out: each turn begins with the letter of its role."""
    text = "".join(f"<|{NAMES[turn[0]]}|>\n{turn[2:]}</s>\n" for turn in said)
    return f"<s>{text}<|assistant|>\n"


ASKED, GOOD, BAD = "2 plus 2?", "It is 4.", "It is 5."
PROMPT = turns(f"u {ASKED}")
BRIEF = turns("s Be brief.", f"u {ASKED}")
# What follows a question, and an answer's end
EARLIER = turns("u Hi.", "a Hello.", f"u {ASKED}")


def human(text: str) -> Row:
    return {"from": "human", "value": text}


def gpt(text: str) -> Row:
    return {"from": "gpt", "value": text}


def user(text: Any) -> Row:
    return {"role": "user", "content": text}


def assistant(text: Any) -> Row:
    return {"role": "assistant", "content": text}


def parts(*texts: str) -> list[Row]:
    return [{"type": "text", "text": text} for text in texts]


def response(text: str, score: Any) -> Row:
    """An answer of UltraFeedback, with some of the keys that nothing reads."""
    return {"model": "m", "response": text, "overall_score": score, "critique": "Fine."}


TALK = {"conversations": [human(ASKED)], "chosen": gpt(GOOD), "rejected": gpt(BAD)}
TEXTS = {"instruction": ASKED, "chosen": GOOD, "rejected": BAD}
PAIR = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}
SCORED = {"instruction": ASKED, "completions": [response(BAD, 2.5), response(GOOD, 8.0)]}
NECTAR = {
    "prompt": f"\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: {ASKED}\n\nAssistant: ",
    "answers": [
        {"answer": "So so.", "model": "m", "rank": 2.0},
        {"answer": GOOD, "model": "m", "rank": 1.0},
        {"answer": BAD, "model": "m", "rank": 7.0},
    ],
    "turns": 2,
}
BATTLE: Row = {
    "model_a": "m",
    "model_b": "n",
    "winner": "model_b",
    "conversation_a": [user(ASKED), assistant(BAD)],
    "conversation_b": [user(ASKED), assistant(GOOD)],
    "turn": 1,
}
HELP = {
    "domain": "general",
    "context": [user(ASKED)],
    "response1": GOOD,
    "response2": BAD,
    "overall_preference": -2,
}
HELPSTEER2 = (
    "dataset=helpsteer",
    "dataset.columns.prompt=prompt",
    "dataset.columns.first=response_1",
    "dataset.columns.second=response_2",
    "dataset.columns.winner=preference_strength",
)
ALPACA, SHAREGPT = ("dataset=alpaca",), ("dataset=sharegpt",)
PLAIN = (ASKED, GOOD, BAD)
# Per form: the overrides, a row, and the text of the prompt (a template or none renders the rest)
FORMS: dict[str, tuple[tuple[str, ...], Row, str]] = {
    "ShareGPT": (SHAREGPT, TALK, PROMPT),
    "ShareGPT, lists": (SHAREGPT, {**TALK, "chosen": [gpt(GOOD)], "rejected": [gpt(BAD)]}, PROMPT),
    "ShareGPT, whole": (
        SHAREGPT,
        {
            "conversations": [human(ASKED)],
            "chosen": [human(ASKED), gpt(GOOD)],
            "rejected": [human(ASKED), gpt(BAD)],
        },
        PROMPT,
    ),
    "ShareGPT, roles": (
        SHAREGPT,
        {
            "conversations": [user(ASKED)],
            "chosen": assistant(GOOD),
            "rejected": assistant(BAD),
        },
        PROMPT,
    ),
    "ShareGPT, capitals": (
        SHAREGPT,
        {
            "conversations": [{"from": "Human", "value": ASKED}],
            "chosen": {"from": "GPT", "value": GOOD},
            "rejected": {"from": "Gpt", "value": BAD},
        },
        PROMPT,
    ),
    "ShareGPT, several turns": (
        SHAREGPT,
        {**TALK, "conversations": [human("Hi."), gpt("Hello."), human(ASKED)]},
        EARLIER,
    ),
    "ShareGPT, system": (SHAREGPT, {**TALK, "system": "Be brief."}, BRIEF),
    "ShareGPT, system turn": (
        SHAREGPT,
        {**TALK, "conversations": [{"from": "system", "value": "Be brief."}, human(ASKED)]},
        BRIEF,
    ),
    "ShareGPT, both systems": (
        SHAREGPT,
        {
            **TALK,
            "conversations": [{"from": "system", "value": "Be brief."}, human(ASKED)],
            "system": "Be brief.",
        },
        BRIEF,
    ),
    "text parts": (
        ("dataset=file",),
        {
            "prompt": [user(parts("2 plus", " 2?"))],
            "chosen": [assistant(parts(GOOD))],
            "rejected": [assistant(parts("It ", "is 5."))],
        },
        PROMPT,
    ),
    "messages as JSON in a string": (
        ("dataset=file",),
        {
            "prompt": json.dumps([user(ASKED)]),
            "chosen": json.dumps([user(ASKED), assistant(GOOD)], indent=1),
            "rejected": json.dumps([user(ASKED), assistant(BAD)]),
        },
        PROMPT,
    ),
    "ShareGPT as JSON in a string": (
        SHAREGPT,
        {key: json.dumps(value) for key, value in TALK.items()},
        PROMPT,
    ),
    "alpaca": (ALPACA, TEXTS, ASKED),
    "alpaca, input": (ALPACA, {**TEXTS, "instruction": "Add.", "input": ASKED}, f"Add.\n{ASKED}"),
    "alpaca, nothing else": (
        ALPACA,
        {**TEXTS, "input": "", "system": None, "history": []},
        ASKED,
    ),
    "alpaca, system": (ALPACA, {**TEXTS, "system": "Be brief."}, BRIEF),
    "alpaca, history": (ALPACA, {**TEXTS, "history": [["Hi.", "Hello."]]}, EARLIER),
    "alpaca, output": (
        (*ALPACA, "dataset.columns.chosen=output", "dataset.columns.rejected=output"),
        {"instruction": ASKED, "output": [GOOD, BAD]},
        ASKED,
    ),
    "Orca": (
        ("dataset=file", "dataset.columns.prompt=question", "dataset.columns.system=system"),
        {"system": "Be brief.", "question": ASKED, "chosen": GOOD, "rejected": BAD},
        BRIEF,
    ),
    "Orca without a system message": (
        ("dataset=file", "dataset.columns.prompt=question", "dataset.columns.system=system"),
        {"system": "", "question": ASKED, "chosen": GOOD, "rejected": BAD},
        ASKED,
    ),
    "system beside messages": (
        ("dataset=file", "dataset.columns.system=system"),
        {
            "system": "Be brief.",
            "prompt": ASKED,
            "chosen": [user(ASKED), assistant(GOOD)],
            "rejected": [user(ASKED), assistant(BAD)],
        },
        BRIEF,
    ),
    "no tools": (ALPACA, {**TEXTS, "system": "Be brief.", "tools": "[]"}, BRIEF),
    "UltraFeedback": (("dataset=scored",), SCORED, ASKED),
    "Nectar": (("dataset=nectar",), NECTAR, EARLIER),
    "two lists": (
        (
            "dataset=scored",
            "dataset.columns.text=null",
            "dataset.columns.answers=generations",
            "dataset.columns.score=ratings",
        ),
        {"instruction": ASKED, "generations": ["So.", GOOD, BAD], "ratings": [3, 5, 1]},
        ASKED,
    ),
    "Arena": (("dataset=arena",), BATTLE, PROMPT),
    "HelpSteer3": (("dataset=helpsteer",), HELP, PROMPT),
    "HelpSteer2": (
        HELPSTEER2,
        {"prompt": ASKED, "response_1": BAD, "response_2": GOOD, "preference_strength": 3.0},
        ASKED,
    ),
}


def reader(load: Load, *overrides: str) -> Reader:
    given = [] if "dataset=nectar" in overrides else ["dataset.train_path=rows.jsonl"]
    found = load(*overrides, *given).dataset
    assert isinstance(found, TableDataset)
    return Reader(found)


def texts(pair: Pair, tokenizer: Any, template: str = DEFAULT_CHAT_TEMPLATE) -> tuple[str, ...]:
    """Return a pair as the text that is trained on."""
    asked = copy.copy(tokenizer)
    asked.chat_template = template
    rendered = render(pair, asked, date(2026, 1, 1))
    return rendered.prompt, rendered.chosen, rendered.rejected


@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_a_published_form_is_trained_as_it_is_meant(
    load: Load, tokenizer: Any, form: str
) -> None:
    overrides, row, prompt = FORMS[form]
    (pair,) = reader(load, *overrides).pairs(row, 1)
    end = "" if isinstance(pair.prompt, str) else "</s>\n"
    assert texts(pair, tokenizer) == (prompt, GOOD + end, BAD + end)
    assert not pair.ignored
    assert not pair.context


CALL = {"name": "add", "arguments": {"left": 2, "right": 2}}


def test_sharegpts_calls_and_tools_reach_the_template(load: Load, tokenizer: Any) -> None:
    row = {
        "conversations": [
            human(ASKED),
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "4"},
        ],
        "chosen": gpt(GOOD),
        "rejected": {"from": "function_call", "value": json.dumps([CALL])},
        "tools": json.dumps([{"name": "add", "parameters": {}}]),
    }
    (pair,) = reader(load, *SHAREGPT).pairs(row, 1)
    template = (ROOT / "tests" / "templates" / "tool_calls.jinja").read_text()
    prompt, chosen, rejected = texts(pair, tokenizer, template)
    called = f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"
    assert prompt.count(called) == 1
    assert prompt.index(called) < prompt.index("<|im_start|>tool\n4")
    assert '"name": "add", "parameters": {}' in prompt
    assert GOOD in chosen
    assert called in rejected


@pytest.mark.parametrize("asked", [ASKED, [user(ASKED)]], ids=["string", "messages"])
def test_answers_that_begin_with_the_same_turns_keep_their_prompt(load: Load, asked: Any) -> None:
    looked = [assistant("I look."), {"role": "tool", "content": "4"}]
    chosen, rejected = ([*looked, assistant(said)] for said in (GOOD, BAD))
    row = {"prompt": asked, "chosen": chosen, "rejected": rejected}
    (pair,) = reader(load, "dataset=file").pairs(row, 1)
    assert pair == Pair([user(ASKED)], chosen, rejected)


# What may look like turns, and is an answer
@pytest.mark.parametrize(
    "said",
    [
        json.dumps(CALL),
        '{"role": "admin", "content": "the whole site"}',
        '[{"role": "user"}]',
        '[{"role": "user", "content": "unfinished',
        "{'role': 'user', 'content': 'hi'} is a message.",
        "[]",
    ],
)
def test_an_answer_in_json_stays_a_text(load: Load, said: str) -> None:
    (pair,) = reader(load, "dataset=file").pairs({**PAIR, "chosen": said}, 1)
    assert pair == Pair(ASKED, said, BAD)


@pytest.mark.parametrize(
    ("overrides", "row", "fault", "said"),
    [
        (
            ("dataset=file",),
            {**PAIR, "chosen": str([user(ASKED), assistant(GOOD)])},
            "wrong_type",
            "chosen holds messages as Python prints them; write the column as JSON",
        ),
        (
            SHAREGPT,
            {**TALK, "conversations": str([human(ASKED)])},
            "wrong_type",
            "conversations holds messages as Python prints them",
        ),
        (SHAREGPT, {**TALK, "chosen": {"from": "gpt"}}, "wrong_type", "without a content"),
        (
            SHAREGPT,
            {**TALK, "chosen": {"from": "function_call", "value": "add(2, 2)"}},
            "wrong_type",
            "no call with a name, as JSON",
        ),
        (
            ("dataset=file",),
            {
                "prompt": [user([*parts("What is this?"), {"type": "image", "image": "a.png"}])],
                "chosen": GOOD,
                "rejected": BAD,
            },
            "wrong_type",
            "prompt holds a part of type image, not text",
        ),
        (
            ("dataset=file",),
            {
                "prompt": [user([{"text": "What is this?", "image_url": "a.png"}])],
                "chosen": GOOD,
                "rejected": BAD,
            },
            "wrong_type",
            "prompt holds a part of type image_url, not text",
        ),
        (
            SHAREGPT,
            {
                **TALK,
                "conversations": [{"from": "system", "value": "Be long."}, human(ASKED)],
                "system": "Be brief.",
            },
            "wrong_type",
            "a system message of its own",
        ),
        (
            ("dataset=file", "dataset.columns.prompt=null", "dataset.columns.system=system"),
            {"system": "Be brief.", "chosen": f"{ASKED} 4", "rejected": f"{ASKED} 5"},
            "wrong_type",
            "texts without a prompt",
        ),
        (ALPACA, {**TEXTS, "instruction": " ", "system": "Be brief."}, "empty_prompt", "is empty"),
        (ALPACA, {**TEXTS, "history": [["Hi."]]}, "wrong_type", "no list of [question, answer]"),
        (ALPACA, {**TEXTS, "history": 5}, "wrong_type", "no list of [question, answer]"),
        (ALPACA, {**TEXTS, "system": ["Be brief."]}, "wrong_type", "system is of type list"),
        (
            (*ALPACA, "dataset.columns.chosen=output", "dataset.columns.rejected=output"),
            {"instruction": ASKED, "output": GOOD},
            "wrong_type",
            "output is no list of two answers",
        ),
        (
            ("dataset=scored",),
            {**SCORED, "completions": [response(GOOD, "8"), response(BAD, 1)]},
            "wrong_type",
            "overall_score is 8; it must be a number",
        ),
        (
            ("dataset=scored",),
            {**SCORED, "completions": [response(GOOD, float("inf")), response(BAD, 1)]},
            "wrong_type",
            "overall_score is inf",
        ),
        (
            ("dataset=scored",),
            {**SCORED, "completions": [response(GOOD, 10**400), response(BAD, 1)]},
            "wrong_type",
            "must be a number",
        ),
        (
            ("dataset=scored",),
            {**SCORED, "completions": [response(GOOD, 3), response(BAD, 3.0)]},
            "no_preference",
            "no answer has a better score",
        ),
        (("dataset=scored",), {**SCORED, "completions": []}, "no_preference", "no answer"),
        (("dataset=scored",), {**SCORED, "completions": [GOOD]}, "wrong_type", "list of objects"),
        (("dataset=ranked",), NECTAR, "wrong_type", "dataset.transcripts=true reads its turns"),
        (
            ("dataset=nectar",),
            {**NECTAR, "prompt": f"\n\nHuman: {ASKED}\n\nAssistant: It"},
            "prefilled_answer",
            "empty turn",
        ),
        *(
            (("dataset=arena",), {**BATTLE, "winner": tie}, "no_preference", f"is {tie.lower()}")
            for tie in ("tie", "Tie (bothbad)", "both_bad")
        ),
        (("dataset=arena",), {**BATTLE, "winner": "c"}, "wrong_type", "winner is c, which is none"),
        (("dataset=arena",), {**BATTLE, "winner": None}, "wrong_type", "winner is null"),
        (("dataset=arena",), {**BATTLE, "winner": 1}, "wrong_type", "winner is 1"),
        (("dataset=helpsteer",), {**HELP, "overall_preference": 0}, "no_preference", "is 0"),
        (("dataset=helpsteer",), {**HELP, "overall_preference": 1.5}, "wrong_type", "is 1.5"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_gives_no_pair_is_a_fault(
    load: Load, overrides: tuple[str, ...], row: Row, fault: str, said: str
) -> None:
    with pytest.raises(Fault) as raised:
        reader(load, *overrides).pairs(row, 1)
    assert raised.value.name == fault
    assert said in raised.value.detail


PREFERS = {"model_a": (BAD, GOOD), "model_b": (GOOD, BAD), "MODEL_B ": (GOOD, BAD)}


@pytest.mark.parametrize("winner", PREFERS)
def test_the_answer_of_the_winner_is_chosen(load: Load, tokenizer: Any, winner: str) -> None:
    (pair,) = reader(load, "dataset=arena").pairs({**BATTLE, "winner": winner}, 1)
    chosen, rejected = PREFERS[winner]
    assert texts(pair, tokenizer)[1:] == (f"{chosen}</s>\n", f"{rejected}</s>\n")


@pytest.mark.parametrize("preference", [-3, -2, -1, 1, 2, 3])
def test_a_preference_above_0_is_for_the_second_answer(load: Load, preference: int) -> None:
    (pair,) = reader(load, "dataset=helpsteer").pairs({**HELP, "overall_preference": preference}, 1)
    assert pair.chosen == [assistant(GOOD if preference < 0 else BAD)]


def test_answers_in_the_other_order_make_the_same_pair(load: Load) -> None:
    sides = {"conversation_a": BATTLE["conversation_b"], "conversation_b": BATTLE["conversation_a"]}
    read = reader(load, "dataset=arena")
    assert read.pairs(BATTLE, 1) == read.pairs({**BATTLE, **sides, "winner": "model_a"}, 1)


SCORES = st.lists(st.integers(0, 6).map(float), max_size=6)


@settings(max_examples=100, deadline=None)
@given(SCORES, st.sampled_from([0.5, 1.0, 2.0, 5.0]))
def test_every_rule_pairs_a_better_answer_with_a_worse_one(
    ranks: list[float], least: float
) -> None:
    found = {
        rule: choose(ranks, rule, least) for rule in ("best_worst", "adjacent", "all", "margin")
    }
    for pairs in found.values():
        assert all(ranks[better] < ranks[worse] for better, worse in pairs)
        assert set(pairs) <= set(found["all"])
    different = {(i, j) for i, a in enumerate(ranks) for j, b in enumerate(ranks) if a < b}
    assert set(found["all"]) == different
    assert set(found["margin"]) == {(i, j) for i, j in different if ranks[j] - ranks[i] >= least}
    assert len(found["best_worst"]) == (len(set(ranks)) > 1)
    assert all(ranks[i] == min(ranks) and ranks[j] == max(ranks) for i, j in found["best_worst"])
    assert len(found["adjacent"]) == max(0, len(set(ranks)) - 1)


def test_a_difference_of_scores_is_not_lost_to_rounding() -> None:
    assert 4.1 - 3.1 < 1
    assert choose([-4.1, -3.1], "margin", 1.0) == [(0, 1)]


@pytest.mark.parametrize(
    ("pairing", "pairs", "left_out"),
    [
        ("best_worst", ["ad"], {"unranked": 2, "not_compared": 2}),
        ("adjacent", ["ab", "cd"], {"unranked": 2}),
        ("all", ["ab", "ac", "ad", "bd", "cd"], {"unranked": 2}),
        ("margin", ["ad", "bd", "cd"], {"unranked": 2}),
    ],
)
def test_answers_are_paired_by_rule_and_the_others_are_counted(
    load: Load, pairing: str, pairs: list[str], left_out: dict[str, int]
) -> None:
    scores = {"a": 9, "b": 8, "c": 8.0, "d": 1.5, "e": None, "f": float("nan")}
    row = {**SCORED, "completions": [response(*answer) for answer in scores.items()]}
    overrides = f"dataset.columns.pairing={pairing}", "dataset.columns.least_difference=2"
    read = reader(load, "dataset=scored", *overrides)
    assert [f"{pair.chosen}{pair.rejected}" for pair in read.pairs(row, 7)] == pairs
    report = read.report()["answers"]
    assert report["num_answers"] == 6
    assert {reason: found["num"] for reason, found in report["left_out"].items()} == left_out
    assert report["num_paired"] == 6 - sum(left_out.values())
    assert report["left_out"]["unranked"]["rows"] == [7]


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        (TALK, "ShareGPT: dataset=sharegpt reads it"),
        (TEXTS, "alpaca: dataset=alpaca reads it"),
        ({"instruction": ASKED, "output": [GOOD, BAD]}, "dataset.columns.chosen=output"),
        (SCORED, "dataset=scored"),
        (NECTAR, "dataset=ranked"),
        (BATTLE, "dataset=arena"),
        (HELP, "dataset=helpsteer"),
        (
            {"prompt": "", "response_1": "", "response_2": "", "preference_strength": 1},
            " ".join(HELPSTEER2),
        ),
        ({"message_tree_id": "1", "prompt": {}}, "dataset=oasst"),
        ({"prompt": "", "completion": "", "label": 1}, "dataset=unpaired"),
        ({"conversations": [human(ASKED), gpt(GOOD)]}, "one answer to a conversation makes no"),
    ],
    ids=str,
)
def test_a_known_form_is_recognised_where_no_preset_is_named(
    load: Load, row: Row, advice: str
) -> None:
    with pytest.raises(Fault) as raised:
        reader(load, "dataset=file").pairs(row, 1)
    assert advice in raised.value.detail


def test_a_file_of_a_known_form_is_refused_with_its_preset(
    load: Load, tokenizer: Any, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(TALK) + "\n")
    with pytest.raises(UserError, match=r"looks like ShareGPT: dataset=sharegpt reads it"):
        data.load(load("dataset=file", f"dataset.train_path={file}").dataset, tokenizer)


# The user quotes what stands in the column
MESSAGES: Row = {
    "prompt": [user(f"Be brief. {ASKED}")],
    "chosen": [assistant(GOOD)],
    "rejected": [assistant(BAD)],
}
SAID = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("row", "is_lost"),
    [
        ({**PAIR, "system": "Be brief."}, True),
        ({**PAIR, "system": " "}, False),
        ({**PAIR, "system": "2 plus"}, False),
        ({**PAIR, "system": "plus"}, True),
        ({**MESSAGES, "system": "Be brief."}, True),
        ({**MESSAGES, "prompt": [SAID, *MESSAGES["prompt"]], "system": "Be brief. "}, False),
        ({**PAIR, "system": {"role": "system", "content": "Be brief."}}, True),
        ({**PAIR, "system": float("nan")}, False),
        ({**PAIR, "winner": float("nan")}, False),
        ({**PAIR, "winner": "model_b"}, True),
        ({**PAIR, "winner": None}, False),
        ({**PAIR, "overall_preference": 0}, True),
        ({**PAIR, "score": 5}, False),
    ],
)
def test_a_column_that_matters_is_not_lost_quietly(load: Load, row: Row, is_lost: bool) -> None:
    (pair,) = reader(load, "dataset=file").pairs(row, 1)
    found = [fault.name for fault in find_faults(pair, re.compile("(?!)"))]
    assert found == ["ignored_column"] * is_lost


def sharegpt(row: Row) -> Row:
    """Return a row of pairs as LLaMA-Factory publishes it."""
    prompt = row["prompt"] if isinstance(row["prompt"], list) else row["chosen"][:-1]
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    written = [{"from": names[each["role"]], "value": each["content"]} for each in prompt]
    is_system = written[0]["from"] == "system"
    return {
        "conversations": written[is_system:],
        "chosen": gpt(row["chosen"][-1]["content"]),
        "rejected": gpt(row["rejected"][-1]["content"]),
        **({"system": written[0]["value"]} if is_system else {}),
    }


def battle(row: Row) -> Row:
    sides = {"conversation_a": row["rejected"], "conversation_b": row["chosen"]}
    return {**sides, "winner": "model_b"}


def alpaca(row: Row) -> Row:
    first, _, rest = row["prompt"].partition("\n")
    names = {"instruction": first, "input": rest}
    return {**names, "chosen": row["chosen"], "rejected": row["rejected"]}


def scored(row: Row) -> Row:
    answers = [response(row["rejected"], 1), response(row["chosen"], 2)]
    return {"instruction": row["prompt"], "completions": answers}


@pytest.mark.parametrize(
    ("name", "write", "preset"),
    [
        ("chat_pairs/train_prefs", sharegpt, "sharegpt"),
        ("chat_pairs/multiturn", sharegpt, "sharegpt"),
        ("chat_pairs/train_prefs", battle, "arena"),
        ("math_pairs/test", alpaca, "alpaca"),
        ("math_pairs/test", scored, "scored"),
    ],
)
def test_real_rows_are_the_same_pairs_in_another_form(
    load: Load, assets: Path, name: str, write: Callable[[Row], Row], preset: str
) -> None:
    lines = (assets / "data" / f"{name}.jsonl").read_text().splitlines()
    as_pairs, in_form = reader(load, "dataset=file"), reader(load, f"dataset={preset}")
    for number, line in enumerate(lines):
        row = json.loads(line)
        (expected,) = as_pairs.pairs(row, number)
        (found,) = in_form.pairs(write(row), number)
        for side in ("prompt", "chosen", "rejected"):
            assert getattr(found, side) == getattr(expected, side)


def test_forms_come_from_the_hub_as_from_a_file(load: Load, tokenizer: Any, tmp_path: Path) -> None:
    rows: list[Row] = [
        {**TALK, "conversations": [human(f"{n} plus 2?")], "system": "Be."} for n in range(6)
    ]
    rows += [{**TALK, "conversations": [human("And?")], "system": None}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [
        data.load(load(*overrides, "dataset.num_eval=2").dataset, tokenizer)
        for overrides in (
            ("dataset=hub", "dataset/columns=sharegpt", f"dataset.path={tmp_path}"),
            ("dataset=sharegpt", f"dataset.train_path={tmp_path / 'rows.jsonl'}"),
        )
    ]
    for split in ("train", "held_out"):
        hub, file = (loaded.report[split]["fingerprint"] for loaded in found)
        assert hub == file
    assert len(found[0].train) == 5
