"""The client of an endpoint against a real loopback server that errs, lags and breaks off."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orpo_lab.__main__ import main
from orpo_lab.curate.ask import Answer, Failure, Request
from orpo_lab.curate.endpoint import Endpoint, check_url
from orpo_lab.curate.folder import PROMPTS, Prompt, append, prompt_id, read_candidates
from orpo_lab.curate.store import Store
from orpo_lab.errors import UserError
from tests import endpoint_server
from tests.endpoint_server import break_off, dribble, fail, keep_silent, say, send

KEY = "not-of-a-known-shape-4711"
VARIABLE = "MY_SERVER"


@pytest.fixture
def client(
    server: endpoint_server.Endpoint, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Endpoint]:
    """Make a client of the server; pauses between its tries are short."""
    monkeypatch.setenv(VARIABLE, KEY)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)

    def make(**options: Any) -> Endpoint:
        usual = {"concurrency": 4, "rate": None, "timeout": 5.0, "retries": 2}
        return Endpoint("m", server.url, key_variable=VARIABLE, **(usual | options))

    return make


def requests(num: int) -> list[Request]:
    asked = [{"role": "user", "content": "why?"}]
    return [Request(f"r{n}", asked, 0.7, 0.9, 32, n) for n in range(num)]


def answers(client: Endpoint, num: int) -> dict[str, Answer | Failure]:
    return {one.id: made for batch in client.answer(requests(num), ()) for one, made in batch}


def test_a_request_says_all_that_an_answer_depends_on(
    server: endpoint_server.Endpoint, client: Callable[..., Endpoint]
) -> None:
    assert answers(client(), 2) == {f"r{n}": Answer(f"answer {n}", "stop", 7) for n in range(2)}
    assert sorted(server.requests, key=lambda body: body["seed"]) == [
        {
            "model": "m",
            "messages": [{"role": "user", "content": "why?"}],
            "temperature": 0.7,
            "top_p": 0.9,
            "max_tokens": 32,
            "seed": n,
        }
        for n in range(2)
    ]
    assert server.keys == {f"Bearer {KEY}"}


@pytest.mark.parametrize(
    "behaviours",
    [
        [fail(500), fail(503)],
        [fail(429, Retry_After="0.1")],
        [break_off],
        [keep_silent(0.6)],
    ],
    ids=["5xx", "429", "broken", "slow"],
)
def test_what_may_pass_is_tried_again(
    server: endpoint_server.Endpoint, client: Callable[..., Endpoint], behaviours: list[Any]
) -> None:
    server.plan = [say("first"), *behaviours]
    found = answers(client(timeout=0.3), 2)
    assert [type(one) for one in found.values()] == [Answer, Answer]
    assert len(server.requests) == 2 + len(behaviours)


def test_a_pause_that_the_server_asks_for_is_kept(
    server: endpoint_server.Endpoint, client: Callable[..., Endpoint]
) -> None:
    server.plan = [say("first"), fail(429, Retry_After="0.4")]
    answers(client(), 2)
    assert server.times[2] - server.times[1] >= 0.4


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        (fail(500, "out of order"), "out of order"),
        (fail(400, "the prompt is too long"), "the prompt is too long"),
        (send("{not json"), "is not JSON"),
        (send("[" * 100_000), "is not JSON"),
        (send('{"choices": []}'), "is no chat completion"),
        (send('{"choices": {"a": 1}}'), "is no chat completion"),
        (send('"yes"'), "is no chat completion"),
        (say(" ", "content_filter"), "is empty (finish_reason: content_filter)"),
        (break_off, "the connection broke"),
        (keep_silent(0.3), "did not answer in time"),
        (dribble, "did not answer in time"),
    ],
    ids=[
        *("500", "400", "malformed", "deep", "no choice", "object", "string", "empty", "broken"),
        *("slow", "slow bytes"),
    ],
)
def test_what_does_not_pass_is_the_failure_of_one_request(
    server: endpoint_server.Endpoint,
    client: Callable[..., Endpoint],
    behaviour: Any,
    said: str,
) -> None:
    server.plan = [say("first"), behaviour]
    found = answers(client(retries=0, concurrency=1, timeout=0.15), 3)
    (failure,) = (one for one in found.values() if isinstance(one, Failure))
    assert said in failure.reason
    assert "\n" not in failure.reason


def test_no_part_of_a_reply_brings_the_key_or_half_a_character_into_a_file(
    server: endpoint_server.Endpoint, client: Callable[..., Endpoint]
) -> None:
    choice = {"message": {"content": f"it is {KEY} \ud83d"}, "finish_reason": f"{KEY} \ud83d"}
    server.usual = send(json.dumps({"choices": [choice], "usage": {"completion_tokens": KEY}}))
    assert answers(client(), 1) == {"r0": Answer("it is *** ?", "*** ?", None)}


def test_a_word_that_stands_for_a_key_stays_in_answers(
    server: endpoint_server.Endpoint,
    client: Callable[..., Endpoint],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, "EMPTY")
    server.usual = say("The EMPTY set.")
    assert answers(client(), 1) == {"r0": Answer("The EMPTY set.", "stop", 7)}


def test_a_redirect_takes_the_key_to_no_other_host(
    server: endpoint_server.Endpoint, client: Callable[..., Endpoint]
) -> None:
    with endpoint_server.serving() as other:
        path = f"{other.url}/chat/completions"
        server.usual = lambda handler, _: endpoint_server.reply(
            handler, 307, "", {"Location": path}
        )
        answers(client(), 1)
        assert len(other.requests) == 1
        assert KEY not in str(other.keys)


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        (fail(401, f"bad key {KEY}"), f"the key in {VARIABLE} is refused: "),
        (fail(403), f"the key in {VARIABLE} is refused: "),
        (fail(404, "no such model"), "has no model m, or no chat completions"),
    ],
    ids=["401", "403", "404"],
)
def test_what_no_request_can_pass_ends_the_step_at_once(
    server: endpoint_server.Endpoint,
    client: Callable[..., Endpoint],
    behaviour: Any,
    said: str,
) -> None:
    server.usual = behaviour
    with pytest.raises(UserError) as error:
        answers(client(retries=5), 50)
    assert said in str(error.value)
    assert KEY not in str(error.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize("key", ["sk-4711-é", "sk-4711\nabc"])
def test_a_key_that_no_request_can_carry_ends_the_step_before_any(
    client: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv(VARIABLE, key)
    with pytest.raises(UserError, match=f"the key in {VARIABLE} holds .* copy") as error:
        client()
    assert "4711" not in str(error.value)


def test_an_address_where_nobody_listens_ends_the_step_at_once(
    client: Callable[..., Endpoint], server: endpoint_server.Endpoint
) -> None:
    asking = client(retries=5)
    server.server_close()
    start = time.monotonic()
    with pytest.raises(UserError, match="cannot be reached"):
        answers(asking, 3)
    assert time.monotonic() - start < 2


def test_an_endpoint_that_fails_on_and_on_ends_the_step(
    server: endpoint_server.Endpoint, client: Callable[..., Endpoint]
) -> None:
    server.plan, server.usual = [say("first")], fail(500, "full")
    with pytest.raises(UserError, match=r"20 requests .* in a row, .* full; the same command"):
        answers(client(retries=0), 100)
    assert 21 <= len(server.requests) < 40


def test_no_more_requests_are_open_at_a_time_than_allowed(
    server: endpoint_server.Endpoint, client: Callable[..., Endpoint]
) -> None:
    server.usual = keep_silent(0.03)
    answers(client(concurrency=3), 12)
    assert server.most_open == 3


def test_tries_too_are_spaced_by_the_rate(
    server: endpoint_server.Endpoint, client: Callable[..., Endpoint]
) -> None:
    server.plan = [say("first"), fail(500), fail(500)]
    asking, start = client(rate=60 / 0.05), time.monotonic()
    answers(asking, 4)
    assert len(server.times) == 6
    # A busy machine makes requests late, and never early
    assert all(when - start >= 0.05 * number for number, when in enumerate(server.times))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "needs a URL, or OPENAI_BASE_URL"),
        ("localhost:8000", "must be a URL such as"),
        ("http://localhost:abc/v1", "must be a URL such as"),
        ("http://localhost:99999/v1", "must be a URL such as"),
        ("http://[::1/v1", "must be a URL such as"),
        ("http://me:secret@localhost/v1", "must not hold a name, a password"),
        ("http://localhost/v1?key=secret", "must not hold a name, a password"),
    ],
)
def test_an_address_that_would_be_recorded_holds_no_secret(url: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        check_url(url)
    assert said in str(error.value)
    assert "secret" not in str(error.value)


def test_the_step_asks_again_what_has_failed_and_its_key_is_nowhere(
    server: endpoint_server.Endpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(VARIABLE, KEY)
    messages = [[{"role": "user", "content": f"why {n}?"}] for n in range(4)]
    append(
        tmp_path / PROMPTS,
        [Prompt(prompt_id(one), one, "file", n) for n, one in enumerate(messages)],
    )
    given = ["curate", "candidates", str(tmp_path), "--model", "m", "--endpoint", server.url]
    given += ["--key-variable", VARIABLE, "--retries", "0"]
    # An endpoint may quote the key, and a server of one's own may even answer with the key
    server.plan = [say("fine"), fail(400, f"bad {KEY}"), fail(500), say(f"key {KEY}\ud800")]
    main(given)
    said = capfd.readouterr().out
    assert "m: 6 answers\n" in said
    assert "1 answers failed; the same command tries again: the endpoint said" in said
    assert len(read_candidates(tmp_path)) == 6
    main(given)
    said += capfd.readouterr().out
    assert "m: 2 answers, 6 were there already\n" in said
    found = read_candidates(tmp_path)
    assert len({one.id for one in found}) == len(found) == 8
    assert sum("key ***" in one.text for one in found) == 1
    assert {one.made_by["endpoint"] for one in found} == {server.url}
    assert len(Store(tmp_path).comparisons()) == 4
    server.usual = fail(401, f"bad key {KEY}")
    with pytest.raises(SystemExit) as end:
        main([*given, "--seed", "1"])
    assert "is refused" in str(end.value)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {PROMPTS, "candidates.jsonl", "votes.sqlite"} <= {file.name for file in files}
    assert not any(KEY.encode() in file.read_bytes() for file in files)
    assert KEY not in said + str(end.value) + "".join(capfd.readouterr())
    json.dumps([one.made_by for one in found])
