"""Warnings, one line each, about data that have no fault but may not be what the user expects."""

import logging
from collections.abc import Collection

import datasets
import numpy as np

from orpo_lab.config.dataset import Dataset
from orpo_lab.data.encode import SIZES
from orpo_lab.data.recognise import SYSTEM, WINNER
from orpo_lab.data.splits import Split
from orpo_lab.data.turns import MEDIA

log = logging.getLogger(__name__)

# If more than this share of a split's rows is lost, a warning says so
LARGE_SHARE = 0.1
# The share of the rows that the proposed lengths would keep, in percent
KEPT_PERCENT = 95
# Columns that hold a conversation; beside pairs of conversations they are copies (UltraFeedback)
CONVERSATIONS = ("conversations", "conversation", "messages")
# Columns from which other tools build a prompt
LIKELY_PROMPTS = (*SYSTEM, "instruction", "input", "context", "history", *CONVERSATIONS)
# Columns that often say which answer is better
LIKELY_ORDERS = (*WINNER, "rank", "ranks", "score", "scores", "rating", "ratings", "label")


def warn_of_unread(split: Split) -> None:
    """Log the columns that are not used; warn of those that likely say something that matters."""
    if not split.unread:
        return
    log.info("%s: the columns %s are not read", split.name, ", ".join(sorted(split.unread)[:20]))
    first = split.pool[0].pair if len(split.pool) else None
    is_conversation = first is not None and isinstance(first.prompt, list) and not first.wrapped
    copies = CONVERSATIONS if is_conversation else ()
    if lost := _named(split, [name for name in LIKELY_PROMPTS if name not in copies]):
        log.warning(
            "WARNING: %s: What %s says is LOST, since it is no part of the prompt: name such "
            "columns in dataset.columns (system, input, history), or put them into the prompt",
            split.name,
            lost,
        )
    if lost := _named(split, [name for name in split.unread if name.startswith(MEDIA)]):
        log.warning(
            "WARNING: %s: What %s holds is LOST, since pictures, sound and films are not read: "
            "answers are trained as if they were not there",
            split.name,
            lost,
        )
    if lost := _named(split, LIKELY_ORDERS):
        log.warning(
            "WARNING: %s: one answer of a row is trained as the better answer, whatever %s says; "
            "dataset=ranked, scored and arena read such columns (docs/data.md)",
            split.name,
            lost,
        )


def _named(split: Split, columns: Collection[str]) -> str:
    return " and ".join(f"'{name}'" for name in sorted(split.unread.intersection(columns)))


def warn_of_lengths(split: Split, judged: datasets.Dataset, config: Dataset) -> None:
    """Warn if many pairs are too long, and propose lengths that would keep most pairs.

    Args:
        split: a split whose rows are drawn already.
        judged: the tokenized rows that were judged while drawing.
        config: says how long a pair may be.
    """
    num_lost = sum(split.dropped.num(fault) for fault in ("prompt_too_long", "pair_too_long"))
    prompts, chosen, rejected = (np.array(judged[name][:]) for name in SIZES)
    tokens = prompts + np.maximum(chosen, rejected)
    tokens, prompts = tokens[tokens > 0], prompts[tokens > 0]
    if num_lost <= LARGE_SHARE * len(tokens):
        return
    # "higher" gives a length that a row really has
    middle, most = np.percentile(tokens, [50, KEPT_PERCENT], method="higher")
    prompt = np.percentile(prompts, KEPT_PERCENT, method="higher")
    log.warning(
        "WARNING: %s: %d of %d pairs (%.0f %%) are too long for dataset.max_length=%d and "
        "dataset.max_prompt_length=%d. Half of the pairs have more than %d tokens, %d %% have at "
        "most %d, and as many prompts at most %d: dataset.max_length=%d "
        "dataset.max_prompt_length=%d would keep these, if the model's context is that long",
        split.name,
        num_lost,
        len(tokens),
        100 * num_lost / len(tokens),
        config.max_length,
        config.max_prompt_length,
        middle,
        KEPT_PERCENT,
        most,
        prompt,
        most,
        min(prompt, most - 1),
    )


def warn_of_losses(split: Split) -> None:
    """Warn if the chat template makes many rows be dropped."""
    for fault in ("template_error", "misrendered", "unrendered_text", "prefilled_answer"):
        num = split.dropped.num(fault)
        if num > LARGE_SHARE * split.num_rows:
            log.warning(
                "WARNING: %s: %d of %d rows are dropped (%s), such as: %s",
                split.name,
                num,
                split.num_rows,
                fault,
                split.dropped.report()[fault].get("example", ""),
            )


def warn_of_unused_ending(split: Split, kept: datasets.Dataset) -> None:
    """Warn if the template leaves out the end of the generation prompt before an answer."""
    endings = [ending for ending in kept["unused_ending"][:] if ending]
    if endings:
        log.warning(
            "WARNING: %s: the model's chat template ends a question in %r, and renders %d answers "
            "without that; they are trained and generated without it too",
            split.name,
            endings[0],
            len(endings),
        )
