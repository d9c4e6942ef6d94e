"""OpenAssistant's conversation trees (Köpf et al. 2023, arXiv:2304.07327) -> preference pairs.

A tree is a message with `replies`; each reply is a message with `replies` again. People have ranked
the assistant's replies to the same message. Two replies with different ranks make a pair.
"""

from collections.abc import Mapping
from typing import Any

from orpo_lab.config.dataset import OasstDataset
from orpo_lab.data.faults import Fault, quote
from orpo_lab.data.pairs import Message, Pair
from orpo_lab.data.ranks import Answers, choose, not_compared

_ROLES = {"prompter": "user", "assistant": "assistant"}


class Trees:
    """Makes pairs from trees, and counts every reply of the assistant as paired or as left out."""

    def __init__(self, config: OasstDataset) -> None:
        self._config = config
        self._replies = Answers()

    def pairs(self, tree: Any, number: int) -> list[Pair]:
        """Return the pairs of a tree.

        Args:
            tree: the raw value of a row.
            number: line number of the row, for the report of replies that are left out.

        Raises:
            Fault: the value is not a tree, or its turns do not alternate. Then no reply of the row
                is counted.
        """
        if not isinstance(tree, Mapping):
            raise Fault("wrong_type", "is no tree: it is no object with a prompt")
        pairs: list[Pair] = []
        left_out: list[str] = []
        num_replies = 0
        # A message of the user, the messages before it, and whether all before may be in a prompt
        stack: list[tuple[Any, list[Message], bool]] = [(tree.get("prompt"), [], True)]
        while stack:
            message, before, good = stack.pop()
            asked = [*before, _said(message, "prompter")]
            good = good and not self._flaw(message)
            ranks: list[float] = []
            answers: list[Message] = []
            for reply in message["replies"]:
                answer = _said(reply, "assistant")
                num_replies += 1
                flaw = self._flaw(reply) if good else "below_left_out"
                stack += [
                    (reply_below, [*asked, answer], not flaw)
                    for reply_below in reversed(reply["replies"])
                ]
                flaw = flaw or self._why_unranked(reply, depth=len(asked) // 2 + 1)
                if flaw:
                    left_out.append(flaw)
                else:
                    ranks.append(reply["rank"])
                    answers.append(answer)
            chosen = choose(ranks, self._config.pairing)
            pairs += [Pair(asked, [answers[better]], [answers[worse]]) for better, worse in chosen]
            left_out += not_compared(len(ranks), chosen)
        self._replies.add(number, num_replies, left_out)
        return pairs

    def _flaw(self, message: Mapping[str, Any]) -> str:
        """Return why a message may be neither an answer nor in a prompt; empty: it may be both."""
        if message.get("deleted"):
            return "deleted"
        if message.get("review_result") is None:
            return "unreviewed"
        if not message["review_result"]:
            return "failed_review"
        languages = self._config.languages
        return "other_language" if languages and message.get("lang") not in languages else ""

    def _why_unranked(self, reply: Mapping[str, Any], depth: int) -> str:
        if self._config.max_depth and depth > self._config.max_depth:
            return "too_deep"
        return "unranked" if reply.get("rank") is None else ""

    def report(self) -> dict[str, Any]:
        """Return `num_replies`, `num_paired` and `left_out`; the last two add up to the first."""
        return self._replies.report("replies")


def _said(message: Any, role: str) -> Message:
    if not (
        isinstance(message, Mapping)
        and isinstance(message.get("text"), str)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("replies"), list)
        and type(message.get("rank")) in (int, type(None))
    ):
        raise Fault(
            "wrong_type",
            "is no tree: a message needs a text, a role, a list of replies, and a rank or null",
        )
    if message["role"] != role:
        raise Fault(
            "turns_not_alternating", f"has {quote(message['role'])} where {role} has the turn"
        )
    return {"role": _ROLES[role], "content": message["text"]}
