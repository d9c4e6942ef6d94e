"""Warnings, one line each, about data that have no fault but may not be what the user expects."""

import logging

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from orpo_lab.config.dataset import Dataset
from orpo_lab.data.encode import SIZES
from orpo_lab.data.render import DEFAULT_CHAT_TEMPLATE
from orpo_lab.data.splits import Split

log = logging.getLogger(__name__)

# If more than this share of a split's rows is lost, a warning says so
LARGE_SHARE = 0.1
# The share of the rows that the proposed lengths would keep, in percent
KEPT_PERCENT = 95
# Columns from which other tools build a prompt
LIKELY_PROMPTS = ("system", "system_prompt", "instruction", "input", "context", "history")


def warn_of_unread(split: Split) -> None:
    """Log the columns that are not used; warn of those that are likely a part of the prompt."""
    if not split.unread:
        return
    names = ", ".join(sorted(split.unread)[:20])
    lost = sorted(split.unread.intersection(LIKELY_PROMPTS))
    if lost:
        log.warning(
            "WARNING: %s: the columns %s are not read. What %s says is LOST: make it a part of the "
            "prompt, as a message of role system or as text",
            split.name,
            names,
            " and ".join(f"'{text}'" for text in lost),
        )
    else:
        log.info("%s: the columns %s are not read", split.name, names)


def warn_of_plain_text(split: Split, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn if plain texts are trained unchanged although the model has its own chat template."""
    num = sum(isinstance(row.pair.prompt, str) for row in split.rows)
    if num and tokenizer.chat_template not in (None, DEFAULT_CHAT_TEMPLATE):
        log.warning(
            "WARNING: %s: %d pairs are plain text and are trained without the model's chat "
            "template; to train it as a chat model, give prompts and answers as messages "
            "(docs/data.md)",
            split.name,
            num,
        )


def warn_of_lengths(split: Split, judged: datasets.Dataset, config: Dataset) -> None:
    """Warn if many pairs are too long, and propose lengths that would keep most pairs.

    Args:
        split: a split whose rows are drawn already.
        judged: the tokenized rows that were judged while drawing.
        config: says how long a pair may be.
    """
    num_lost = sum(split.dropped.num(fault) for fault in ("prompt_too_long", "pair_too_long"))
    prompts, chosen, rejected = (np.array(judged[name]) for name in SIZES)
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
        "dataset.max_prompt_length=%d would keep these",
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
    endings = [ending for ending in kept["unused_ending"] if ending]
    if endings:
        log.warning(
            "WARNING: %s: the model's chat template ends a question in %r, and renders %d answers "
            "without that; they are trained and generated without it too",
            split.name,
            endings[0],
            len(endings),
        )
