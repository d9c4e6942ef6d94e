"""Tokenize a preference pair: return token ids that fit, or the fault for which it is dropped.

For pairs that fit, the ids are the same as those of TRL's `ORPOTrainer` for the same row; a test
compares the two. TRL cuts longer pairs so that a completion may become empty, which makes every
weight NaN. This does not happen here: see `fit`.
"""

import json
import re
from collections.abc import Mapping
from datetime import date
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from orpo_lab import progress
from orpo_lab.config.dataset import Dataset
from orpo_lab.data import supervised
from orpo_lab.data.faults import Fault
from orpo_lab.data.pairs import Pair, in_words, num_shared
from orpo_lab.data.render import Rendered, applier, find_unrendered, render
from orpo_lab.data.rows import Row
from orpo_lab.errors import UserError, one_line

Ids = list[int]

# Columns that say which tokens of the completions are supervised; without them all are
MASKS = ("chosen_mask", "rejected_mask")
# Columns with the numbers of tokens of a pair before any cut
SIZES = ("num_prompt_tokens", "num_chosen_tokens", "num_rejected_tokens")
# A process of its own takes about a second to start, in which a thousand rows are tokenized
ROWS_PER_PROCESS = 4000
# Columns that say how a pair was tokenized, in addition to its ids and texts
FOUND = (*SIZES, "unused_ending")


class Encoder:
    """Tokenizes each row once, in `dataset.num_proc` processes; returns them on request.

    Args:
        dataset: says how long a pair may be.
        tokenizer: the model's tokenizer.
        today: the date for chat templates that ask for a date.
        num_idle: the largest number of processes where `dataset.num_proc` is null; each of them
            gets at least ROWS_PER_PROCESS rows.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        today: date,
        *,
        num_idle: int = 1,
    ) -> None:
        self._dataset, self._num_idle = dataset, num_idle
        self._options = {"dataset": dataset, "tokenizer": tokenizer, "today": today}
        self._blocks: list[datasets.Dataset] = []
        self._size = 0

    def encode(self, rows: list[Row]) -> None:
        """Tokenize the rows that are not tokenized yet; set their `place` and faults (`found`).

        Raises:
            UserError: a process that tokenizes has died.
        """
        rows = [row for row in rows if row.place is None]
        if not rows:
            return
        block = self._map(rows)
        for at, (row, faults) in enumerate(zip(rows, block["faults"][:], strict=True)):
            row.place = self._size + at
            row.found = [Fault(*fault) for fault in json.loads(faults)]
        self._blocks.append(block)
        self._size += len(block)

    def encoded(self, rows: list[Row]) -> datasets.Dataset:
        """Return the results of `encode_row` for tokenized rows, in the order of `rows`."""
        return datasets.concatenate_datasets(self._blocks).select([row.place for row in rows])

    def _map(self, rows: list[Row]) -> datasets.Dataset:
        # As JSON: a column of a dataset cannot hold strings in one row and messages in another
        given = [{"pair": to_json(row.pair), **row.checks} for row in rows]
        try:
            with progress.Work(f"tokenize {len(rows)} rows", has_bar=True):
                return datasets.Dataset.from_list(given).map(
                    encode_row,
                    fn_kwargs=self._options,
                    num_proc=self._dataset.num_proc or self._num_processes(len(rows)),
                    # A cache that outlives a change of this code would train on old ids
                    load_from_cache_file=False,
                    remove_columns=["pair"],
                    desc="tokenize",
                )
        except RuntimeError as error:
            if "abruptly died" not in str(error):
                raise
            # The process was killed, for example because memory ran out
            raise UserError(
                f"a process that tokenizes has died ({one_line(error)[:200]}); lower "
                "dataset.num_proc, or set it to null"
            ) from error

    def _num_processes(self, num_rows: int) -> int | None:
        """Return how many processes tokenize where `dataset.num_proc` is null; None: this one."""
        num = min(self._num_idle, num_rows // ROWS_PER_PROCESS)
        return num if num > 1 else None


def to_json(pair: Pair) -> str:
    """Return a pair as JSON for `encode_row`; so rows may hold values of different types."""
    return json.dumps([pair.prompt, pair.chosen, pair.rejected, pair.context, pair.label])


def encode_row(
    row: Mapping[str, Any], *, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, today: date
) -> dict[str, Any]:
    """Return the token ids of a pair, and what was found while tokenizing.

    Args:
        row: its `pair` holds prompt, chosen, rejected, context and label of a `Pair` as JSON.
        dataset: says how long a pair may be.
        tokenizer: the model's tokenizer, with a chat template if there are messages.
        today: the date for templates that ask for a date.

    Returns:
        `prompt_ids`, `chosen_ids`, `rejected_ids`: empty if a fault leaves no pair. Of a single
            completion the side that its label does not name is empty.
        `chosen_mask`, `rejected_mask`: whether each token of a completion is supervised; only with
            a `dataset.supervised` that leaves tokens out.
        `prompt_text`, `chosen_text`: the rendered texts, for people.
        `asked`: the prompt without the chat template, for judges.
        `unused_ending`: see `Rendered`.
        SIZES: numbers of tokens of prompt, chosen and rejected before any cut; 0 if there are no
            tokens. Of a single completion both sides count.
        `cut`: whether the pair was cut.
        `faults`: names and details of the faults, as JSON.
    """
    prompt, chosen, rejected, context, label = json.loads(row["pair"])
    pair = Pair(prompt, chosen, rejected, context=context, label=label)
    ids: tuple[Ids, Ids, Ids] = ([], [], [])
    rendered = Rendered("", "", "")
    masks: list[list[bool]] = [[], []]
    sizes, cut = [0, 0, 0], False
    faults: list[Fault] = []
    try:
        rendered = render(pair, tokenizer, today, dataset.template_kwargs)
        faults += find_unrendered(pair, rendered, tokenizer)
        whole = tokenize(rendered.prompt, rendered.chosen, rendered.rejected, tokenizer)
        if whole[1] == whole[2] and label is None:
            raise Fault("chosen_equals_rejected", "chosen and rejected are the same tokens")
        sizes = [len(part) for part in whole]
        fitting, cut = fit(*whole, dataset)
        masks = _masks(pair, rendered, whole, fitting, dataset, tokenizer, today)
        ids = _labelled(*fitting, label)
        masks = [mask if side else [] for mask, side in zip(masks, ids[1:], strict=True)]
    except Fault as fault:
        faults.append(fault)
    return {
        **dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), ids, strict=True)),
        **(dict(zip(MASKS, masks, strict=True)) if dataset.supervised != "completion" else {}),
        "prompt_text": rendered.prompt,
        "chosen_text": rendered.chosen,
        "asked": in_words(prompt),
        "unused_ending": rendered.unused_ending,
        **dict(zip(SIZES, sizes, strict=True)),
        "cut": cut,
        "faults": json.dumps([(fault.name, fault.detail) for fault in faults]),
    }


def _labelled(prompt: Ids, chosen: Ids, rejected: Ids, label: bool | None) -> tuple[Ids, Ids, Ids]:
    """Return the ids of a pair, or those of a single completion without its other side."""
    match label:
        case True:
            return prompt, chosen, []
        case False:
            return prompt, [], rejected
    return prompt, chosen, rejected


def _masks(
    pair: Pair,
    rendered: Rendered,
    whole: tuple[Ids, Ids, Ids],
    kept: tuple[Ids, Ids, Ids],
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    today: date,
) -> list[list[bool]]:
    """Return which tokens of both completions are supervised, in the order of MASKS.

    Args:
        pair: the pair.
        rendered: its texts.
        whole: its token ids before any cut.
        kept: its token ids after the cut.
        dataset: says which turns are supervised.
        tokenizer: the model's tokenizer.
        today: the date for templates that ask for a date.

    Raises:
        Fault: the turns of an answer cannot be told apart, or the cut leaves no supervised token.
    """
    if dataset.supervised == "completion":
        return [[], []]
    apply = applier(pair, tokenizer, today, dataset.template_kwargs)
    found = []
    for side, text, ids, left in zip(
        (pair.chosen, pair.rejected),
        (rendered.chosen, rendered.rejected),
        whole[1:],
        kept[1:],
        strict=True,
    ):
        spans = supervised.spans(pair.prompt, side, text, apply, dataset.supervised)
        mask = supervised.mask(rendered.prompt, text, spans, (whole[0], ids), tokenizer)
        if not any(mask[: len(left)]):
            raise Fault("pair_too_long", "the cut leaves no supervised token of an answer")
        found.append(mask[: len(left)])
    return found


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return a pattern that matches the text of any token that controls the model."""
    added = tokenizer.added_tokens_decoder.values()
    texts = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
    # Without such tokens the pattern matches nothing
    return re.compile("|".join(map(re.escape, sorted(texts))) or r"(?!)")


def tokenize(
    prompt: str, chosen: str, rejected: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[Ids, Ids, Ids]:
    """Return the ids of prompt and completions; each completion ends in an EOS.

    The prompt begins with one BOS if the tokenizer has a BOS.

    A tokenizer may merge the last characters of the prompt with the first characters of an answer.
    Then the prompt is what all three tokenizations (prompt, with chosen, with rejected) share.

    Raises:
        Fault: a completion has no tokens, or the prompt has no tokens. A prompt has none if the
            tokenizer has no BOS and merges all of the prompt into the answer's first token, which
            nothing could predict then.
    """

    texts = [prompt, prompt + chosen, prompt + rejected]
    # In one call, which takes them side by side. Not verbose: `fit` reports a pair that is too long
    # for the model
    found = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    alone, with_chosen, with_rejected = map(list, found)
    size = min(num_shared(alone, with_chosen), num_shared(alone, with_rejected))
    prompt_ids = alone[:size]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and prompt_ids[:1] != [bos]:
        prompt_ids = [bos, *prompt_ids]
    completions = [side[size:] for side in (with_chosen, with_rejected)]
    if not prompt_ids:
        raise Fault("empty_prompt", "the prompt has no token of its own")
    if not all(completions):
        raise Fault("empty_completion", "an answer has no token")
    chosen_ids, rejected_ids = (
        side if side[-1:] == [eos] else [*side, eos] for side in completions
    )
    return prompt_ids, chosen_ids, rejected_ids


def fit(
    prompt: Ids, chosen: Ids, rejected: Ids, dataset: Dataset
) -> tuple[tuple[Ids, Ids, Ids], bool]:
    """Make a pair fit by `dataset.overlong`; return its ids, and whether the pair was cut.

    - `drop`: no pair is cut.
    - `cut_prompt`: the beginning of the prompt is cut off, but not its first token (the BOS). The
      prompt then fits `max_prompt_length`, and leaves room for the longer completion.
    - `cut_completion`: if prompt and completion exceed `max_length`, the end of the completion is
      cut off, with its EOS. A pair with a prompt above `max_prompt_length` is still dropped.

    No prompt and no completion is ever cut to nothing.

    Raises:
        Fault: the pair does not fit, or the cut makes both completions the same.
    """
    longest = max(len(chosen), len(rejected))
    room = min(dataset.max_prompt_length, dataset.max_length - longest)
    if len(prompt) <= room:
        return (prompt, chosen, rejected), False
    if dataset.overlong == "cut_prompt" and room >= 2:
        return (prompt[:1] + prompt[1 - room :], chosen, rejected), True
    if len(prompt) > dataset.max_prompt_length:
        allowed = f"dataset.max_prompt_length={dataset.max_prompt_length}"
        raise Fault("prompt_too_long", f"the prompt has {len(prompt)} tokens, {allowed}")
    if dataset.overlong != "cut_completion":
        size, allowed = len(prompt) + longest, f"dataset.max_length={dataset.max_length}"
        raise Fault("pair_too_long", f"prompt and completion have {size} tokens, {allowed}")
    left = dataset.max_length - len(prompt)
    if chosen[:left] == rejected[:left] and chosen != rejected:
        raise Fault("chosen_equals_rejected_after_cut", "chosen and rejected are cut to the same")
    return (prompt, chosen[:left], rejected[:left]), True
