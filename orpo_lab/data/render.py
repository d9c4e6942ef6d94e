"""Render a pair's messages as text by the model's chat template, and check the text.

A template may leave text out, move text, or render a prompt differently once an answer follows. The
model would then be trained on something that the row does not say. So this is a `Fault` of the row.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

from transformers import PreTrainedTokenizerBase

from orpo_lab.data import template
from orpo_lab.data.faults import Fault, quote
from orpo_lab.data.pairs import Message, Pair, num_shared
from orpo_lab.errors import one_line

# Keys of messages and tool calls that only refer to something, and have no text of their own
REFERENCES = ("role", "id", "type", "tool_call_id")
# Roles whose text the template may put anywhere: some templates put a system message into the last
# turn of the user. "row" stands for the tools and documents of the row
PLACED_ANYWHERE = ("system", "developer", "row")


@dataclass(frozen=True)
class Rendered:
    """A pair as text."""

    prompt: str
    chosen: str
    rejected: str
    # The end of the generation prompt that the template leaves out once an answer follows
    unused_ending: str = ""


def render(
    pair: Pair,
    tokenizer: PreTrainedTokenizerBase,
    today: date,
    kwargs: Mapping[str, Any] = template.NO_KWARGS,
) -> Rendered:
    """Return a pair as text; messages are rendered by the chat template.

    The template is applied to each whole conversation at once. The prompt ends in the generation
    prompt, as it does when the model is asked later.

    Args:
        pair: strings, which are not changed, or messages.
        tokenizer: the model's tokenizer, with a chat template if there are messages.
        today: the date for templates that ask for a date.
        kwargs: `dataset.template_kwargs`.

    Raises:
        Fault: the template refuses the conversation, renders the prompt differently once an answer
            follows, or ends an answer with a generation prompt.
    """
    if isinstance(pair.prompt, str):
        return Rendered(pair.prompt, str(pair.chosen), str(pair.rejected))
    assert isinstance(pair.chosen, list)
    assert isinstance(pair.rejected, list)
    apply = applier(pair, tokenizer, today, kwargs)
    prompt = apply(pair.prompt, ask=True)
    chosen, rejected = apply(pair.prompt + pair.chosen), apply(pair.prompt + pair.rejected)
    rendered = _divide(pair, prompt, chosen, rejected, apply)
    _check_ending(pair, prompt, chosen, apply)
    return rendered


def applier(
    pair: Pair, tokenizer: PreTrainedTokenizerBase, today: date, kwargs: Mapping[str, Any]
) -> Callable[..., str]:
    """Return the function that renders messages of a pair; the arguments are those of `render`.

    The function raises a `Fault` if the template refuses the messages.
    """

    def apply(messages: list[Message], *, ask: bool = False) -> str:
        try:
            return template.apply(
                tokenizer, messages, kwargs, ask=ask, context=pair.context, today=today
            )
        except template.REFUSALS as error:
            detail = f"the model's chat template refuses it: {one_line(error)[:200]}"
            raise Fault("template_error", detail) from error

    return apply


def _divide(
    pair: Pair, prompt: str, chosen: str, rejected: str, apply: Callable[..., str]
) -> Rendered:
    """Divide two rendered conversations into the prompt and the two completions.

    Args:
        pair: the messages.
        prompt: the prompt alone, rendered with the generation prompt.
        chosen: the conversation that ends in the chosen answer, rendered.
        rejected: the conversation that ends in the rejected answer, rendered.
        apply: renders messages.

    Raises:
        Fault: prompt and completions cannot be told apart: the end of the prompt is not found, or
            an answer has several messages.
    """
    if chosen.startswith(prompt) and rejected.startswith(prompt):
        return Rendered(prompt, chosen[len(prompt) :], rejected[len(prompt) :])
    # Some templates end the generation prompt with text that they leave out before an answer
    unasked = apply(pair.prompt)
    size = min(num_shared(prompt, chosen), num_shared(prompt, rejected))
    if size >= len(unasked) and prompt.startswith(unasked):
        return Rendered(prompt[:size], chosen[size:], rejected[size:], prompt[size:])
    # Other templates put the system message or the tools into the last turn. With an answer, that
    # is another turn. The model will be asked with the prompt alone, so train it on that prompt
    ending = _last_text(pair.prompt, prompt)
    found = chosen[: num_shared(chosen, rejected)].rfind(ending) if ending else -1
    if found < 0 or len(pair.chosen) > 1 or len(pair.rejected) > 1:
        raise Fault(
            "misrendered",
            "the model's chat template renders the prompt otherwise once an answer follows (it may "
            "move or drop a system message); leave that message out, or take another template",
        )
    at = found + len(ending)
    return Rendered(prompt, chosen[at:], rejected[at:])


def _check_ending(pair: Pair, prompt: str, chosen: str, apply: Callable[..., str]) -> None:
    """Check that the chosen answer does not end in a generation prompt.

    Raises:
        Fault: it does, because the template ignores `add_generation_prompt`.
    """
    assert isinstance(pair.chosen, list)
    asking = _asking(pair, prompt).rstrip()
    shared = num_shared(asking[::-1], chosen.rstrip()[: -len(asking) - 1 : -1])
    if not any(map(str.isalnum, asking[len(asking) - shared :])):
        return
    # If the shared ending only ends a turn, the next turn is rendered behind this ending
    following = [*pair.prompt, *pair.chosen, {"role": "user", "content": "and then?"}]
    if not apply(following).startswith(chosen):
        raise Fault(
            "misrendered",
            "the model's chat template ends every answer with a generation prompt, whether it is "
            "asked for one or not; take a template that heeds add_generation_prompt",
        )


def _last_text(messages: Any, prompt: str) -> str:
    """Return the end of a rendered prompt, from the last message's text on; empty: not found."""
    said = _content(messages)
    at = prompt.rfind(said) if said else -1
    return prompt[at:] if at >= 0 else ""


def _asking(pair: Pair, prompt: str) -> str:
    """Return the end of a rendered prompt, behind the last message's text."""
    return _last_text(pair.prompt, prompt)[len(_content(pair.prompt)) :]


def _content(messages: Any) -> str:
    return str(messages[-1].get("content", "")).strip()


def find_unrendered(
    pair: Pair, rendered: Rendered, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Fault]:
    """Yield a fault if the rendered text lacks a text of the row.

    The texts of the prompt's messages must be in the rendered prompt, and the texts of an answer in
    its completion, in their order; those of roles in `PLACED_ANYWHERE` may be anywhere in it. This
    holds for content, names and arguments of tool calls, reasoning and all other keys but
    `REFERENCES`. White space may differ. If a message's key holds a flag or a number, the template
    must only name the key.
    """
    if isinstance(pair.prompt, str):
        return
    read = tokenizer.get_chat_template(tools=pair.context.get("tools"))
    placed: list[Message] = [{"role": "row", key: value} for key, value in pair.context.items()]
    # Some generation prompts begin the answer, with <think> for example. The row's answer may begin
    # with the same text
    asking = _asking(pair, rendered.prompt)
    for messages, before, text in (
        (placed + pair.prompt, "", rendered.prompt),
        (pair.chosen, asking, rendered.chosen),
        (pair.rejected, asking, rendered.rejected),
    ):
        lost = (
            _find_lost(messages, before, text, str)
            and _find_lost(messages, before, text, _without_spaces)
        ) or _find_unread(messages, read)
        if lost:
            detail = (
                f"the chat template of {tokenizer.name_or_path or 'the model'} leaves out {lost}; "
                "take a model whose template renders it, or train without it by "
                "dataset.faults.unrendered_text=keep"
            )
            yield Fault("unrendered_text", detail)
            return


def _find_lost(messages: Any, before: str, text: str, form: Callable[[str], str]) -> str:
    """Return in words which text of the messages is lost; empty: no text is lost.

    Args:
        messages: the messages of the prompt or of a completion.
        before: the text in front of `text`, where the first text of the messages may begin.
        text: the rendering of the messages.
        form: applied to all texts before they are compared.
    """
    least = len(form(before))
    text = form(before) + form(text)
    reached = 0
    for message in messages:
        is_placed = message["role"] in PLACED_ANYWHERE
        end = reached
        for key, said in _texts(message):
            found = _end_of(said, text, 0 if is_placed else reached, least, form)
            if found < 0:
                return f"the {message['role']}'s {key} '{quote(said)}'"
            end = max(end, found)
        reached = reached if is_placed else end
    return ""


def _end_of(said: str, text: str, start: int, least: int, form: Callable[[str], str]) -> int:
    """Return the index in `text` where `said` ends; -1: `said` was not found.

    `said` may be rendered unchanged, or inside JSON. The search begins at `start`, for an end above
    `least`.
    """
    said = said.strip()
    if not said:
        return start
    escaped = (json.dumps(said, ensure_ascii=is_ascii)[1:-1] for is_ascii in (False, True))
    for spelling in itertools.chain((said,), escaped):
        sought = form(spelling)
        if (at := text.find(sought, max(start, least + 1 - len(sought)))) >= 0:
            return at + len(sought)
    return -1


def _without_spaces(text: str) -> str:
    return "".join(text.split())


def _texts(message: Message) -> Iterator[tuple[str, str]]:
    """Yield every text of a message, together with the key that holds this text."""
    for key, value in message.items():
        # An answer of a tool need not repeat the name of the tool
        if key in REFERENCES or (key == "name" and message["role"] == "tool"):
            continue
        if isinstance(value, str):
            yield key, value
        elif isinstance(value, Mapping | list):
            yield from ((key, text) for text in _inner_texts(value, key))


def _inner_texts(value: Any, key: str) -> Iterator[str]:
    """Yield the texts and numbers inside a value, and the names of arguments and parameters."""
    if key == "arguments" and isinstance(value, str):
        value = _parsed(value)
    match value:
        case Mapping():
            for name, item in value.items():
                if key in ("arguments", "properties"):
                    yield name
                if key in ("arguments", "properties") or name not in REFERENCES:
                    yield from _inner_texts(item, name)
        case list():
            for item in value:
                yield from _inner_texts(item, key)
        case str():
            yield value
        case int() | float() if not isinstance(value, bool):
            yield json.dumps(value)


def _parsed(arguments: str) -> Any:
    """Return the arguments of a tool call; some data sets write them as JSON inside a string."""
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def _find_unread(messages: Any, template: str) -> str:
    """Return in words a key, with a flag or a number, that the template does not read."""
    for message in messages:
        for key, value in message.items():
            if isinstance(value, int | float) and key not in template:
                return f"the {message['role']}'s {key} '{value}'"
    return ""
