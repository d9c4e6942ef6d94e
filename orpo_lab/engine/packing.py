"""Preference pairs -> rows of tokens for a micro-batch each: every prompt once, no padding.

A pair is laid out as `[prompt | chosen | rejected]`. The rejected completion's positions restart at
the prompt's end, and it never sees the chosen one (`engine.attention`); so both are read as if each
stood alone behind the prompt. The prompt's last token predicts the first one of both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from orpo_lab.engine.base import MicroBatch, Pair


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Distribute pairs over rows: longest first, each into the first row with room.

    Args:
        lengths: tokens of each pair.
        budget: tokens of a row; a longer pair has one to itself.

    Returns:
        Rows of indices into `lengths`.
    """
    rows: list[list[int]] = []
    sizes: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        found = (r for r, size in enumerate(sizes) if size + lengths[i] <= budget)
        row = next(found, len(rows))
        if row == len(rows):
            rows.append([])
            sizes.append(0)
        rows[row].append(i)
        sizes[row] += lengths[i]
    return rows


@dataclass
class Collator:
    """Makes an optimizer step's pairs micro-batches."""

    budget: int
    """Tokens of a micro-batch."""
    multiple: int
    """Rows are padded to a multiple of so many tokens."""
    prompt_is_scored: bool
    """Whether the objective needs the prompt's log-probabilities."""
    pad_token_id: int

    def __call__(self, pairs: Sequence[Pair]) -> list[MicroBatch]:
        """Return an optimizer step's micro-batches."""
        rows = pack([sum(sizes_of(pair)) for pair in pairs], self.budget)
        return [self.lay_out([pairs[i] for i in row]) for row in rows]

    def lay_out(self, pairs: Sequence[Pair]) -> MicroBatch:
        """Return one micro-batch: B pairs in a row of T tokens.

        `sizes` are the tokens of prompt, chosen and rejected of each pair. `input_ids` and
        `position_ids` are [1, T]; `parts` [T] numbers the parts, three to a pair, and the padding.
        What is scored is a flat list of N tokens, by pair and by part: `sources` is the place whose
        hidden state predicts it, `targets` its id, `sums` the place in the flattened [B * 3] that
        its log-probability is added to; `counts` [B, 3] says how many each gets.
        """
        sizes = [sizes_of(pair) for pair in pairs]
        input_ids: list[int] = []
        position_ids: list[int] = []
        sources: list[int] = []
        targets: list[int] = []
        for pair, (prompt, chosen, rejected) in zip(pairs, sizes, strict=True):
            start = len(input_ids)
            input_ids += [*pair["prompt_ids"], *pair["chosen_ids"], *pair["rejected_ids"]]
            position_ids += [*range(prompt + chosen), *range(prompt, prompt + rejected)]
            # A token is predicted at the place before it; the rejected completion's first one, as
            # the chosen one's, at the prompt's last
            last = start + prompt - 1
            if self.prompt_is_scored:
                sources += range(start, last)
                targets += pair["prompt_ids"][1:]
            sources += range(last, last + chosen)
            sources += [last, *range(last + chosen + 1, last + chosen + rejected)]
            targets += [*pair["chosen_ids"], *pair["rejected_ids"]]
        padding = -len(input_ids) % self.multiple
        counts = torch.tensor(sizes)
        parts = torch.tensor([*counts.flatten(), padding])
        counts[:, 0] = counts[:, 0] - 1 if self.prompt_is_scored else 0
        return {
            "sizes": sizes,
            "input_ids": torch.tensor([input_ids + [self.pad_token_id] * padding]),
            "position_ids": torch.tensor([position_ids + [0] * padding]),
            "parts": torch.arange(len(parts)).repeat_interleave(parts),
            "sources": torch.tensor(sources),
            "targets": torch.tensor(targets),
            "sums": torch.arange(counts.numel()).repeat_interleave(counts.flatten()),
            "counts": counts,
        }


def sizes_of(pair: Pair) -> tuple[int, int, int]:
    """Return the tokens of a pair's prompt, chosen and rejected."""
    return len(pair["prompt_ids"]), len(pair["chosen_ids"]), len(pair["rejected_ids"])


def tokens_of(micro_batch: MicroBatch) -> int:
    """Return the tokens of a micro-batch, without padding."""
    return sum(sum(sizes) for sizes in micro_batch["sizes"])


def is_one_pair(micro_batch: MicroBatch) -> bool:
    """Return whether a micro-batch cannot be made smaller."""
    return len(micro_batch["sizes"]) == 1
