"""A preference pair -> token ids that fit, or the fault for which it is dropped.

For pairs that fit, the ids are those of TRL's `ORPOTrainer` on the same row; a test holds them
against it. What TRL does with the others (completions cut to nothing, which turn every weight to
NaN) does not happen here: see `fit`.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from orpo_lab.config import Dataset
from orpo_lab.data.faults import Fault
from orpo_lab.data.pairs import Message, Pair, num_shared
from orpo_lab.errors import one_line

Ids = list[int]


def encode_row(
    row: Mapping[str, Any], *, dataset: Dataset, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Return a pair's `prompt_ids`, `chosen_ids`, `rejected_ids` and what happened to it.

    `fault` is empty, or the reason why the row is dropped, in which case the ids are empty;
    `cut` is a flag; `prompt_text` and `chosen_text` are for people.

    Args:
        row: its `pair` is prompt, chosen and rejected as JSON.
        dataset: says how long a pair may be.
        tokenizer: the model's, with a chat template if there are messages.
    """
    pair = Pair(*json.loads(row["pair"]))
    ids: tuple[Ids, Ids, Ids] = ([], [], [])
    texts = ("", "", "")
    name, detail, cut = "", "", False
    try:
        texts = render(pair, tokenizer)
        ids, cut = fit(*tokenize(*texts, tokenizer), dataset)
    except Fault as fault:
        name, detail = fault.name, fault.detail
    return {
        **dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), ids, strict=True)),
        "prompt_text": texts[0],
        "chosen_text": texts[1],
        "fault": name,
        "detail": detail,
        "cut": cut,
    }


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return what matches the text of any token that controls the model."""
    added = tokenizer.added_tokens_decoder.values()
    texts = {*tokenizer.all_special_tokens, *(str(one) for one in added if one.special)}
    # Nothing matches where there are none
    return re.compile("|".join(map(re.escape, sorted(texts))) or r"(?!)")


def render(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """Return a pair's prompt, chosen and rejected as text, messages through the chat template.

    The template is applied once to the whole conversation; the prompt ends in the generation
    prompt, as it will when the model is asked.

    Raises:
        Fault: the template refuses the conversation.
    """
    if isinstance(pair.prompt, str):
        return pair.prompt, str(pair.chosen), str(pair.rejected)
    assert isinstance(pair.chosen, list)
    assert isinstance(pair.rejected, list)
    answered = pair.prompt[-1]["role"] == "assistant"

    def apply(messages: list[Message], **options: bool) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except (TemplateError, TypeError, ValueError) as error:
            detail = f"the model's chat template refuses it: {one_line(error)[:200]}"
            raise Fault("template_error", detail) from error

    prompt = apply(pair.prompt, add_generation_prompt=not answered, continue_final_message=answered)
    chosen = apply(pair.prompt + pair.chosen)
    rejected = apply(pair.prompt + pair.rejected)
    # Some templates add to the generation prompt what they leave out before an answer
    size = min(num_shared(prompt, chosen), num_shared(prompt, rejected))
    return prompt[:size], chosen[size:], rejected[size:]


def tokenize(
    prompt: str, chosen: str, rejected: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[Ids, Ids, Ids]:
    """Return the ids of prompt and completions: one BOS in front, an EOS behind each completion.

    A tokenizer may merge the prompt's last characters with an answer's first; the prompt is then
    what all three tokenizations share.

    Raises:
        Fault: the tokenizer makes nothing of a completion, or the same of both, or nothing is left
            of the prompt (no BOS, and every character merged into the answer's first token), behind
            which nothing would predict that first token.
    """

    def ids(text: str) -> Ids:
        # Not verbose: what is too long for the model is told by `fit`
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    alone, with_chosen, with_rejected = ids(prompt), ids(prompt + chosen), ids(prompt + rejected)
    size = min(num_shared(alone, with_chosen), num_shared(alone, with_rejected))
    prompt_ids = alone[:size]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and prompt_ids[:1] != [bos]:
        prompt_ids = [bos, *prompt_ids]
    completions = [side[size:] for side in (with_chosen, with_rejected)]
    if not prompt_ids:
        raise Fault("empty_prompt", "the prompt has no token of its own")
    if not all(completions):
        raise Fault("empty_completion", "chosen or rejected has no token")
    chosen_ids, rejected_ids = (
        side if side[-1:] == [eos] else [*side, eos] for side in completions
    )
    if chosen_ids == rejected_ids:
        raise Fault("chosen_equals_rejected", "chosen and rejected are the same tokens")
    return prompt_ids, chosen_ids, rejected_ids


def fit(
    prompt: Ids, chosen: Ids, rejected: Ids, dataset: Dataset
) -> tuple[tuple[Ids, Ids, Ids], bool]:
    """Make a pair fit by `dataset.overlong`: return its ids and whether it was cut.

    - `drop`: no pair is cut.
    - `cut_prompt`: the prompt loses its beginning (not its BOS), down to `max_prompt_length` and
      to the room the longer completion leaves.
    - `cut_completion`: a completion loses its end, and its EOS with it, where prompt and
      completion exceed `max_length`; a prompt above `max_prompt_length` is still dropped.

    Neither side is ever cut to nothing.

    Raises:
        Fault: the pair does not fit, or the cut has made both completions the same.
    """
    longest = max(len(chosen), len(rejected))
    room = min(dataset.max_prompt_length, dataset.max_length - longest)
    if len(prompt) <= room:
        return (prompt, chosen, rejected), False
    if dataset.overlong == "cut_prompt" and room >= 2:
        return (prompt[:1] + prompt[1 - room :], chosen, rejected), True
    if len(prompt) > dataset.max_prompt_length:
        raise Fault("prompt_too_long", f"the prompt has {len(prompt)} tokens")
    if dataset.overlong != "cut_completion":
        raise Fault("pair_too_long", f"prompt and completion have {len(prompt) + longest} tokens")
    left = dataset.max_length - len(prompt)
    if chosen[:left] == rejected[:left]:
        raise Fault("chosen_equals_rejected_after_cut", "chosen and rejected are cut to the same")
    return (prompt, chosen[:left], rejected[:left]), True
