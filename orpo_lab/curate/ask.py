"""What is asked of a model or an endpoint, and what comes back."""

import argparse
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    # Its room imports transformers, which takes seconds
    from orpo_lab.data.pairs import Message


@dataclass(frozen=True)
class Request:
    """A conversation that ends with the user's turn, and how the answer is drawn.

    At a temperature of 0 the most likely token is always taken. `top_p` keeps the most likely
    tokens whose probabilities add up to it (Holtzman et al. 2020, arXiv:1904.09751).
    """

    id: str
    messages: "list[Message]"
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int


@dataclass(frozen=True)
class Answer:
    """A text, and why it ends: `stop`, `length`, or an endpoint's own word."""

    text: str
    finish_reason: str
    num_tokens: int | None


@dataclass(frozen=True)
class Failure:
    """Why a request has no answer, for people."""

    reason: str


class Answerer(Protocol):
    """A model that answers requests."""

    name: str
    settings: dict[str, Any]
    """What says which model this is, as given by the user."""
    found: dict[str, Any]
    """What more it takes to make an answer again: versions, precision, a hash of the weights."""

    def answer(
        self, requests: Sequence[Request], have: Collection[str]
    ) -> Iterator[list[tuple[Request, Answer | Failure]]]:
        """Yield the answers, some at a time.

        Args:
            requests: all requests, also those that are answered already; they share
                `max_new_tokens`.
            have: ids of requests that are answered already; they are not yielded.

        Raises:
            UserError: no request can be answered.
        """


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose a model to a parser."""
    parser.add_argument(
        "--model",
        required=True,
        action="append",
        metavar="MODEL",
        help="a run folder, a model folder or a hub name; with --endpoint a name that the endpoint "
        "knows",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a model of the hub")
    parser.add_argument(
        "--dtype",
        choices=("auto", "bf16", "fp16", "fp32"),
        default="auto",
        help="precision of a local model (default: bf16 on a GPU, fp32 on a CPU)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=16,
        metavar="N",
        help="answers that a local model writes at a time (default: 16)",
    )
    parser.add_argument(
        "--endpoint",
        nargs="?",
        const="",
        metavar="URL",
        help="base URL of an OpenAI-compatible endpoint, such as http://localhost:8000/v1 (without "
        "URL: the environment's OPENAI_BASE_URL)",
    )
    parser.add_argument(
        "--key-variable",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="the environment variable that holds the endpoint's key (default: OPENAI_API_KEY)",
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        default=8,
        metavar="N",
        help="requests to the endpoint at a time (default: 8)",
    )
    parser.add_argument(
        "--rate", type=float, metavar="N", help="requests a minute (default: no limit)"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="of silence of the endpoint, after which a request is tried again (default: 120)",
    )
    parser.add_argument(
        "--retries",
        type=int,
        default=5,
        metavar="N",
        help="more tries of a request that fails (default: 5)",
    )
