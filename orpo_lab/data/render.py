"""A pair's messages -> text, through the model's chat template; and whether that text is the row's.

A template may leave text out, move text, or render a prompt otherwise once an answer follows. What
is trained would then not be what the row says, so this is found here and is a `Fault` of the row.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from orpo_lab.data.faults import Fault, quote
from orpo_lab.data.pairs import Message, Pair, num_shared
from orpo_lab.errors import one_line
from orpo_lab.upstream import fix_clock

# Zephyr's layout, which the ORPO authors give to models without a template of their own. It needs
# no new tokens: untrained embeddings would be frozen under LoRA. The BOS in front is ours: it is
# trained wherever a tokenizer has one, so who asks the model by this template has to start from it.
DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

# Keys of messages and tool calls that refer to something and say nothing themselves
REFERENCES = ("role", "id", "type", "tool_call_id")
# Whose text the template may put anywhere: some put a system message into the last user's turn. The
# row's own are its tools and documents.
PLACED_ANYWHERE = ("system", "developer", "row")


@dataclass(frozen=True)
class Rendered:
    """A pair as text."""

    prompt: str
    chosen: str
    rejected: str
    # The end of the generation prompt that no answer stands behind in a whole conversation
    unused_ending: str = ""


def render(pair: Pair, tokenizer: PreTrainedTokenizerBase, today: date) -> Rendered:
    """Return a pair as text, messages through the chat template.

    The template is applied once to the whole conversation; the prompt ends in the generation
    prompt, as it will when the model is asked.

    Args:
        pair: strings, which stay as they are, or messages.
        tokenizer: the model's, with a chat template if there are messages.
        today: the date that a template which asks for one is given.

    Raises:
        Fault: the template refuses the conversation, renders the prompt otherwise once an answer
            follows, or ends an answer by asking for the next one.
    """
    if isinstance(pair.prompt, str):
        return Rendered(pair.prompt, str(pair.chosen), str(pair.rejected))
    assert isinstance(pair.chosen, list)
    assert isinstance(pair.rejected, list)

    def apply(messages: list[Message], *, ask: bool = False) -> str:
        return _apply(tokenizer, messages, pair.context, today, ask=ask)

    prompt = apply(pair.prompt, ask=True)
    chosen, rejected = apply(pair.prompt + pair.chosen), apply(pair.prompt + pair.rejected)
    rendered = _divide(pair, prompt, chosen, rejected, apply)
    _check_ending(pair, prompt, chosen, apply)
    return rendered


def _apply(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    context: Mapping[str, Any],
    today: date,
    *,
    ask: bool,
) -> str:
    try:
        fix_clock(tokenizer.get_chat_template(tools=context.get("tools")), today)
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=ask, **context
        )
    # A template is a program: it also indexes what is not there, and divides by it
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        detail = f"the model's chat template refuses it: {one_line(error)[:200]}"
        raise Fault("template_error", detail) from error
    return str(text)


def _divide(
    pair: Pair, prompt: str, chosen: str, rejected: str, apply: Callable[..., str]
) -> Rendered:
    """Divide two whole conversations into prompt and completions.

    Args:
        pair: the messages.
        prompt: the prompt alone, with the generation prompt.
        chosen: the whole conversation.
        rejected: the same with the other answer.
        apply: renders messages.

    Raises:
        Fault: prompt and completion cannot be told apart.
    """
    if chosen.startswith(prompt) and rejected.startswith(prompt):
        return Rendered(prompt, chosen[len(prompt) :], rejected[len(prompt) :])
    # Some templates add to the generation prompt what they leave out before an answer
    unasked = apply(pair.prompt)
    size = min(num_shared(prompt, chosen), num_shared(prompt, rejected))
    if size >= len(unasked) and prompt.startswith(unasked):
        return Rendered(prompt[:size], chosen[size:], rejected[size:], prompt[size:])
    # Others put the system message or the tools into the last turn, which is another one once there
    # is an answer. The model is asked by the prompt alone; that is what it has to be trained on.
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
    """Check that an answer ends in nothing that asks for the next one.

    Raises:
        Fault: the answer does, since the template ignores `add_generation_prompt`.
    """
    assert isinstance(pair.chosen, list)
    asking = _asking(pair, prompt).rstrip()
    shared = num_shared(asking[::-1], chosen.rstrip()[: -len(asking) - 1 : -1])
    if not any(map(str.isalnum, asking[len(asking) - shared :])):
        return
    # Where all turns end alike, what follows goes on from there
    following = [*pair.prompt, *pair.chosen, {"role": "user", "content": "and then?"}]
    if not apply(following).startswith(chosen):
        raise Fault(
            "misrendered",
            "the model's chat template ends every answer with a generation prompt, whether it is "
            "asked for one or not; take a template that heeds add_generation_prompt",
        )


def _last_text(messages: Any, prompt: str) -> str:
    """Return a rendered prompt from its last message's text on; empty: that is not to be found."""
    said = _content(messages)
    at = prompt.rfind(said) if said else -1
    return prompt[at:] if at >= 0 else ""


def _asking(pair: Pair, prompt: str) -> str:
    """Return what of a rendered prompt stands behind its last text."""
    return _last_text(pair.prompt, prompt)[len(_content(pair.prompt)) :]


def _content(messages: Any) -> str:
    return str(messages[-1].get("content", "")).strip()


def find_unrendered(
    pair: Pair, rendered: Rendered, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Fault]:
    """Yield a fault if the rendering lacks what the row says; white space at its ends is no loss.

    The prompt's messages have to stand in the prompt and an answer's in the completion, in their
    order; so have names and arguments of tool calls, reasoning and all other keys.
    """
    if isinstance(pair.prompt, str):
        return
    template = tokenizer.get_chat_template(tools=pair.context.get("tools"))
    placed: list[Message] = [{"role": "row", key: value} for key, value in pair.context.items()]
    # Some generation prompts begin the answer: with <think>, which may be the row's own
    asking = _asking(pair, rendered.prompt)
    for messages, before, text in (
        (placed + pair.prompt, "", rendered.prompt),
        (pair.chosen, asking, rendered.chosen),
        (pair.rejected, asking, rendered.rejected),
    ):
        lost = (
            _find_lost(messages, before, text, str)
            and _find_lost(messages, before, text, _without_spaces)
        ) or _find_unread(messages, template)
        if lost:
            detail = (
                f"the chat template of {tokenizer.name_or_path or 'the model'} leaves out {lost}; "
                "take a model whose template renders it, or train without it by "
                "dataset.faults.unrendered_text=keep"
            )
            yield Fault("unrendered_text", detail)
            return


def _find_lost(messages: Any, before: str, text: str, form: Callable[[str], str]) -> str:
    """Return what of the messages a text lacks, in words; empty: nothing.

    Args:
        messages: of the prompt or of a completion.
        before: what stands before the text, and may hold a beginning of what it says.
        text: their rendering.
        form: what both are compared in.
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
    """Return where a text that is rendered as it is, or inside JSON, ends; -1: it is not there.

    The search is from `start` on, for an end above `least`.
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
    """Yield every text of a message with the key that holds it."""
    for key, value in message.items():
        # A tool's answer need not repeat which tool it is by
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
    """Return the arguments of a tool call, which some write as JSON inside a string."""
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def _find_unread(messages: Any, template: str) -> str:
    """Name a key of a message, a flag or a number, that the template does not read."""
    for message in messages:
        for key, value in message.items():
            if isinstance(value, int | float) and key not in template:
                return f"the {message['role']}'s {key} '{value}'"
    return ""
