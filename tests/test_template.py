"""The chat template: a run's own, what it is given, and that both reach every call and `final/`."""

import copy
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from orpo_lab import config, data
from orpo_lab.config import identity
from orpo_lab.data.pairs import Pair
from orpo_lab.data.render import Rendered, render
from orpo_lab.data.template import DEFAULT_CHAT_TEMPLATE, check_kwargs, variables
from orpo_lab.errors import UserError
from orpo_lab.evaluate import turn_ends
from orpo_lab.model.source import load_config
from orpo_lab.model.tokenizer import load_tokenizer, read_template
from orpo_lab.records.card import model_card
from orpo_lab.records.run_folder import RunFolder
from tests.conftest import compose_anew, compose_config, ours

Load = Callable[..., config.Config]
TEMPLATES = Path(__file__).parent / "templates"
TODAY = date(2026, 11, 26)
ASKED = {"role": "user", "content": "what is 2 plus 2?"}
RIGHT = {"role": "assistant", "content": "it is 4."}
WRONG = {"role": "assistant", "content": "it is 5."}
PAIR = Pair([ASKED], [RIGHT], [WRONG])
TEXT = "{% for m in messages %}{{ m.role }}, {{ m.content }};{{ eos_token }}{% endfor %}"
TEXT += "{% if add_generation_prompt %}assistant, {% endif %}"


def with_template(tokenizer: Any, name: str) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return tokenizer


def test_thinking_is_switched_off_in_the_prompt_and_in_what_is_learnt(tokenizer: Any) -> None:
    qwen = with_template(tokenizer, "qwen3")
    empty = "<think>\n\n</think>\n\n"
    question = "<|im_start|>user\nwhat is 2 plus 2?<|im_end|>\n<|im_start|>assistant\n"
    # Asked without a thought, the model goes on behind an empty one
    assert render(PAIR, qwen, TODAY, {"enable_thinking": False}) == Rendered(
        question + empty, "it is 4.<|im_end|>\n", "it is 5.<|im_end|>\n"
    )
    # Free to think, it learns to think of nothing
    assert render(PAIR, qwen, TODAY).prompt == question
    assert render(PAIR, qwen, TODAY).chosen == f"{empty}it is 4.<|im_end|>\n"


def test_what_the_template_is_given_decides_where_it_puts_tools(tokenizer: Any) -> None:
    llama = with_template(tokenizer, "llama31")
    tool = {"type": "function", "function": {"name": "lookup", "description": "toolstext"}}
    pair = replace(PAIR, context={"tools": [tool]})
    before, behind = (
        render(pair, llama, TODAY, {"tools_in_user_message": choice}).prompt.split("toolstext")
        for choice in (True, False)
    )
    assert "<|eot_id|>" in before[0]
    assert "<|eot_id|>" not in behind[0]


def test_pairs_and_the_ends_of_answers_see_what_the_template_is_given(
    load: Load, tokenizer: Any, build_model: Callable[..., Any]
) -> None:
    marked = copy.deepcopy(tokenizer)
    marked.chat_template = DEFAULT_CHAT_TEMPLATE.replace("eos_token", "(ending or eos_token)")
    few = ["dataset.num_train=4", "dataset.num_eval=2", "dataset.max_length=128"]
    loaded = load(*few, "dataset.template_kwargs={ending: '<|user|>'}")
    pairs = data.load(loaded.dataset, marked)
    assert all("<|user|>\n<|assistant|>\n" in text for text in pairs.train["prompt_text"])
    network, (user,) = build_model(loaded), marked.convert_tokens_to_ids(["<|user|>"])
    given = loaded.dataset.template_kwargs
    assert user in turn_ends(network, marked, given)
    assert user not in turn_ends(network, marked)


@pytest.mark.parametrize(
    ("template", "given", "said"),
    [
        ("qwen3", "enable_thoughts", r"never reads enable_thoughts; it reads enable_thinking, "),
        ("gemma", "enable_thinking", r"it reads nothing but messages$"),
        ("llama31", "tools", r"tools is given to the template by rows and runs; leave it out$"),
        # A name that the template's own loop sets
        ("llama31", "message", r"it reads call, date_string, tools_in_user_message$"),
    ],
)
def test_what_the_template_never_reads_is_refused_by_name(
    tokenizer: Any, template: str, given: str, said: str
) -> None:
    with pytest.raises(UserError, match=rf"dataset\.template_kwargs\.{given}: .*{said}"):
        check_kwargs(with_template(tokenizer, template), {given: False})


def test_a_run_is_refused_before_it_reads_a_row(load: Load, tokenizer: Any) -> None:
    settings = load("dataset.template_kwargs.enable_thinking=false").dataset
    with pytest.raises(UserError, match=r"dataset\.template_kwargs\.enable_thinking"):
        data.load(settings, tokenizer)


def test_a_template_for_tools_alone_may_read_what_the_other_does_not(tokenizer: Any) -> None:
    both = copy.deepcopy(tokenizer)
    both.chat_template = {"default": TEXT, "tool_use": TEXT + "{{ style }}"}
    check_kwargs(both, {"style": "short"})
    assert variables(TEXT) == {"messages", "eos_token", "add_generation_prompt"}


def test_what_the_template_is_given_is_typed_on_the_command_line_as_other_keys_are() -> None:
    from orpo_lab.config.command_line import as_typed

    for typed in ("={enable_thinking: false}", ".enable_thinking=false"):
        composed = compose_anew(*as_typed([f"dataset.template_kwargs{typed}"]))
        loaded = config.load(ours(composed))
        assert loaded.dataset.template_kwargs == {"enable_thinking": False}


def test_a_files_template_and_its_text_are_the_same_template(
    load: Load, tmp_path: Path, tokenizer: Any
) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(TEXT)
    for given in (str(file), TEXT):
        model = load(f"model.chat_template={given}").model
        assert model.chat_template == given
        own = load_tokenizer(model, load_config(model))
        assert own.chat_template == TEXT
        assert render(PAIR, own, TODAY).prompt == "user, what is 2 plus 2?;</s>assistant, "
        # Whoever loads final/ asks by the run's template
        own.save_pretrained(tmp_path / "final")
        assert AutoTokenizer.from_pretrained(tmp_path / "final").chat_template == TEXT
    assert tokenizer.chat_template != TEXT


def test_another_template_is_another_run(load: Load, tmp_path: Path) -> None:
    def identity_of(*overrides: str) -> str:
        return identity.identity(load(*overrides))

    here, there = tmp_path / "here.jinja", tmp_path / "there.jinja"
    here.write_text(TEXT)
    there.write_text(TEXT)
    first = identity_of(f"model.chat_template={here}")
    # The place does not count, the content does
    assert identity_of(f"model.chat_template={there}") == first
    there.write_text(TEXT + " ")
    different = {
        first,
        identity_of(),
        identity_of(f"model.chat_template={there}"),
        identity_of(f"model.chat_template={TEXT * 50}"),
        identity_of("dataset.template_kwargs.enable_thinking=false"),
        identity_of("dataset.template_kwargs.enable_thinking=true"),
    }
    assert len(different) == 6


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("missing.jinja", r"model\.chat_template=missing\.jinja cannot be read"),
        ("{% for m in messages %}", r"model\.chat_template is not a template"),
        ("{{ prompt }}", r"model\.chat_template never reads messages"),
    ],
)
def test_what_is_no_chat_template_is_refused(given: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as refusal:
        read_template(given)
    assert "\n" not in str(refusal.value)


def test_the_card_says_what_the_template_was_given(tmp_path: Path) -> None:
    loaded = config.load(
        compose_config(
            "model.chat_template=own.jinja", "dataset.template_kwargs={enable_thinking: false}"
        )
    )
    summary: dict[str, Any] = {"after": {}, "train": {"steps": 1}}
    card = model_card(RunFolder(tmp_path), loaded, summary)
    assert "The chat template is the run's own." in card
    assert "`enable_thinking=False`" in card
    plain = model_card(RunFolder(tmp_path), config.load(compose_config()), summary)
    assert "chat template" not in plain
