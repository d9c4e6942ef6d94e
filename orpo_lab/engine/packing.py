"""Pack preference pairs into rows of tokens, a row for each micro-batch.

Every prompt is in the row once, and there is no padding between pairs.

A pair is laid out as `[prompt | chosen | rejected]`. The position ids of the rejected completion
restart at the prompt's end, and the rejected completion never attends to the chosen one
(`engine.attention`). So the model reads each completion as if it stood alone behind the prompt. The
prompt's last token predicts the first token of both completions.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import datasets
import torch
from torch import arange

from orpo_lab.data.encode import MASKS
from orpo_lab.engine.base import COLUMNS, REFERENCE, MicroBatch, Pair


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Distribute pairs over rows: longest first, each into the first row with room.

    Args:
        lengths: the number of tokens of each pair.
        budget: the largest number of tokens in a row; a longer pair gets a row of its own.

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
    """Lays out the pairs of an optimizer step as micro-batches."""

    budget: int
    """The token budget: a micro-batch has at most so many tokens, unless it is a single pair."""
    multiple: int
    """Rows are padded to a multiple of this number of tokens."""
    prompt_is_scored: bool
    """Whether the loss needs the prompt's log-probabilities."""
    pad_token_id: int

    def __call__(self, pairs: Sequence[Pair]) -> list[MicroBatch]:
        """Return the micro-batches of an optimizer step."""
        rows = pack([sum(sizes_of(pair)) for pair in pairs], self.budget)
        return [self.lay_out([pairs[i] for i in row]) for row in rows]

    def lay_out(self, pairs: Sequence[Pair]) -> MicroBatch:
        """Return one micro-batch: B pairs in a row of T tokens, N of which are scored.

        Returns:
            `sizes`: for each pair the numbers of tokens of prompt, chosen and rejected.
            `input_ids`, `position_ids`: [1, T].
            `parts`: the number of each token's part, [T]. Each pair has three parts (prompt,
            chosen, rejected), numbered through the row; the padding is the last part.
            `places`, `first`, `second`, `cu_seq_q`, `cu_seq_k`, `longest`: see `sequences`.
            `sources`: for each scored token the place whose hidden state predicts it, [N].
            `targets`: the id of each scored token, [N].
            `sums`: for each scored token the index, in a flattened [B, 3], of the sum that its
            log-probability belongs to, [N].
            `counts`: how many scored tokens each of these sums has, [B, 3].
            `reference`: of the pairs' own columns of this name, if they have one, the sums of
                chosen and rejected tokens, [B, 2].
        """
        sizes = [sizes_of(pair) for pair in pairs]
        input_ids: list[int] = []
        position_ids: list[int] = []
        sources: list[int] = []
        targets: list[int] = []
        counts: list[tuple[int, int, int]] = []
        for pair, (prompt, chosen, rejected) in zip(pairs, sizes, strict=True):
            start = len(input_ids)
            input_ids += [*pair["prompt_ids"], *pair["chosen_ids"], *pair["rejected_ids"]]
            position_ids += [*range(prompt + chosen), *range(prompt, prompt + rejected)]
            # A token is predicted at the place before it. The first token of either completion is
            # predicted at the prompt's last token
            last = start + prompt - 1
            if self.prompt_is_scored:
                sources += range(start, last)
                targets += pair["prompt_ids"][1:]
            places = [last, *range(last + chosen + 1, last + chosen + rejected)][:rejected]
            masks = supervised(pair)
            sources += compress(range(last, last + chosen), masks[0])
            sources += compress(places, masks[1])
            targets += compress(pair["chosen_ids"], masks[0])
            targets += compress(pair["rejected_ids"], masks[1])
            scored = prompt - 1 if self.prompt_is_scored else 0
            counts.append((scored, sum(masks[0]), sum(masks[1])))
        padding = -len(input_ids) % self.multiple
        parts = torch.tensor([*itertools.chain(*sizes), padding])
        num_scored = torch.tensor(counts)
        references = [pair[REFERENCE][:2] for pair in pairs if REFERENCE in pair]
        return {
            "sizes": sizes,
            "input_ids": torch.tensor([input_ids + [self.pad_token_id] * padding]),
            "position_ids": torch.tensor([position_ids + [0] * padding]),
            "parts": torch.arange(len(parts)).repeat_interleave(parts),
            **sequences(sizes, padding),
            "sources": torch.tensor(sources),
            "targets": torch.tensor(targets),
            "sums": torch.arange(num_scored.numel()).repeat_interleave(num_scored.flatten()),
            "counts": num_scored,
            REFERENCE: torch.tensor(references) if references else None,
        }


def sequences(sizes: Sequence[tuple[int, int, int]], padding: int) -> dict[str, Any]:
    """Return how a row of B pairs and T tokens is read as 2B sequences.

    The sequences of a pair are the prompt with the chosen completion, and the rejected completion
    behind a copy of the prompt's keys. Padding is one more sequence. Queries stay in the row's
    order. Keys are spread, so that the keys of each sequence are neighbours: there are S > T keys.

    Args:
        sizes: for each pair the numbers of tokens of prompt, chosen and rejected.
        padding: the number of tokens of padding behind the last pair.

    Returns:
        `places`: for each spread key the place of its token in the row, [S].
        `first`: for each token the place of its key among the spread keys, [T].
        `second`: for each token the place of its key's copy; -1: the key has no copy, [T].
        `cu_seq_q`, `cu_seq_k`: the place of each sequence's first query among the queries, and of
            its first key among the spread keys; then T and S. int32, [2B + 1], with padding
            [2B + 2].
        `longest`: the number of keys of the longest sequence.
    """
    places, first, second = [], [], []
    cu_seq_q, cu_seq_k = [0], [0]
    for prompt, chosen, rejected in sizes:
        start, key = cu_seq_q[-1], cu_seq_k[-1]
        middle, copy = start + prompt + chosen, key + prompt + chosen
        copied = prompt if rejected else 0  # no keys for a sequence without queries
        end, behind = middle + rejected, copy + copied
        places += [arange(start, middle), arange(start, start + copied), arange(middle, end)]
        first += [arange(key, copy), arange(behind, behind + rejected)]
        second += [arange(copy, behind), torch.full((end - start - copied,), -1)]
        cu_seq_q += [middle, end]
        cu_seq_k += [copy, behind + rejected]
    if padding:
        start, key = cu_seq_q[-1], cu_seq_k[-1]
        places.append(arange(start, start + padding))
        first.append(arange(key, key + padding))
        second.append(torch.full((padding,), -1))
        cu_seq_q.append(start + padding)
        cu_seq_k.append(key + padding)
    return {
        "places": torch.cat(places),
        "first": torch.cat(first),
        "second": torch.cat(second),
        "cu_seq_q": torch.tensor(cu_seq_q, dtype=torch.int32),
        "cu_seq_k": torch.tensor(cu_seq_k, dtype=torch.int32),
        "longest": max(end - start for start, end in itertools.pairwise(cu_seq_k)),
    }


def sizes_of(pair: Pair) -> tuple[int, int, int]:
    """Return the numbers of tokens of a pair's prompt, chosen and rejected completion."""
    return len(pair["prompt_ids"]), len(pair["chosen_ids"]), len(pair["rejected_ids"])


def supervised(pair: Pair) -> list[list[bool]]:
    """Return for each token of a pair's chosen and rejected completion whether it is supervised."""
    return [
        pair.get(mask) or [True] * len(pair[ids])
        for mask, ids in zip(MASKS, COLUMNS[1:], strict=True)
    ]


def num_supervised(pairs: datasets.Dataset) -> torch.Tensor:
    """Return the numbers of supervised tokens of chosen and rejected completions, [N, 2]."""
    if MASKS[0] in pairs.column_names:
        return torch.tensor([[sum(mask) for mask in pairs[name]] for name in MASKS]).mT
    return torch.tensor([[len(ids) for ids in pairs[name]] for name in COLUMNS[1:]]).mT


def tokens_of(micro_batch: MicroBatch) -> int:
    """Return the number of tokens of a micro-batch, without padding."""
    return sum(sum(sizes) for sizes in micro_batch["sizes"])


def by_length(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Distribute sequences over padded batches, each of sequences of similar length.

    Args:
        lengths: the number of tokens of each sequence.
        budget: the largest number of tokens in a batch, padding included; a longer sequence gets a
            batch of its own.

    Returns:
        Batches of indices into `lengths`; the longest sequence of a batch comes first.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def halved(budget: int, rows: Sequence[Sequence[tuple[int, int, int]]]) -> int | None:
    """Return half of a token budget, or of the widest row's tokens if these are fewer.

    Args:
        budget: the budget that the rows were packed with.
        rows: for each row the sizes of its pairs, as `sizes_of` returns them.

    Returns:
        The lower budget; None: every row is a single pair, and cannot be made smaller.
    """
    if all(len(row) == 1 for row in rows):
        return None
    return min(max(sum(map(sum, row)) for row in rows), budget) // 2
