"""The model's chat template: the one place that applies it, and what a template reads.

`dataset.template_kwargs` are handed to every call: of the pairs, of the prompts that are answered
before and after training, and of whatever else asks the model.
"""

import inspect
from collections.abc import Iterable, Mapping
from datetime import date
from types import MappingProxyType
from typing import Any

from jinja2 import TemplateError, meta
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from orpo_lab.errors import UserError
from orpo_lab.upstream import fix_clock

# The format of Zephyr, which the ORPO authors use for models without a chat template. The format
# needs no new tokens, whose untrained embeddings would be frozen under LoRA. We added the BOS at
# the beginning: training puts a BOS there if the tokenizer has one, so other users of this template
# must begin with a BOS too.
DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# What a template raises if it refuses a conversation. A template is a program: index errors and
# division by zero are possible too
REFUSALS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError)
NO_KWARGS: Mapping[str, Any] = MappingProxyType({})
# Names that `apply` hands over itself, or that transformers takes for its own
GIVEN = {"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters}


def apply(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    kwargs: Mapping[str, Any],
    *,
    ask: bool = False,
    context: Mapping[str, Any] | None = None,
    today: date | None = None,
) -> str:
    """Return a conversation as text.

    Args:
        tokenizer: the model's tokenizer, with a chat template.
        messages: the conversation.
        kwargs: `dataset.template_kwargs`.
        ask: whether the text ends in the generation prompt.
        context: the tools and documents beside the messages.
        today: the date for templates that ask for a date; None: the date of the clock.

    Raises:
        One of REFUSALS: the template refuses the conversation.
    """
    context = context or {}
    if today is not None:
        fix_clock(tokenizer.get_chat_template(tools=context.get("tools")), today)
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=ask, **context, **kwargs
    )
    return str(text)


def is_own(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer has a chat template other than the default one."""
    return tokenizer.chat_template not in (None, DEFAULT_CHAT_TEMPLATE)


def variables(template: str) -> set[str]:
    """Return the names that a template reads and, at that place, may not have set itself.

    Raises:
        TemplateError: the text is not a template.
    """
    environment = _compile_jinja_template(template).environment
    return set(meta.find_undeclared_variables(environment.parse(template)))


def check_kwargs(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> None:
    """Refuse a name in `dataset.template_kwargs` that changes nothing, or is not the user's to set.

    Raises:
        UserError: the chat template never reads the name, or the name is one of `GIVEN`.
    """
    if not kwargs:
        return
    read = set().union(*map(variables, _all_of(tokenizer)))
    for name in kwargs:
        key = f"dataset.template_kwargs.{name}"
        if name in GIVEN:
            raise UserError(
                f"{key}: {name} is given to the template by rows and runs; leave it out"
            )
        if name not in read:
            others = sorted(read - GIVEN - set(tokenizer.special_tokens_map))
            raise UserError(
                f"{key}: the chat template of {tokenizer.name_or_path or 'the model'} never reads "
                f"{name}; it reads {', '.join(others) or 'nothing but messages'}"
            )


def _all_of(tokenizer: PreTrainedTokenizerBase) -> Iterable[str]:
    """Return the chat templates of a tokenizer; some have one of their own for tools."""
    template: Any = tokenizer.chat_template
    return template.values() if isinstance(template, dict) else [template]
