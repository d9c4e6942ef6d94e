"""A judge's verdicts on two lists of answers: asked for, and kept on the disk as they come.

Verdicts lie in `verdicts.jsonl` of a folder, a line for every reply. A line is found again by what
was asked: judge, prompt and both answers in their order. So whoever is stopped goes on where it
was, and answers that are the same in another comparison are not judged again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from xxhash import xxh3_64_hexdigest

from orpo_lab import program
from orpo_lab.config.judge import EndpointJudge
from orpo_lab.curate import question
from orpo_lab.curate.ask import Answer, Answerer, Request
from orpo_lab.curate.folder import append, held, read_lines
from orpo_lab.curate.question import VERSION, Place, Tally
from orpo_lab.errors import UserError
from orpo_lab.judge.win_rate import Judged, WinRate, win_rate

if TYPE_CHECKING:
    from orpo_lab.curate.endpoint import Endpoint

FILE = "verdicts.jsonl"


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt."""

    prompt: str
    a: str
    b: str


@dataclass(frozen=True)
class Verdict:
    """A reply of a judge, as a line of the file."""

    id: str
    judge: str
    prompt: str
    place: Place | None
    """The place that the reply names; None: it names none."""
    counts: bool
    """False: the first reply that names nothing, after which the judge is asked once more."""
    unclear: str
    """A reply that names nothing; empty: it names a place or a tie."""
    created: str


def open_judge(judge: EndpointJudge, url_option: str = "judge.url") -> "Endpoint":
    """Return the judge, without asking it anything.

    Args:
        judge: which judge, and how it is asked.
        url_option: where the user gives the URL, for messages.

    Raises:
        UserError: the package openai is not installed, or the URL or the key holds what it should
            not.
    """
    try:
        from orpo_lab.curate.endpoint import Endpoint
    except ModuleNotFoundError as error:
        if str(error.name).startswith("orpo_lab"):
            raise
        raise UserError(f"{error.name} is not installed: {program.install('judge')}") from error
    return Endpoint(
        judge.model,
        judge.url,
        url_option=url_option,
        key_variable=judge.key_variable,
        concurrency=judge.concurrency,
        rate=judge.rate,
        timeout=judge.timeout,
        retries=judge.retries,
    )


def compare(
    judge: Answerer, pairs: Sequence[Pair], folder: Path, max_new_tokens: int
) -> tuple[WinRate, Tally]:
    """Have a judge compare the answers of pairs, and return how often A wins.

    Args:
        judge: the judge.
        pairs: the answers, a pair for each prompt.
        folder: where `verdicts.jsonl` is or comes to be.
        max_new_tokens: the largest number of tokens of a reply.

    Returns:
        The win rate, and what this call has brought.

    Raises:
        UserError: no request can be answered, no prompt has two verdicts that can be read, or
            another process works in the folder.
        OSError: the folder cannot be written to.
    """
    name = f"{judge.name} (prompt {VERSION})"
    different = [pair for pair in pairs if pair.a != pair.b]
    requests: dict[str, Request] = {}
    asked: dict[str, Pair] = {}
    for pair in different:
        for first, second in ((pair.a, pair.b), (pair.b, pair.a)):
            id = _id(name, pair.prompt, first, second)
            requests[id] = question.request(id, pair.prompt, first, second, max_new_tokens)
            asked[id] = pair
    with held(folder):
        verdicts = _read(folder / FILE)

        def keep(id: str, place: Place | None, reply: Answer, counts: bool) -> None:
            unclear = "" if place else reply.text
            created = datetime.now(UTC).isoformat(timespec="seconds")
            verdict = Verdict(id, name, asked[id].prompt, place, counts, unclear, created)
            append(folder / FILE, [verdict])
            verdicts[id] = verdict

        have = {id for id, verdict in verdicts.items() if verdict.counts}
        first_replies = {id: one.unclear for id, one in verdicts.items() if not one.counts}
        tally = question.ask(judge, list(requests.values()), have, keep, first_replies)
    judged = [one for pair in different if (one := _judged(name, pair, verdicts))]
    try:
        found = win_rate(
            judged,
            num_equal=len(pairs) - len(different),
            num_missing=len(different) - len(judged),
        )
    except ValueError as error:
        why = "; ".join([f"{num} times: {reason}" for reason, num in tally.failed.most_common(1)])
        raise UserError(f"{judge.name}: {error}{why and f' ({why})'}") from error
    return found, tally


def _judged(judge: str, pair: Pair, verdicts: Mapping[str, Verdict]) -> Judged | None:
    """Return what a judge says of a pair; None: a question has no reply that counts yet."""
    orders = (pair.a, pair.b), (pair.b, pair.a)
    found = [verdicts.get(_id(judge, pair.prompt, *order)) for order in orders]
    a_first, b_first = found
    if a_first is None or b_first is None or not (a_first.counts and b_first.counts):
        return None
    return Judged(a_first.place, b_first.place, len(pair.a) - len(pair.b))


def _id(judge: str, prompt: str, first: str, second: str) -> str:
    return xxh3_64_hexdigest(json.dumps([judge, prompt, first, second]).encode())


def _read(file: Path) -> dict[str, Verdict]:
    """Return the last verdict of every id."""
    return {one.id: one for one in read_lines(file, Verdict)} if file.is_file() else {}
