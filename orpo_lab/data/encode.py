"""A preference pair -> token ids that fit, or the fault for which it is dropped.

For pairs that fit, the ids are those of TRL's `ORPOTrainer` on the same row; a test holds them
against it. What TRL does with the others (completions cut to nothing, which turn every weight to
NaN) does not happen here: see `fit`.
"""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from orpo_lab.config import Columns, Dataset
from orpo_lab.data.pairs import Content, Message, Pair, num_shared, split, to_content

Ids = list[int]


def encode_row(
    row: Mapping[str, Any],
    index: int,
    *,
    columns: Columns,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
) -> dict[str, Any]:
    """Return a row's `prompt_ids`, `chosen_ids`, `rejected_ids` and what happened to it.

    `fault` is empty, or the reason why the row is dropped, in which case the ids are empty;
    `cut`, `contradicted` and `repeated` are flags; `prompt_text` and `chosen_text` are for people.

    Raises:
        UserError: the row is not a preference pair at all; the message names it.
    """
    where = f"{source}, row {index}"
    chosen, rejected = (
        to_content(row[column], f"{where}: {column}")
        for column in (columns.chosen, columns.rejected)
    )
    prompt = columns.prompt and row.get(columns.prompt)
    if prompt is not None:
        prompt = to_content(prompt, f"{where}: {columns.prompt}")
    pair = split(prompt, chosen, rejected, where)
    result: dict[str, Any] = {
        "prompt_ids": [],
        "chosen_ids": [],
        "rejected_ids": [],
        "prompt_text": "",
        "chosen_text": "",
        "fault": find_fault(pair),
        "cut": False,
        "contradicted": pair.contradicted,
        "repeated": pair.repeated,
    }
    if not result["fault"]:
        texts = render(pair, tokenizer)
        ids, result["fault"], result["cut"] = fit(*tokenize(*texts, tokenizer), dataset)
        if not result["fault"]:
            result["prompt_ids"], result["chosen_ids"], result["rejected_ids"] = ids
        result["prompt_text"], result["chosen_text"] = texts[:2]
    return result


def find_fault(pair: Pair) -> str:
    """Return why a pair teaches nothing, before it is tokenized; empty if nothing is wrong."""
    if not _text(pair.prompt).strip():
        return "empty_prompt"
    if not (_text(pair.chosen).strip() and _text(pair.rejected).strip()):
        return "empty_completion"
    if pair.chosen == pair.rejected:
        return "chosen_equals_rejected"
    return ""


def _text(content: Content) -> str:
    if isinstance(content, str):
        return content
    return "".join(message["content"] for message in content)


def render(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """Return a pair's prompt, chosen and rejected as text, messages through the chat template.

    The template is applied once to the whole conversation; the prompt ends in the generation
    prompt, as it will when the model is asked.
    """
    if isinstance(pair.prompt, str):
        return pair.prompt, str(pair.chosen), str(pair.rejected)
    assert isinstance(pair.chosen, list)
    assert isinstance(pair.rejected, list)
    answered = pair.prompt[-1]["role"] == "assistant"

    def apply(messages: list[Message], **options: bool) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))

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
    """

    def ids(text: str) -> Ids:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    alone, with_chosen, with_rejected = ids(prompt), ids(prompt + chosen), ids(prompt + rejected)
    size = min(num_shared(alone, with_chosen), num_shared(alone, with_rejected))
    prompt_ids = alone[:size]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and prompt_ids[:1] != [bos]:
        prompt_ids = [bos, *prompt_ids]
    completions = [side[size:] for side in (with_chosen, with_rejected)]
    chosen_ids, rejected_ids = (
        side if side[-1:] == [eos] else [*side, eos] for side in completions
    )
    return prompt_ids, chosen_ids, rejected_ids


def fit(
    prompt: Ids, chosen: Ids, rejected: Ids, dataset: Dataset
) -> tuple[tuple[Ids, Ids, Ids], str, bool]:
    """Make a pair fit by `dataset.overlong`: return its ids, the fault if it is dropped, and
    whether it was cut.

    - `drop`: no pair is cut.
    - `cut_prompt`: the prompt loses its beginning (not its BOS), down to `max_prompt_length` and
      to the room the longer completion leaves.
    - `cut_completion`: a completion loses its end, and its EOS with it, where prompt and
      completion exceed `max_length`; a prompt above `max_prompt_length` is still dropped.

    Neither side is ever cut to nothing, and a pair that the cut made identical is dropped. So is
    one without a prompt token (no BOS, and every character merged into the answer's first token),
    behind which nothing would predict that first token.
    """
    if not prompt:
        return (prompt, chosen, rejected), "empty_prompt", False
    longest = max(len(chosen), len(rejected))
    room = min(dataset.max_prompt_length, dataset.max_length - longest)
    if len(prompt) <= room:
        return (prompt, chosen, rejected), "", False
    if dataset.overlong == "cut_prompt" and room >= 2:
        return (prompt[:1] + prompt[1 - room :], chosen, rejected), "", True
    if dataset.overlong == "cut_completion" and len(prompt) <= dataset.max_prompt_length:
        left = dataset.max_length - len(prompt)
        chosen, rejected = chosen[:left], rejected[:left]
        fault = "chosen_equals_rejected_after_cut" if chosen == rejected else ""
        return (prompt, chosen, rejected), fault, True
    too_long = "prompt" if len(prompt) > dataset.max_prompt_length else "pair"
    return (prompt, chosen, rejected), f"{too_long}_too_long", False
