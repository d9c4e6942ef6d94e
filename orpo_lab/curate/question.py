"""The question to a judge: which of two answers is better? Asked and read in one way everywhere.

A judge is asked about two answers twice, with either of them first. A judge that prefers a place
contradicts itself then (Zheng et al. 2023, arXiv:2306.05685). A reply must be the letter of an
answer or the word for a tie, and nothing else. After any other reply the judge is asked once more.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from orpo_lab.curate.ask import Answer, Answerer, Failure, Request
from orpo_lab.progress import Work

# Raise it when a text below changes: verdicts on another question are another judge's
VERSION = 1
QUESTION = """\
You compare two answers to the same conversation. Say which answer helps the user more: it is \
right, it does what was asked, and it is clear. Neither its place nor its length counts.

<conversation>
{prompt}
</conversation>

<answer_A>
{first}
</answer_A>

<answer_B>
{second}
</answer_B>

Reply with one word: A if answer A is better, B if answer B is better, or tie."""
AGAIN = "Reply with one word and nothing else: A, B or tie."
# An open model may write its reasoning first
_REPLY = re.compile(r"(?:.*</think>)?[\s\"'*(\[]*(A|B|[Tt]ie|TIE)[\s\"'*)\].]*", re.DOTALL)
# What a judge draws at: always its most likely reply
_TEMPERATURE, _TOP_P, _SEED = 0.0, 1.0, 0

Side = Literal["first", "second"]
# The place that a reply names
Place = Literal["first", "second", "tie"]
_PLACES: dict[str, Place] = {"a": "first", "b": "second", "tie": "tie"}

# Takes a reply: the id of its request, what it names, the reply, and whether it counts: False for a
# first reply that names nothing, after which the judge is asked once more
Keep = Callable[[str, Place | None, Answer, bool], None]


def request(id: str, prompt: str, first: str, second: str, max_new_tokens: int) -> Request:
    """Return the question about two answers to a prompt, in the order in which they are shown."""
    # In one step, since an answer may hold the name of a place
    text = QUESTION.format(prompt=prompt, first=first, second=second)
    messages = [{"role": "user", "content": text}]
    return Request(id, messages, _TEMPERATURE, _TOP_P, max_new_tokens, _SEED)


def read(reply: str) -> Place | None:
    """Return what a reply names; None: it does not say so as it was asked to."""
    found = _REPLY.fullmatch(reply)
    return _PLACES[found[1].lower()] if found else None


@dataclass
class Tally:
    """How many replies a call has brought."""

    num_kept: int = 0
    """Replies that count."""
    num_unclear: int = 0
    """First replies that named nothing."""
    failed: Counter[str] = field(default_factory=Counter)
    """Questions without a reply, by the reason."""


def ask(
    judge: Answerer,
    requests: Sequence[Request],
    have: Collection[str],
    keep: Keep,
    unclear: Mapping[str, str] | None = None,
) -> Tally:
    """Ask a judge what it has not answered yet.

    Args:
        judge: the judge.
        requests: all questions.
        have: ids of the questions with a reply that counts.
        keep: takes each reply as it comes.
        unclear: first replies of an earlier call that named nothing, by the id of the question.

    Raises:
        UserError: no request can be answered.
    """
    asked = {one.id: one for one in requests}
    have = asked.keys() & have
    again = {id: reply for id, reply in (unclear or {}).items() if id in asked.keys() - have}
    tally = Tally()
    with Work(f"{judge.name}: verdicts", len(asked), done=len(have)) as work:

        def take(requests: Iterable[Request], have: Collection[str], *, is_last: bool) -> None:
            for batch in judge.answer(list(requests), have):
                for request, result in batch:
                    if isinstance(result, Failure):
                        tally.failed[result.reason] += 1
                        continue
                    place = read(result.text)
                    counts = place is not None or is_last
                    keep(request.id, place, result, counts)
                    if not counts:
                        tally.num_unclear += 1
                        again[request.id] = result.text
                        continue
                    tally.num_kept += 1
                    work.done += 1

        take(asked.values(), have | again.keys(), is_last=False)
        take([_again(asked[id], reply) for id, reply in again.items()], (), is_last=True)
    return tally


def _again(request: Request, reply: str) -> Request:
    """Return a request that asks once more after a reply that says nothing."""
    more = [{"role": "assistant", "content": reply}, {"role": "user", "content": AGAIN}]
    return replace(request, messages=[*request.messages, *more])
