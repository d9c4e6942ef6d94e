"""Chat templates: what is trained is what the row says, or the row is refused; a judge decides.

The judge knows words, not templates: every text of a conversation is a word of its own, and it asks
where these stand in what is trained. It shares no code with the check.
"""

import ast
import copy
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import pytest

from orpo_lab import config
from orpo_lab.config.dataset import Faults
from orpo_lab.data.encode import encode_row, special_tokens
from orpo_lab.data.faults import Fault
from orpo_lab.data.pairs import Pair, find_faults, text_of
from orpo_lab.data.render import Rendered, find_unrendered, render
from orpo_lab.data.splits import Split
from orpo_lab.data.warn import warn_of_lengths, warn_of_losses
from tests.conftest import compose_config

TODAY = date(2026, 11, 26)
WRITTEN = sorted((Path(__file__).parent / "templates").glob("*.jinja"))


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **others}


def call(place: str) -> dict[str, Any]:
    function = {"name": "lookup", "arguments": {"place": place}}
    return assistant("", tool_calls=[{"type": "function", "id": "a1", "function": function}])


def thinking(thought: str, answer: str) -> dict[str, Any]:
    return assistant(f"<think>\n{thought}\n</think>\n\n{answer}")


ASKED = user("questionone")
SYSTEM = {"role": "system", "content": "systemtext"}
TURNS = [ASKED, assistant("replyone"), user("questiontwo")]
GOOD, BAD = [assistant("answergood")], [assistant("answerbad")]
PLACE = {"type": "string", "description": "placetext"}
SCHEMA = {"type": "object", "properties": {"place": PLACE}, "required": ["place"]}
FUNCTION = {"name": "lookup", "description": "toolstext", "parameters": SCHEMA}
TOOLS = {"tools": [{"type": "function", "function": FUNCTION}]}
RESULT = {"role": "tool", "tool_call_id": "a1", "name": "lookup", "content": "resulttext"}


@dataclass(frozen=True)
class Kind:
    """A pair, and the words of its prompt's turns and of both answers, in their order."""

    pair: Pair
    asked: tuple[str, ...] = ("questionone",)
    good: tuple[str, ...] = ("answergood",)
    bad: tuple[str, ...] = ("answerbad",)
    # Words of the prompt whose place the template chooses
    placed: tuple[str, ...] = ()


KINDS = {
    "plain": Kind(Pair([ASKED], GOOD, BAD)),
    "spaces": Kind(Pair([user(" questionone\n")], [assistant(" answergood ")], BAD)),
    "system": Kind(Pair([SYSTEM, ASKED], GOOD, BAD), placed=("systemtext",)),
    "turns": Kind(Pair(TURNS, GOOD, BAD), asked=("questionone", "replyone", "questiontwo")),
    "system and turns": Kind(
        Pair([SYSTEM, *TURNS], GOOD, BAD),
        asked=("questionone", "replyone", "questiontwo"),
        placed=("systemtext",),
    ),
    "answers of turns": Kind(
        Pair(
            [ASKED],
            [assistant("answerone"), user("questiontwo"), *GOOD],
            [assistant("answertwo"), user("questionthree"), *BAD],
        ),
        good=("answerone", "questiontwo", "answergood"),
        bad=("answertwo", "questionthree", "answerbad"),
    ),
    "thinking in the answer": Kind(
        Pair(
            [ASKED], [thinking("thoughtgood", "answergood")], [thinking("thoughtbad", "answerbad")]
        ),
        good=("thoughtgood", "answergood"),
        bad=("thoughtbad", "answerbad"),
    ),
    "thinking beside the answer": Kind(
        Pair(
            [ASKED],
            [assistant("answergood", reasoning_content="thoughtgood")],
            [assistant("answerbad", reasoning_content="thoughtbad")],
        ),
        good=("thoughtgood", "answergood"),
        bad=("thoughtbad", "answerbad"),
    ),
    "thinking in the history": Kind(
        Pair([ASKED, thinking("thoughtone", "replyone"), user("questiontwo")], GOOD, BAD),
        asked=("questionone", "thoughtone", "replyone", "questiontwo"),
    ),
    "tools": Kind(
        Pair([ASKED, call("paris"), RESULT], GOOD, BAD, context=TOOLS),
        asked=("questionone", "paris", "resulttext"),
        placed=("toolstext",),
    ),
    "a call as the answer": Kind(
        Pair([ASKED], [call("paris")], [call("london")], context=TOOLS),
        good=("paris",),
        bad=("london",),
        placed=("toolstext",),
    ),
    "a result in the answer": Kind(
        Pair(
            [ASKED],
            [call("paris"), RESULT, *GOOD],
            [call("london"), {**RESULT, "content": "othertext"}, *BAD],
            context=TOOLS,
        ),
        good=("paris", "resulttext", "answergood"),
        bad=("london", "othertext", "answerbad"),
        placed=("toolstext",),
    ),
    "a prefilled answer": Kind(
        Pair([ASKED, assistant("beginning")], GOOD, BAD), asked=("questionone", "beginning")
    ),
}

# What begins a turn of the assistant's, and what ends any, in all the families here
BEGINS = re.compile(r"assistant|Assistant|model|CHATBOT|\[/INST\]")
ENDS = re.compile(r"im_end|eot|end_of_turn|turn\|>|END_OF_TURN|end▁of▁sentence|<\|end|</s>|return")


def judge(rendered: Rendered, kind: Kind, tokenizer: Any) -> str:
    """Return what is wrong with what is trained; empty: nothing."""
    prompt, sides = rendered.prompt, (rendered.chosen, rendered.rejected)
    if not in_order(kind.asked, prompt) or any(word not in prompt for word in kind.placed):
        return "the prompt lacks a text, or has them in another order"
    if any(word in prompt for word in (*kind.good, *kind.bad)):
        return "the prompt holds a text of an answer"
    for side, words in zip(sides, (kind.good, kind.bad), strict=True):
        if not in_order(words, side):
            return "an answer lacks a text, or has them in another order"
        if any(word in side for word in (*kind.asked, *kind.placed) if word not in words):
            return "an answer holds a text of the prompt"
        if ENDS.search(side.split(words[0])[0]):
            return "an answer begins with the end of a turn"
        if BEGINS.search(side.rsplit(words[-1])[-1]):
            return "an answer ends in a new turn"
    asked, unasked = (
        tokenizer.apply_chat_template(
            kind.pair.prompt, tokenize=False, add_generation_prompt=ask, **kind.pair.context
        )
        for ask in (True, False)
    )
    if not asked.startswith(prompt) or len(prompt) < len(unasked):
        return "the model is asked by another prompt"
    return ""


def in_order(words: tuple[str, ...], text: str) -> bool:
    return re.search(".*?".join(words), text, flags=re.DOTALL) is not None


def with_template(tokenizer: Any, template: str) -> Any:
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def come_to(kind: Kind, tokenizer: Any) -> str:
    """Return what becomes of a row by the default policies: right, silent, or its fault's name."""
    faults = list(find_faults(kind.pair, special_tokens(tokenizer)))
    try:
        rendered = render(kind.pair, tokenizer, TODAY)
        faults += find_unrendered(kind.pair, rendered, tokenizer)
    except Fault as fault:
        faults.append(fault)
    left_out = [fault.name for fault in faults if getattr(default_policies(), fault.name) != "keep"]
    if left_out:
        return left_out[0]
    wrong = judge(rendered, kind, tokenizer)
    return f"silent: {wrong}" if wrong else "right"


@cache
def default_policies() -> Faults:
    return config.load(compose_config()).dataset.faults


def shipped() -> Iterator[tuple[str, str]]:
    """Yield every chat template inside the installed TRL and transformers packages."""
    for package in ("trl", "transformers"):
        spec = find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        (folder,) = map(Path, spec.submodule_search_locations)
        for file in sorted(folder.rglob("*.jinja")):
            yield f"{package}/{file.name}", file.read_text()
        for file in sorted(folder.glob("models/*/processing_*.py")):
            text = file.read_text()
            if "{%" in text and "message" in text:
                yield from ((f"{package}/{file.name}", template) for template in strings(text))


def strings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        value = node.value if isinstance(node, ast.Constant) else None
        if isinstance(value, str) and re.search(r"{%-? *for message in", value):
            yield value


def test_every_shipped_template_renders_a_row_right_or_the_row_is_refused(tokenizer: Any) -> None:
    templates = list(shipped())
    assert {name.split("/")[0] for name, _ in templates} == {"trl", "transformers"}
    counts: Counter[str] = Counter()
    silent, plain = [], []
    for name, template in templates:
        asked = with_template(tokenizer, template)
        for kind, case in KINDS.items():
            came_to = come_to(case, asked)
            counts[came_to.split(":")[0]] += 1
            silent += [f"{name}, {kind}: {came_to}"] * came_to.startswith("silent")
            plain += [name] * (kind == "plain" and came_to == "right")
    print(f"{len(templates)} shipped templates, {len(KINDS)} kinds of rows: {dict(counts)}")
    assert not silent
    # A check that refused everything would be never silent too
    assert len(plain) > 0.9 * len(templates)


# What each template cannot render; it renders all other kinds right
NO_TOOLS = dict.fromkeys(
    ("tools", "a call as the answer", "a result in the answer"), "unrendered_text"
)
NO_RESULTS = dict.fromkeys(("tools", "a result in the answer"), "template_error")
NO_REASONING = {"thinking beside the answer": "unrendered_text"}
REFUSED: dict[str, dict[str, str]] = {
    "always_asks": dict.fromkeys(KINDS, "misrendered"),
    "gemma": {**NO_TOOLS, **NO_REASONING, **NO_RESULTS},
    "hermes": NO_REASONING,
    "llama31": NO_REASONING,
    "llama_date": {**NO_TOOLS, **NO_REASONING},
    "mistral": {**NO_TOOLS, **NO_REASONING, **NO_RESULTS},
    "mistral_drops_system": {
        **NO_TOOLS,
        **NO_REASONING,
        "system": "unrendered_text",
        "system and turns": "unrendered_text",
    },
    "never_asks": {**NO_TOOLS, **NO_REASONING},
    "no_roles": {**NO_TOOLS, **NO_REASONING},
    "qwen3": {"thinking in the history": "unrendered_text"},
    "qwen_thinking": {**NO_TOOLS, "thinking in the history": "unrendered_text"},
    "r1": {
        **NO_TOOLS,
        **NO_REASONING,
        "thinking in the answer": "unrendered_text",
        "thinking in the history": "unrendered_text",
    },
    "tool_calls": NO_REASONING,
    "tools_last": NO_REASONING,
}


@pytest.mark.parametrize("file", WRITTEN, ids=lambda file: file.stem)
def test_a_family_renders_what_it_can_and_the_rest_is_refused(tokenizer: Any, file: Path) -> None:
    asked = with_template(tokenizer, file.read_text())
    came_to = {kind: come_to(case, asked) for kind, case in KINDS.items()}
    print(f"{file.stem}: {dict(Counter(outcome.split(':')[0] for outcome in came_to.values()))}")
    expected = dict.fromkeys(KINDS, "right") | REFUSED[file.stem]
    assert came_to == expected | {"a prefilled answer": "prefilled_answer"}


def as_trl(pair: Pair, tokenizer: Any) -> Rendered:
    """Divide by what the prompt and both conversations share, as TRL does."""
    options = {"tokenize": False, **pair.context}
    assert isinstance(pair.prompt, list)
    answered = pair.prompt[-1]["role"] == "assistant"
    prompt = tokenizer.apply_chat_template(
        pair.prompt, add_generation_prompt=not answered, continue_final_message=answered, **options
    )
    sides = [
        tokenizer.apply_chat_template([*pair.prompt, *side], **options)
        for side in (pair.chosen, pair.rejected)
    ]
    size = next(
        at
        for at in range(len(prompt), -1, -1)
        if all(side.startswith(prompt[:at]) for side in sides)
    )
    return Rendered(prompt[:size], sides[0][size:], sides[1][size:])


@pytest.mark.parametrize(
    ("template", "kind", "wrong"),
    [
        ("mistral", "system", "the prompt lacks a text"),
        ("mistral_drops_system", "system", "the prompt lacks a text"),
        ("r1", "thinking in the answer", "an answer lacks a text"),
        ("always_asks", "plain", "an answer ends in a new turn"),
        ("tool_calls", "a prefilled answer", "an answer begins with the end of a turn"),
        ("gemma", "a call as the answer", "the prompt lacks a text"),
    ],
)
def test_the_judge_sees_what_goes_wrong_without_a_check(
    tokenizer: Any, template: str, kind: str, wrong: str
) -> None:
    (file,) = [path for path in WRITTEN if path.stem == template]
    asked = with_template(tokenizer, file.read_text())
    assert judge(as_trl(KINDS[kind].pair, asked), KINDS[kind], asked).startswith(wrong)


def rendered_by(tokenizer: Any, template: str, pair: Pair, today: date = TODAY) -> Rendered:
    (file,) = [path for path in WRITTEN if path.stem == template]
    return render(pair, with_template(tokenizer, file.read_text()), today)


def test_a_system_message_that_moves_stays_in_the_prompt(tokenizer: Any) -> None:
    rendered = rendered_by(tokenizer, "mistral", KINDS["system"].pair)
    assert rendered.prompt == "<s>[INST] systemtext\n\nquestionone[/INST]"
    assert (rendered.chosen, rendered.rejected) == (" answergood</s>", " answerbad</s>")


def test_what_a_generation_prompt_opens_the_row_may_go_on(tokenizer: Any) -> None:
    template = "{% for one in messages %}<|{{ one.role }}|>{{ one.content }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
    asked = with_template(tokenizer, template)
    rendered = render(KINDS["thinking in the answer"].pair, asked, TODAY)
    assert rendered.chosen == "thoughtgood\n</think>\n\nanswergood</s>"
    assert not list(find_unrendered(KINDS["thinking in the answer"].pair, rendered, asked))
    # And where the row holds none, what is asked with is not all trained behind
    assert render(KINDS["plain"].pair, asked, TODAY).unused_ending == "<think>\n"
    # Nor where one answer alone holds a thought: the prompt is what both begin with
    thinking, plain = KINDS["thinking in the answer"].pair, KINDS["plain"].pair
    for sides in ((thinking.chosen, plain.rejected), (plain.chosen, thinking.rejected)):
        rendered = render(Pair(plain.prompt, *sides), asked, TODAY)
        assert rendered.prompt.endswith("<|assistant|>")
        for said, side in zip((rendered.chosen, rendered.rejected), sides, strict=True):
            assert said == text_of(side) + "</s>"


def test_what_either_answer_loses_is_seen(tokenizer: Any) -> None:
    pair = KINDS["plain"].pair
    whole = render(pair, tokenizer, TODAY)
    assert not list(find_unrendered(pair, whole, tokenizer))
    for lost in (replace(whole, chosen=""), replace(whole, rejected=""), replace(whole, prompt="")):
        (fault,) = find_unrendered(pair, lost, tokenizer)
        assert fault.name == "unrendered_text"


def test_rows_that_a_template_loses_are_a_share_of_all_rows(
    caplog: pytest.LogCaptureFixture,
) -> None:
    unread: Any = None
    split = Split("train", unread, unread, num_rows=105)
    for number in range(11):
        assert f"{number} of 105 rows" not in caplog.text
        split.dropped.add("misrendered", number, "a row")
        warn_of_losses(split)
    # A tenth is 10.5 rows; of the 94 that are left a tenth would be 9.4
    assert [record.getMessage() for record in caplog.records] == [
        "WARNING: train: 11 of 105 rows are dropped (misrendered), such as: a row"
    ]


def test_lengths_that_are_proposed_keep_19_of_20_rows(
    load: Callable[..., config.Config], caplog: pytest.LogCaptureFixture
) -> None:
    unread: Any = None
    split = Split("train", unread, unread)
    # 100 prompts of 1 to 100 tokens; the pairs are three times as long, by one side or the other
    sizes = range(1, 101)
    judged = datasets.Dataset.from_dict(
        {
            "num_prompt_tokens": sizes,
            "num_chosen_tokens": [size * (1 + size % 2) for size in sizes],
            "num_rejected_tokens": [size * (2 - size % 2) for size in sizes],
        }
    )
    lengths = load("dataset.max_length=64", "dataset.max_prompt_length=32").dataset
    for number in range(11):
        assert not caplog.records
        split.dropped.add("pair_too_long", number)
        warn_of_lengths(split, judged, lengths)
    said = caplog.records[0].getMessage()
    assert "11 of 100 pairs (11 %) are too long" in said
    assert "Half of the pairs have more than 153 tokens, 95 % have at most 288" in said
    assert "dataset.max_length=288 dataset.max_prompt_length=96 would keep these, if" in said


def test_a_text_counts_as_rendered_as_itself_trimmed_and_inside_json(tokenizer: Any) -> None:
    odd = 'say "hi"\nto Zo\u00eb, \\o/ '
    for template in ("tool_calls", "gemma"):
        asked = [assistant(odd, tool_calls=call(odd)["tool_calls"])] if "tool" in template else GOOD
        pair = Pair([user(odd)], asked, BAD)
        (file,) = [path for path in WRITTEN if path.stem == template]
        chosen = with_template(tokenizer, file.read_text())
        assert not list(find_unrendered(pair, render(pair, chosen, TODAY), chosen))


def test_a_repeated_text_has_to_stand_as_often_as_it_was_said(tokenizer: Any) -> None:
    # The second turn is left out; the first one says the same
    template = "{% for one in messages %}<|{{ one.role }}|>{{ one.content if loop.index0 != 2 }}"
    template += "</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    asked = with_template(tokenizer, template)
    pair = Pair([user("go on"), assistant("yes"), user("go on")], GOOD, BAD)
    (fault,) = find_unrendered(pair, render(pair, asked, TODAY), asked)
    assert "the user's content 'go on'" in fault.detail


def test_a_date_in_a_template_is_the_runs_whatever_the_clock_says(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.utils import chat_template_utils

    class Later(chat_template_utils.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Later":
            return cls(2031, 1, 2)

    kind = KINDS["plain"]
    (file,) = [path for path in WRITTEN if path.stem == "llama_date"]
    asked = with_template(tokenizer, file.read_text())
    settings = replace(config.load(compose_config()).dataset, max_length=512, max_prompt_length=400)

    def ids(today: date) -> Any:
        row = {
            "pair": json.dumps([kind.pair.prompt, kind.pair.chosen, kind.pair.rejected, {}, None])
        }
        return encode_row(row, dataset=settings, tokenizer=asked, today=today)["prompt_ids"]

    before = ids(TODAY)
    assert "Today Date: 26 Nov 2026" in tokenizer.decode(before)
    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    assert ids(TODAY) == before
    assert "Today Date: 27 Nov 2026" in tokenizer.decode(ids(date(2026, 11, 27)))
