"""A judge behind a loopback endpoint with known preferences: at a run's end, and by `winrate`."""

import json
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.judge import JUDGES, replying
from orpo_lab.__main__ import main
from orpo_lab.config.judge import EndpointJudge
from orpo_lab.curate.endpoint import THREADS
from orpo_lab.curate.question import AGAIN
from orpo_lab.errors import UserError
from orpo_lab.judge import at_end
from orpo_lab.judge.answers import after_and_before, after_in_both
from orpo_lab.judge.command import OPTIONS
from orpo_lab.judge.verdicts import FILE, Pair, compare, open_judge
from orpo_lab.stop import Stop
from tests.endpoint_server import Endpoint, break_off, fail, keep_silent, say
from tests.test_compare import Write, write
from tests.test_run import summary_of
from tests.test_run_folder import TWO_STEPS, start, write_pairs

__all__ = ["write"]

KEY = "not-of-a-known-shape-4712"
VARIABLE = "MY_JUDGE"
Asked = Callable[..., EndpointJudge]


@pytest.fixture
def judge(server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Make the settings of a judge behind the server; pauses between tries are short."""
    monkeypatch.setenv(VARIABLE, KEY)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)

    def make(**options: Any) -> EndpointJudge:
        usual: dict[str, Any] = {
            "url": server.url,
            "model": "m",
            "key_variable": VARIABLE,
            "num_prompts": None,
            "max_new_tokens": 4,
            "concurrency": 4,
            "rate": None,
            "timeout": 5.0,
            "retries": 2,
        }
        return EndpointJudge(**usual | options)

    return make


def pairs(num: int) -> list[Pair]:
    """Return answers of which A's has a property that a server may see."""
    return [Pair(f"question {n}", f"answer {n} (good)", f"answer {n}") for n in range(num)]


def shown(body: dict[str, Any]) -> tuple[str, str, str]:
    """Return the prompt and both answers that a judge is shown."""
    text = body["messages"][0]["content"]
    prompt, first, second = re.findall(r"<(?:conversation|answer_[AB])>\n(.*?)\n</", text, re.S)
    return prompt, first, second


def prefers_good(body: dict[str, Any]) -> str:
    _, first, second = shown(body)
    return "A" if "(good)" in first else "B" if "(good)" in second else "tie"


def test_the_win_rate_is_that_of_the_judges_known_preferences(
    server: Endpoint, judge: Asked, tmp_path: Path
) -> None:
    known = JUDGES["prompts differ, 0.7"]
    server.usual = say(replying(known, random.Random(4)))
    asked = judge(concurrency=1)  # requests in one order draw the same verdicts
    found, tally = compare(open_judge(asked), pairs(60), tmp_path, asked.max_new_tokens)
    assert found.win_rate.low <= known.true_rate <= found.win_rate.high
    assert found.winner == "A"
    assert (found.num_prompts, tally.num_kept) == (60, 120)
    # Each prompt in both orders
    orders = Counter(
        (prompt, "(good)" in first) for prompt, first, _ in map(shown, server.requests)
    )
    assert orders == {(f"question {n}", order): 1 for n in range(60) for order in (True, False)}
    assert {(body["temperature"], body["max_tokens"]) for body in server.requests} == {(0.0, 4)}


def test_a_judge_that_always_answers_first_is_found_out(
    server: Endpoint, judge: Asked, tmp_path: Path
) -> None:
    server.usual = say("A")
    found, _ = compare(open_judge(judge()), pairs(10), tmp_path, 4)
    assert not found.is_evidence
    assert "tells nothing about x and y" in found.sentences("x", "y", "m")[0]


def test_what_is_answered_is_on_the_disk_and_is_not_asked_again(
    server: Endpoint, judge: Asked, tmp_path: Path
) -> None:
    asked = open_judge(judge(concurrency=1, retries=0))

    answered: list[tuple[Any, ...]] = []

    def mumbles(body: dict[str, Any]) -> str:
        answered.append((*shown(body), len(body["messages"])))
        return "hm" if shown(body)[0] == "question 0" else prefers_good(body)

    server.plan, server.usual = [say(mumbles)] * 5, fail(401, f"no {KEY}")
    with pytest.raises(UserError, match=f"the key in {VARIABLE} is refused"):
        compare(asked, pairs(8), tmp_path, 4)
    # A request that was under way then is refused too; what follows must not answer it
    for thread in threading.enumerate():
        if thread.name.startswith(THREADS):
            thread.join(10)
    lines = (tmp_path / FILE).read_text().splitlines()
    assert len(lines) == len(answered) == 5
    # A kill in the middle of a line
    (tmp_path / FILE).write_text("\n".join([*lines, lines[0][:30]]))
    server.usual = say(mumbles)
    found, tally = compare(asked, pairs(8), tmp_path, 4)
    # Question 0 said nothing in either order, and was asked once more in each: with what it said
    assert len(set(answered)) == len(answered) == 16 + 2
    again = [body["messages"] for body in server.requests if len(body["messages"]) == 3]
    assert len(again) == 2
    assert all([m["content"] for m in one[1:]] == ["hm", AGAIN] for one in again)
    assert (found.num_unreadable, found.num_prompts, tally.failed.total()) == (1, 7, 0)
    before = len(server.requests)
    assert compare(asked, pairs(8), tmp_path, 4)[0] == found
    assert len(server.requests) == before
    # Another judge, and answers that have changed, are new questions; the other way round is not
    compare(open_judge(judge(model="other")), pairs(2)[1:], tmp_path, 4)
    swapped = [Pair(one.prompt, one.b, one.a) for one in pairs(8)]
    turned, _ = compare(asked, swapped, tmp_path, 4)
    assert turned.win_rate.estimate == 1 - found.win_rate.estimate
    assert len(server.requests) == before + 2
    assert KEY not in (tmp_path / FILE).read_text()


def test_equal_answers_cost_no_question(server: Endpoint, judge: Asked, tmp_path: Path) -> None:
    server.usual = say(prefers_good)
    equal = [Pair(f"equal {n}", "same", "same") for n in range(3)]
    found, _ = compare(open_judge(judge()), [*pairs(1), *equal], tmp_path, 4)
    assert len(server.requests) == 2
    assert found.win_rate.estimate == (1 + 3 * 0.5) / 4


def test_a_server_that_fails_lags_and_limits_costs_time_and_no_verdict(
    server: Endpoint, judge: Asked, tmp_path: Path
) -> None:
    server.usual = say(prefers_good)
    server.plan = [
        *(say(prefers_good), fail(500), fail(429, Retry_After="0.05"), break_off),
        keep_silent(0.5),
    ]
    found, tally = compare(open_judge(judge(timeout=0.3)), pairs(5), tmp_path, 4)
    assert (found.num_prompts, found.num_missing, tally.failed.total()) == (5, 0, 0)
    assert found.win_rate.estimate == 1


def test_a_question_without_a_reply_leaves_its_prompt_out(
    server: Endpoint, judge: Asked, tmp_path: Path
) -> None:
    server.usual = say(prefers_good)
    server.plan = [say(prefers_good), fail(400, "too long")]
    asked = open_judge(judge(retries=0))
    found, tally = compare(asked, pairs(5), tmp_path, 4)
    assert (found.num_prompts, found.num_missing, tally.failed.total()) == (4, 1, 1)
    assert compare(asked, pairs(5), tmp_path, 4)[0].num_prompts == 5
    server.usual = fail(400, "too long")
    with pytest.raises(UserError, match=r"no prompt has two verdicts .*2 times: .*too long"):
        compare(asked, [Pair("new", "a", "b")], tmp_path, 4)


def sample(prompt: str, before: str, after: str, **more: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": "c", "before": before, "after": after} | more


def test_prompts_are_matched_by_what_was_asked_not_by_the_template() -> None:
    one = [sample("<a>x", "1", "2", asked="x"), sample("<a>y", "3", "4", asked="y")]
    other = [sample("[b]y", "5", "6", asked="y"), sample("[b]z", "7", "8", asked="z")]
    assert after_in_both(one, other) == [Pair("y", "4", "6")]
    assert after_and_before(one) == [Pair("x", "2", "1"), Pair("y", "4", "3")]
    # One prompt of two pairs has one answer; runs of old have the template's text alone
    assert after_and_before([sample("x", "1", "2")] * 2) == [Pair("x", "2", "1")]


def test_a_signal_ends_the_asking_at_once_and_not_the_run(
    server: Endpoint, judge: Asked, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def signals(handler: Any, body: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        keep_silent(3)(handler, body)

    stop, begun = Stop(), time.monotonic()
    stop.waits = True
    server.plan, server.usual = [say("A"), signals], keep_silent(3)
    with stop.listening():
        samples = [sample(f"{n}", "1", "2") for n in range(3)]
        assert at_end.ask(judge(concurrency=1), tmp_path, stop, samples) == {}
    assert time.monotonic() - begun < 2
    assert stop.waits
    assert "no win rate (SIGTERM)" in caplog.text
    assert f"winrate {tmp_path} --before" in caplog.text
    assert len((tmp_path / "judge" / FILE).read_text().splitlines()) == 1
    # Nobody is asked after a signal that has come before
    num = len(server.requests)
    assert at_end.ask(judge(), tmp_path, stop, samples) == {}
    assert len(server.requests) == num


def winrate(*arguments: str) -> None:
    main(["winrate", *arguments])


def test_two_real_runs_are_judged_at_their_end_or_later_and_against_each_other(
    server: Endpoint,
    judge: Asked,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "pairs.jsonl")
    told = ["judge=endpoint", f"judge.url={server.url}", "judge.model=m", "judge.retries=0"]
    told += [f"judge.key_variable={VARIABLE}", "optimizer.learning_rate=0.02", *TWO_STEPS]
    told += ["dataset.num_generations=4"]
    server.usual = fail(500, "out of order")
    start(*told, "hydra.run.dir=a")
    first = summary_of(tmp_path / "a")
    assert not any(key.startswith("judge/") for key in first)
    assert json.loads((tmp_path / "a" / "status.json").read_text())["missing"] == {}
    log = (tmp_path / "a" / "run.log").read_text()
    assert "no win rate (" in log
    assert "later: python -m orpo_lab winrate a --before" in log
    samples = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert len(samples) == 4
    # Later: the run's own judge, and the figures go into its summary
    before = {one["asked"]: one["before"] for one in samples}
    server.usual = say(lambda body: "B" if shown(body)[1] == before[shown(body)[0]] else "A")
    capsys.readouterr()
    winrate("a", "--before")
    assert "the model after training wins" in capsys.readouterr().out
    later = summary_of(tmp_path / "a")
    num_equal = sum(one["before"] == one["after"] for one in samples)
    assert later["judge/win_rate"] == (4 - num_equal + 0.5 * num_equal) / 4
    assert (later["judge/model"], later["judge/num_equal"]) == ("m", num_equal)
    assert {key: later[key] for key in first} == first
    # At the end of another run, with the same untrained answers
    start(*told, "seed=2", "hydra.run.dir=b")
    second = summary_of(tmp_path / "b")
    assert second["judge/win_rate"] > 0.5
    assert second["judge/num_prompts"] == 4
    assert "The judge m" in (tmp_path / "b" / "run.log").read_text()
    # Against each other
    after = {one["asked"]: one["after"] for one in samples}
    server.usual = say(lambda body: "A" if shown(body)[1] == after[shown(body)[0]] else "B")
    winrate("a", "b", "--num-prompts", "3")
    said = json.loads((tmp_path / "a" / "judge" / "against-b.json").read_text())
    assert (said["a"], said["b"], said["judge/num_prompts"]) == ("a", "b", 3)
    num_equal = said["judge/num_equal"]
    assert said["judge/win_rate"] == (3 - num_equal + 0.5 * num_equal) / 3
    assert server.keys == {f"Bearer {KEY}"}
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not any(KEY.encode() in file.read_bytes() for file in files)


def test_what_cannot_be_compared_is_one_line(write: Write, capsys: Any, tmp_path: Path) -> None:
    a, b = write("a"), write("b", seed=2)
    given = ["--model", "m", "--url", "http://127.0.0.1:9/v1"]
    stopped = write("c", state="failed")
    other = write("d", seed=3)
    (other / "samples.json").write_text(json.dumps([sample("another", "1", "2")]))
    none = write("e", seed=4)
    (none / "samples.json").unlink()
    for arguments, said in (
        ([str(a), *given], "give a second run, or --before"),
        ([str(a), str(b), "--before", *given], "give a second run, or --before"),
        ([str(a), str(tmp_path), *given], "is not a run folder: no config.yaml"),
        ([str(a), str(stopped), *given], "has not finished"),
        ([str(a), str(other), *given], "have answered no prompt in common"),
        ([str(a), str(none), *given], "has no answers in samples.json"),
        ([str(a), str(b)], "--model is missing"),
        ([str(a), str(b), *given, "--rate", "0"], "judge.rate=0.0 must be above 0"),
        ([str(a), str(b), *given, "--url", "localhost"], "--url must be a URL"),
        ([str(a), str(b), *given], "cannot be reached"),
    ):
        with pytest.raises(SystemExit) as end:
            winrate(*arguments)
        assert said in str(end.value)


def test_the_options_are_the_keys_of_the_group() -> None:
    assert list(OPTIONS) == list(EndpointJudge.__dataclass_fields__)
