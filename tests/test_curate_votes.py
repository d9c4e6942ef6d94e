"""The voting page: the store, who is asked what, what the server takes, and real browsers."""

import argparse
import contextlib
import json
import random
import re
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Error, Page, Playwright, Route, sync_playwright
from starlette.testclient import TestClient

from orpo_lab.curate import server as step
from orpo_lab.curate.assignment import DISTANCE, assign, left_of, queue
from orpo_lab.curate.folder import (
    CANDIDATES,
    PROMPTS,
    Candidate,
    Prompt,
    append,
    candidate_id,
    prompt_id,
)
from orpo_lab.curate.links import KEY, OWNER, Links, read_names
from orpo_lab.curate.markdown import to_html
from orpo_lab.curate.page import MAX_BODY, build
from orpo_lab.curate.store import Assignment, Comparison, Store, Vote
from orpo_lab.curate.voting import Voting
from orpo_lab.errors import UserError
from tests.voters import (
    CHROMIUM,
    READY,
    Server,
    Voter,
    kill_browser,
    open_browser,
    served,
    wait_for,
)

PEOPLE = ("ann", "ben", "eve")
ADDRESS = "http://127.0.0.1:8000"
ANSWERS = ("The good answer to question {n}.", "The bad answer to question {n}.")


def make_folder(folder: Path, num: int, answers: Sequence[str] = ANSWERS) -> Path:
    """Write prompts with two answers each, by two models, and their comparisons."""
    prompts, candidates, comparisons = [], [], []
    for n in range(num):
        messages = [{"role": "user", "content": f"Question {n}?"}]
        name = prompt_id(messages)
        prompts.append(Prompt(name, messages, "made", n))
        made = [{"model": "secret/model-a"}, {"model": "secret/model-b"}]
        ids = [candidate_id(name, k, made[k]) for k in range(2)]
        candidates += [
            Candidate(
                ids[k], name, k, answers[k].replace("{n}", str(n)), "stop", 5, "2026", made[k]
            )
            for k in range(2)
        ]
        comparisons.append(Comparison(f"{n:04x}", name, *sorted(ids)))
    folder.mkdir(parents=True, exist_ok=True)
    append(folder / PROMPTS, prompts)
    append(folder / CANDIDATES, candidates)
    Store(folder).add_comparisons(comparisons)
    return folder


def a_vote(comparison: str = "0000", annotator: str = "ann", **rest: Any) -> Vote:
    vote = Vote(
        id=uuid.uuid4().hex,
        comparison=comparison,
        annotator=annotator,
        kind="person",
        choice="first",
        left="first",
        round=0,
        note="",
        seconds=1.0,
        created="now",
    )
    return replace(vote, **rest)


# The store


def test_a_vote_counts_once_however_often_it_is_sent(tmp_path: Path) -> None:
    store = Store(make_folder(tmp_path, 2))
    vote = a_vote()
    assert [store.add_vote(vote) for _ in range(3)] == [True, False, False]
    # From a second tab: another id, another choice, the same comparison and round
    assert not store.add_vote(replace(vote, id="other", choice="second"))
    assert store.votes() == [vote]
    others = [a_vote(annotator="ben"), a_vote(round=1), a_vote(comparison="0001")]
    assert all(store.add_vote(other) for other in others)
    assert Store(tmp_path).votes() == [vote, *others]
    assert store.votes("ben") == others[:1]


def test_a_vote_that_is_taken_back_makes_room_and_does_not_come_back(tmp_path: Path) -> None:
    store = Store(make_folder(tmp_path, 1))
    vote, again = a_vote(), a_vote(choice="second")
    store.add_vote(vote)
    assert not store.withdraw(vote.id, "ben", "later")
    assert store.votes() == [vote]
    assert [store.withdraw(vote.id, "ann", "later") for _ in range(2)] == [True, False]
    assert store.votes() == []
    # Sent again by a tab that had no answer
    assert not store.add_vote(vote)
    assert store.votes() == []
    assert store.add_vote(again)
    assert store.votes() == [again]


def test_a_file_of_votes_that_is_damaged_is_named(tmp_path: Path) -> None:
    (tmp_path / "votes.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(UserError, match=r"votes\.sqlite cannot be opened: .*; if the file is dam"):
        Store(tmp_path)


def test_threads_that_send_one_vote_at_once_leave_one(tmp_path: Path) -> None:
    store = Store(make_folder(tmp_path, 1))
    votes = [a_vote(id=f"{number % 4}") for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        new = list(pool.map(store.add_vote, votes))
    assert sorted(new) == [False] * 15 + [True]
    assert len(store.votes()) == 1


# Who is asked what


def names_of(num: int) -> list[str]:
    return [f"{n:04x}" for n in range(num)]


def firsts(assigned: Sequence[Assignment]) -> list[Assignment]:
    return [one for one in assigned if one.round == 0]


def loads_of(assigned: Sequence[Assignment]) -> Counter[str]:
    return Counter(one.annotator for one in firsts(assigned))


@pytest.mark.parametrize(("people", "each"), [(3, 3), (4, 3), (5, 2), (7, 1)])
def test_each_comparison_goes_to_as_many_people_and_the_counts_stay_even(
    people: int, each: int
) -> None:
    names = [f"person{n}" for n in range(people)]
    assigned = assign(names_of(50), names, [], [], each, 0.0)
    assert len(set(assigned)) == len(assigned)
    asked = Counter(one.comparison for one in assigned)
    assert asked == dict.fromkeys(names_of(50), each)
    loads = loads_of(assigned)
    assert max(loads.values()) - min(loads[name] for name in names) <= 1


def test_assignments_stay_through_restarts_and_votes() -> None:
    assigned = assign(names_of(40), PEOPLE, [], [], 2, 0.2)
    voted = [a_vote(one.comparison, one.annotator) for one in firsts(assigned)[::3]]
    voted += [a_vote(one.comparison, one.annotator, round=1) for one in assigned if one.round][:4]
    assert assign(names_of(40), PEOPLE, voted, assigned, 2, 0.2) == assigned
    assert assign(names_of(40), PEOPLE, [], assigned, 2, 0.2) == assigned


def test_what_is_open_is_shared_anew_when_people_come_and_go() -> None:
    before = assign(names_of(60), ("ann", "ben"), [], [], 1, 0.0)
    cast = [a_vote(one.comparison, one.annotator) for one in before[:10]]
    done = {(vote.annotator, vote.comparison) for vote in cast}
    after = assign(names_of(60), PEOPLE, cast, before, 1, 0.0)
    assert done <= {(one.annotator, one.comparison) for one in after}
    assert loads_of(after) == {"ann": 20, "ben": 20, "eve": 20}
    # Ann goes: her votes stay, and what she has not voted on goes to the others
    without = assign(names_of(60), ("ben", "eve"), cast, after, 1, 0.0)
    assert done <= {(one.annotator, one.comparison) for one in without}
    assert Counter(one.comparison for one in without) == dict.fromkeys(names_of(60), 1)
    assert loads_of(without)["ann"] == len({name for name in done if name[0] == "ann"})
    assert loads_of(without)["ben"] == loads_of(without)["eve"]


@pytest.mark.parametrize(
    ("num", "repeats", "expected"), [(100, 0.1, 10), (12, 0.25, 3), (1, 0.5, 0)]
)
def test_repeats_are_a_share_of_the_queue_and_come_after_a_distance(
    num: int, repeats: float, expected: int
) -> None:
    mine = queue(assign(names_of(num), ["ann"], [], [], 1, repeats))
    assert sum(one.round for one in mine) == expected
    for again in (one for one in mine if one.round):
        between = mine[mine.index(replace(again, round=0)) + 1 : mine.index(again)]
        assert sum(one.round == 0 for one in between) >= min(DISTANCE, num // 2)


def test_everybody_gets_comparisons_in_one_order_which_is_not_the_files() -> None:
    assigned = assign(names_of(30), PEOPLE, [], [], 3, 0.0)
    orders = [
        [one.comparison for one in queue([one for one in assigned if one.annotator == name])]
        for name in PEOPLE
    ]
    assert orders[0] == orders[1] == orders[2] != names_of(30)


def test_the_left_answer_is_drawn_for_each_and_turned_round_in_a_repeat() -> None:
    lefts = {name: [left_of(name, one, 0) for one in names_of(400)] for name in PEOPLE}
    for drawn in lefts.values():
        assert 160 < drawn.count("first") < 240
    assert lefts["ann"] != lefts["ben"]
    assert all(left_of("ann", one, 0) != left_of("ann", one, 1) for one in names_of(50))


# What a text becomes


@pytest.mark.parametrize(
    "text",
    [
        "<script>window.ran = 1</script>",
        "<img src=x onerror='window.ran = 1'>",
        "![picture](http://elsewhere.example/x.png)",
        "[link](javascript:window.ran=1) [other](data:text/html,x)",
        "<a href='javascript:x'>x</a> <svg/onload=x> <iframe src=x></iframe>",
        "```html\n<script>x</script>\n```\n`<b onclick=x>`",
        '[x](http://a.example/" onclick="x) <http://b.example/?"onclick=x>',
    ],
)
def test_a_text_becomes_harmless_html(text: str) -> None:
    html = to_html(text)
    tags = set(re.findall(r"<([a-z0-9]+)", html))
    assert tags <= {"p", "a", "pre", "code", "br"}
    for tag in re.findall(r"<[a-z][^>]*>", html):
        assert re.sub(r'"[^"]*"', "", tag).count("on") == 0 or tag.startswith("<a ")
        if tag.startswith("<a "):
            assert re.fullmatch(
                r'<a href="https?://[^"]*" target="_blank" rel="noopener noreferrer nofollow">', tag
            )


def test_html_in_a_text_is_shown_and_markdown_is_rendered() -> None:
    assert "&lt;script&gt;" in to_html("<script>")
    # An image is a link: it is not fetched, and not left out
    assert '!<a href="http://a.example/x.png"' in to_html("![x](http://a.example/x.png)")
    # A line that defines a link is text
    assert "[1]: http://a.example" in re.sub(
        "<[^>]*>", "", to_html("See [1].\n\n[1]: http://a.example")
    )
    html = to_html("**a** `b`\nc\n\n| x | y |\n|---|---|\n| 1 | 2 |\n\n3. d\n4. e")
    for part in ("<strong>a</strong>", "<code>b</code><br>", "<th>x</th>", '<ol start="3">'):
        assert part in html


# The server


class Visitor:
    """A browser that came in by a link."""

    def __init__(self, folder: Path, name: str | None = None, **rest: Any) -> None:
        voting = Voting(folder, PEOPLE, rest.pop("votes_per_pair", 3), rest.pop("repeats", 0.0))
        self.links = Links(folder, PEOPLE)
        self.name = name
        self.client = TestClient(build(voting, self.links), base_url=ADDRESS, **rest)
        self.client.headers["Origin"] = ADDRESS
        if name is not None:
            assert self.client.get(self.links.paths()[name]).status_code == 200

    def shown(self) -> dict[str, str]:
        """Return the data of the pair that is shown."""
        return dict(re.findall(r'data-(\w+)="([^"]*)"', self.client.get("/pair").text))

    def send(self, choice: str = "left", **rest: Any) -> Any:
        """Vote on the pair that is shown."""
        shown = self.shown()
        vote = {
            "id": uuid.uuid4().hex,
            "annotator": self.name,
            "comparison": shown["comparison"],
            "round": int(shown["round"]),
            "choice": choice,
            "note": "",
            "seconds": 2.5,
        }
        return self.client.post("/votes", json=vote | rest)


ROUTES = (
    "/",
    "/pair",
    "/owner",
    "/static/vote.js",
    "/static/page.css",
    "/nothing",
    "/enter/",
    "/enter/x",
)


def test_who_has_no_link_gets_nothing(tmp_path: Path) -> None:
    stranger = Visitor(make_folder(tmp_path, 2)).client
    for path in ROUTES:
        answer = stranger.get(path)
        assert (answer.status_code, answer.content) == (404, b""), path
    for path in ("/votes", "/undo"):
        answer = stranger.post(path, json={})
        assert (answer.status_code, answer.content) == (404, b""), path
    visitor = Visitor(tmp_path, "ann")
    stranger.cookies.set(visitor.links.cookie, "0" * 32)
    assert stranger.get("/").content == b""
    odd = {b"Cookie": f"{visitor.links.cookie}=\xfc".encode("latin-1")}
    assert stranger.get("/", headers=odd).status_code == 404
    # The owner's token is no annotator's, and the other way round
    token = visitor.links.paths()[OWNER].rpartition("/")[2]
    stranger.cookies.clear()
    stranger.cookies.set(visitor.links.cookie, token)
    assert stranger.get("/").status_code == 404
    assert visitor.client.get("/owner").content == b""
    assert Visitor(tmp_path, OWNER).client.get("/").content == b""


def test_a_link_sets_a_cookie_that_scripts_and_other_sites_cannot_use(tmp_path: Path) -> None:
    visitor = Visitor(make_folder(tmp_path, 1))
    answer = visitor.client.get(visitor.links.paths()["ann"])
    said = answer.headers["set-cookie"].lower()
    assert "httponly" in said
    assert "samesite=strict" in said
    # Not by a redirect, which would lose a strict cookie where the link stands on another site
    assert answer.status_code == 200
    assert 'content="0; url=/"' in answer.text


def test_links_outlive_a_restart_and_end_with_their_key(tmp_path: Path) -> None:
    make_folder(tmp_path, 1)
    paths = Links(tmp_path, PEOPLE).paths()
    assert Links(tmp_path, PEOPLE).paths() == paths
    assert len(set(paths.values())) == 4
    assert (tmp_path / KEY).stat().st_mode & 0o777 == 0o600
    tokens = [path.rpartition("/")[2] for path in paths.values()]
    kept = (tmp_path / "votes.sqlite").read_bytes()
    assert not any(token.encode() in kept for token in tokens)
    (tmp_path / KEY).unlink()
    assert not set(Links(tmp_path, PEOPLE).paths().values()) & set(paths.values())
    (tmp_path / KEY).write_text("zz")
    with pytest.raises(UserError, match="does not hold a key"):
        Links(tmp_path, PEOPLE)


def test_every_answer_carries_the_headers_of_a_closed_page(tmp_path: Path) -> None:
    visitor = Visitor(make_folder(tmp_path, 1), "ann")
    for path in (*ROUTES, visitor.links.paths()["ann"]):
        headers = visitor.client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
    for path in ("/", "/owner"):
        html = (visitor if path == "/" else Visitor(tmp_path, OWNER)).client.get(path).text
        assert not re.search(r"<script(?! src=\"/static/)|<style| style=| on\w+=|//", html), path


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost:9000", 200),
        ("[::1]:8000", 200),
        ("192.168.7.7", 200),
        ("elsewhere.example", 421),
        ("127.0.0.1.elsewhere.example:8000", 421),
        ("", 421),
    ],
)
def test_a_name_of_another_site_is_not_answered(tmp_path: Path, host: str, status: int) -> None:
    visitor = Visitor(make_folder(tmp_path, 1), "ann")
    cookie = f"{visitor.links.cookie}={visitor.client.cookies[visitor.links.cookie]}"
    answer = visitor.client.get("/pair", headers={"Host": host, "Cookie": cookie})
    assert answer.status_code == status
    assert (answer.content == b"") == (status != 200)


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://elsewhere.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://127.0.0.1:9999"},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
    ],
)
def test_another_page_cannot_vote(tmp_path: Path, headers: dict[str, str]) -> None:
    visitor = Visitor(make_folder(tmp_path, 1), "ann")
    body = json.dumps({"annotator": "ann"})
    sound = {"Content-Type": "application/json"}
    assert visitor.client.post("/undo", content=body, headers=sound).status_code == 200
    assert visitor.client.post("/undo", content=body, headers=sound | headers).status_code == 403


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ({"choice": "first"}, 422),
        ({"choice": ["left"]}, 422),
        ({"comparison": "ffff"}, 422),
        ({"comparison": None}, 422),
        ({"round": 2}, 422),
        ({"note": "x" * 2001}, 422),
        ({"note": None}, 422),
        ({"seconds": "nan"}, 422),
        ({"seconds": 10**400}, 422),
        ({"id": "1"}, 422),
        ({"id": 1}, 422),
        ({"annotator": "ben"}, 409),
        ({"note": "x" * MAX_BODY}, 413),
    ],
)
def test_a_vote_out_of_range_is_refused(tmp_path: Path, sent: dict[str, Any], status: int) -> None:
    visitor = Visitor(make_folder(tmp_path, 1), "ann")
    assert visitor.send(**sent).status_code == status
    assert Store(tmp_path).votes() == []
    assert visitor.send(note="☃" * 2000).json() == {"counts": True}


@pytest.mark.parametrize("body", ["", "[]", "{", "null", "[" * 20_000])
def test_what_is_no_json_object_is_refused(tmp_path: Path, body: str) -> None:
    client = Visitor(make_folder(tmp_path, 1), "ann").client
    kind = {"Content-Type": "application/json"}
    assert client.post("/votes", content=body, headers=kind).status_code == 422


def test_half_a_character_in_a_note_does_not_stop_the_vote(tmp_path: Path) -> None:
    visitor = Visitor(make_folder(tmp_path, 1), "ann")
    vote = {"id": uuid.uuid4().hex, "annotator": "ann", "comparison": "0000", "round": 0}
    vote |= {"choice": "tie", "note": "a smile: \ud83d", "seconds": 1}
    kind = {"Content-Type": "application/json"}
    for path, sent in (("/votes", vote), ("/undo", {"annotator": "ann", "vote": "\ud83d"})):
        assert visitor.client.post(path, content=json.dumps(sent), headers=kind).is_success
    assert [vote.note for vote in Store(tmp_path).votes()] == ["a smile: ?"]


def test_a_turn_without_text_is_shown_by_what_it_holds(tmp_path: Path) -> None:
    call = {"function": {"name": "add", "arguments": "<script>1</script>"}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "Add it."}]},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "user", "content": "Question?"},
    ]
    candidates = [Candidate(text, "p", 0, text, "stop", 1, "2026") for text in "ab"]
    append(tmp_path / PROMPTS, [Prompt("p", messages, "made", 0)])
    append(tmp_path / CANDIDATES, candidates)
    Store(tmp_path).add_comparisons([Comparison("0", "p", "a", "b")])
    shown = Visitor(tmp_path, "ann").client.get("/pair")
    assert shown.status_code == 200
    for part in ("Add it.", "tool_calls", "add", "&lt;script&gt;1", "<p>3</p>", "Question?"):
        assert part in shown.text


def test_the_choice_is_of_the_answer_that_stood_there(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, 12)
    texts = {}
    for line in (folder / CANDIDATES).read_text().splitlines():
        candidate = json.loads(line)
        texts[candidate["id"]] = candidate["text"]
    comparisons = {one.id: one for one in Store(folder).comparisons()}
    visitor = Visitor(folder, "ann", repeats=0.25)
    chosen = {}
    for number in range(15):
        page = visitor.client.get("/pair").text
        left, right = re.findall(r"<p>(The \w+ answer to question \d+\.)</p>", page)
        side = ("left", "right")[number % 2]
        shown = visitor.shown()
        chosen[shown["comparison"], int(shown["round"])] = left if side == "left" else right
        assert visitor.send(side).json() == {"counts": True}
    votes = Store(folder).votes()
    assert len(votes) == 15
    assert {vote.left for vote in votes} == {"first", "second"}
    for vote in votes:
        comparison = comparisons[vote.comparison]
        answer = comparison.first if vote.choice == "first" else comparison.second
        assert texts[answer] == chosen[vote.comparison, vote.round]
    assert visitor.shown()["comparison"] == ""
    assert "All done" in visitor.client.get("/").text


def test_the_page_does_not_tell_who_answered(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, 3)
    visitor = Visitor(folder, "ann")
    candidates = [json.loads(line) for line in (folder / CANDIDATES).read_text().splitlines()]
    for path in ("/", "/pair", "/static/vote.js"):
        text = visitor.client.get(path).text
        assert "secret" not in text
        assert "model-a" not in text
        assert not any(candidate["id"] in text for candidate in candidates)


def test_a_vote_sent_twice_and_one_of_a_second_tab_are_told_apart(tmp_path: Path) -> None:
    visitor = Visitor(make_folder(tmp_path, 2), "ann")
    shown = visitor.shown()
    same: dict[str, Any] = {"id": uuid.uuid4().hex}
    of_this_pair: dict[str, Any] = {"comparison": shown["comparison"], "round": 0}
    assert visitor.send(**same, **of_this_pair).json() == {"counts": True}
    assert visitor.send(**same, **of_this_pair).json() == {"counts": True}
    assert visitor.send("right", **of_this_pair).json() == {"counts": False}
    assert len(Store(tmp_path).votes()) == 1


def test_an_undo_brings_the_pair_back(tmp_path: Path) -> None:
    visitor = Visitor(make_folder(tmp_path, 3), "ann")
    other = Visitor(tmp_path, "ben")
    other.send()
    before = visitor.shown()
    assert before["last"] == ""
    visitor.send("left")
    after = visitor.shown()
    assert after["comparison"] != before["comparison"]
    for vote in (after["last"], after["last"], other.shown()["last"]):
        sent = visitor.client.post("/undo", json={"annotator": "ann", "vote": vote})
        assert sent.status_code == 200
    assert visitor.shown() == before
    assert [vote.annotator for vote in Store(tmp_path).votes()] == ["ben"]


def test_a_pair_that_was_skipped_is_not_repeated(tmp_path: Path) -> None:
    visitor = Visitor(make_folder(tmp_path, 8), "ann", repeats=0.5)
    totals = []
    while visitor.shown()["comparison"]:
        totals.append(re.findall(r">(\d+) of (\d+)<", visitor.client.get("/pair").text)[0])
        visitor.send("skip")
    assert totals[0] == ("0", "12")
    assert len(totals) == 8


def test_the_owner_sees_how_far_everybody_is(tmp_path: Path) -> None:
    visitor = Visitor(make_folder(tmp_path, 4), "ann")
    visitor.send("left")
    visitor.send("tie", note="<b>odd</b>")
    page = Visitor(tmp_path, OWNER).client.get("/owner").text
    rows = re.findall(r'<th scope="row">(\w+)</th><td>(\d+)</td><td>(\d+)</td>', page)
    assert rows == [("ann", "2", "4"), ("ben", "0", "4"), ("eve", "0", "4")]
    assert "0 of 4 pairs have all their votes. Votes so far: 2." in page
    assert "&lt;b&gt;odd&lt;/b&gt;" in page
    assert "2 votes of people on 2 of 4 comparisons; 0 have two votes or more" in page


# The command


def run_step(folder: Path, *given: str) -> None:
    parser = argparse.ArgumentParser()
    step.add_arguments(parser)
    step.run(parser.parse_args([str(folder), *given]))


@pytest.mark.parametrize("given", ["", "ann,", "ann,ann", "owner", "a b", "../x", "ä"])
def test_names_that_cannot_be_told_apart_or_written_are_refused(given: str) -> None:
    with pytest.raises(UserError, match="--annotators"):
        read_names(given)
    assert read_names("ann, ben") == ["ann", "ben"]


def test_a_person_does_not_share_a_name_with_a_judge(tmp_path: Path) -> None:
    Store(make_folder(tmp_path, 1)).add_vote(a_vote(annotator="ann", kind="judge"))
    with pytest.raises(UserError, match="'ann' is a judge"):
        Voting(tmp_path, PEOPLE, 3, 0.0)
    Voting(tmp_path, PEOPLE[1:], 2, 0.0)


def test_the_greeting_has_every_link_and_warns_of_other_machines(tmp_path: Path) -> None:
    voting = Voting(make_folder(tmp_path, 2), PEOPLE, 3, 0.0)
    links = Links(tmp_path, PEOPLE)
    lines = step._greeting(voting, links, "127.0.0.1", 8000)
    for name, path in links.paths().items():
        assert any(line.split() == [name, f"{ADDRESS}{path}"] for line in lines)
    assert not any("WARNING" in line for line in lines)
    assert sum("WARNING" in line for line in step._greeting(voting, links, "0.0.0.0", 1)) == 1
    assert any(
        "http://[fe80::1]:1/" in line for line in step._greeting(voting, links, "fe80::1", 1)
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "say who does: --annotators"),
        (["--annotators", "ann", "--votes-per-pair", "2"], "must be from 1 to 1"),
        (["--annotators", "ann", "--repeats", "0.7"], "must be from 0 to 0.5"),
        (["--annotators", "ann", "--repeats", "nan"], "must be from 0 to 0.5"),
        (["--annotators", "ann", "--host", "256.1.1.1"], "cannot be listened on"),
        (["--annotators", "ann", "--port", "99999"], "must be from 0 to 65535"),
    ],
)
def test_arguments_out_of_range_end_in_one_line(
    tmp_path: Path, given: list[str], said: str
) -> None:
    make_folder(tmp_path, 1)
    with pytest.raises(UserError, match=said):
        run_step(tmp_path, *given)


def test_a_folder_without_comparisons_names_the_step_before(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="curate prompts"):
        run_step(tmp_path, "--annotators", "ann")
    make_folder(tmp_path, 0)
    with pytest.raises(UserError, match="curate candidates"):
        run_step(tmp_path, "--annotators", "ann")


def test_comparisons_of_answers_that_are_gone_are_not_asked_about(tmp_path: Path) -> None:
    (make_folder(tmp_path, 1) / CANDIDATES).write_text("")
    with pytest.raises(UserError, match=r"comparison 0000 names .*, which the folder does not"):
        Voting(tmp_path, ["ann"], 1, 0.0)


# In a real browser


def in_chromium(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that starts Chromium: seconds each."""
    without = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
    return pytest.mark.slow(without(test))


@pytest.fixture
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as started:
        yield started


@pytest.fixture
def browser(playwright: Playwright) -> Iterator[Browser]:
    launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    yield launched
    launched.close()


def check_votes(folder: Path, voters: Sequence[Voter], num: int) -> None:
    """Check that there is one vote for each of what is asked, equal to what its voter prefers."""
    store = Store(folder)
    good = {
        candidate["id"]: "good" in candidate["text"]
        for candidate in map(json.loads, (folder / CANDIDATES).read_text().splitlines())
    }
    comparisons = {one.id: one for one in store.comparisons()}
    prefers = {voter.name: voter.prefers_good for voter in voters}
    votes = store.votes()
    asked = [(one.annotator, one.comparison, one.round) for one in store.assignments()]
    assert sorted((vote.annotator, vote.comparison, vote.round) for vote in votes) == asked
    assert len(asked) == num
    for vote in votes:
        comparison = comparisons[vote.comparison]
        chosen = comparison.first if vote.choice == "first" else comparison.second
        assert good[chosen] == prefers[vote.annotator](vote.comparison, vote.round)


@in_chromium
def test_three_people_vote_on_every_pair_by_keys_and_clicks(
    tmp_path: Path, browser: Browser
) -> None:
    folder = make_folder(tmp_path, 10)
    people = [Voter("ann", 0.0), Voter("ben", 0.2), Voter("eve", 0.4)]
    with served(folder, "--annotators=ann,ben,eve", "--repeats=0.2") as server:
        for voter in people:
            context = browser.new_context()
            page = context.new_page()
            page.goto(server.links[voter.name])
            page.wait_for_url("**/")
            while voter.vote(page):
                pass
            assert page.inner_text("#count") == "12 of 12"
            context.close()
    check_votes(folder, people, 3 * 12)
    assert all(0 < vote.seconds < 60 for vote in Store(folder).votes())
    # Nothing was logged: no request, so no token
    assert server.said.count("/enter/") == 4
    assert len(server.said.splitlines()) == 6


def come_in(browser: Browser, server: Server, name: str, **rest: Any) -> Page:
    """Return a page that has opened a person's link, and is ready."""
    page = browser.new_context(**rest).new_page()
    page.goto(server.links[name])
    page.wait_for_url("**/")
    page.wait_for_selector(READY)
    return page


def press(page: Page, key: str) -> None:
    """Press a key, and wait for what follows."""
    before = page.get_attribute("#pair", "data-last")
    page.keyboard.press(key)
    page.wait_for_selector(f"#pair:not([data-last='{before}'])")
    page.wait_for_selector(READY)


HOSTILE = (
    "good <script>window.ran = 1</script><img src=x onerror='window.ran = 2'>"
    "<svg onload='window.ran = 3'> ![x](http://127.0.0.1:9/x.png)\n\n<iframe src='//127.0.0.1:9'>",
    "[click](javascript:window.ran=4) `<style>*{display:none}</style>`\n\n"
    "```\n" + "a long line of code " * 40 + "\n```\n\n" + "w" * 500,
)


@in_chromium
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_answer_with_script_is_shown_and_not_run_and_fits_the_width(
    tmp_path: Path, browser: Browser, width: int, scheme: Any
) -> None:
    folder = make_folder(tmp_path, 1, HOSTILE)
    with served(folder, "--annotators=ann") as server:
        view: Any = {"width": width, "height": 800}
        page = come_in(browser, server, "ann", viewport=view, color_scheme=scheme)
        asked: list[str] = []
        complaints: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.reload()
        page.wait_for_selector(READY)
        text = page.inner_text(".answers")
        for shown in ("<script>window.ran = 1</script>", "<svg onload=", "<iframe src=", "<style>"):
            assert shown in text
        assert page.evaluate("window.ran") is None
        assert page.locator("#pair :is(script, img, svg, iframe, style)").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") == width
        tops = "answers => answers.map(answer => answer.getBoundingClientRect().top)"
        first, second = page.locator(".answer").evaluate_all(tops)
        assert (first == second) == (width == 1280)
        dark = (
            page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        )
        assert dark == (scheme == "dark")
        address = server.links["ann"].partition("/enter/")[0]
        assert asked
        assert all(url.startswith(f"{address}/") for url in asked)
        assert complaints == []


@in_chromium
def test_every_key_does_what_the_page_says(tmp_path: Path, browser: Browser) -> None:
    folder = make_folder(tmp_path, 8)
    store = Store(folder)
    with served(folder, "--annotators=ann", "--repeats=0") as server:
        page = come_in(browser, server, "ann")
        page.keyboard.press("?")
        assert page.is_visible("#keys")
        # Keys do not vote behind the list of keys
        page.keyboard.press("1")
        page.keyboard.press("Escape")
        assert not page.is_visible("#keys")
        assert store.votes() == []
        page.keyboard.press("n")
        page.keyboard.type("1 2 t b s: text, no votes")
        page.reload()
        page.wait_for_selector(READY)
        assert page.input_value("#note") == "1 2 t b s: text, no votes"
        for key in ("1", "ArrowLeft", "2", "ArrowRight", "t", "b", "s"):
            press(page, key)
        votes = store.votes()
        assert votes[0].note == "1 2 t b s: text, no votes"
        assert {vote.note for vote in votes[1:]} == {""}
        sides = [vote.choice == vote.left for vote in votes[:4]]
        assert sides == [True, True, False, False]
        assert [vote.choice for vote in votes[4:]] == ["tie", "both_bad", "skip"]
        for held in ("Control+1", "Alt+2", "Meta+t", "x"):
            page.keyboard.press(held)
        before = votes[-1].comparison
        press(page, "u")
        assert page.get_attribute("#pair", "data-comparison") == before
        assert store.votes() == votes[:-1]
        # Every control can be reached by Tab, and shows where the focus is
        reached = set()
        for _ in range(12):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.innerText.trim()"))
            outline = "getComputedStyle(document.activeElement).outlineStyle"
            assert page.evaluate("document.activeElement === document.body") or (
                page.evaluate(outline) == "solid"
            )
        for words in ("Answer 1 is better", "Both bad", "Undo", "Keys"):
            assert any(words in text for text in reached), words


@in_chromium
def test_a_vote_whose_answer_is_lost_counts_once(tmp_path: Path, browser: Browser) -> None:
    folder = make_folder(tmp_path, 3)
    voter = Voter("ann", 0.3)
    sent: list[str | None] = []

    def lose(route: Route) -> None:
        # The server takes the vote; the page hears nothing, then of an error, then the answer
        sent.append(route.request.post_data)
        route.fetch()
        match len(sent) % 3:
            case 1:
                route.abort()
            case 2:
                route.fulfill(status=503)
            case _:
                route.continue_()

    with served(folder, "--annotators=ann", "--repeats=0") as server:
        page = come_in(browser, server, "ann")
        page.route("**/votes", lose)
        while voter.vote(page):
            pass
    assert len(sent) == 9
    assert len(set(sent)) == 3
    check_votes(folder, [voter], 3)


@in_chromium
def test_a_vote_that_the_server_has_not_got_outlives_the_page(
    tmp_path: Path, browser: Browser
) -> None:
    folder = make_folder(tmp_path, 3)
    with served(folder, "--annotators=ann", "--repeats=0") as server:
        page = come_in(browser, server, "ann")
        server.kill()
        page.keyboard.press("t")
        page.wait_for_selector("#status.problem")
        # A vote is under way: no other key votes
        page.keyboard.press("1")
        page.close(run_before_unload=False)
        server.start()
        again = page.context.new_page()
        again.goto(server.links["ann"].partition("/enter/")[0])
        wait_for(lambda: len(Store(folder).votes()) == 1)
        again.wait_for_selector(READY)
        assert again.inner_text("#count") == "1 of 3"
        assert again.evaluate("Object.keys(localStorage).length") == 0
    assert [vote.choice for vote in Store(folder).votes()] == ["tie"]


@in_chromium
def test_a_vote_that_the_browser_cannot_keep_is_not_called_saved(
    tmp_path: Path, browser: Browser
) -> None:
    full = "Storage.prototype.setItem = () => { throw new DOMException('', 'QuotaExceededError'); }"
    with served(make_folder(tmp_path, 2), "--annotators=ann", "--repeats=0") as server:
        page = come_in(browser, server, "ann")
        page.wait_for_selector(READY)
        page.evaluate(f"() => {{ window.kept = Storage.prototype.setItem; {full} }}")
        page.keyboard.press("1")
        page.wait_for_selector("#status.problem:has-text('Not saved')")
        page.evaluate("() => { Storage.prototype.setItem = window.kept; }")
        page.keyboard.press("1")
        page.wait_for_selector("#count:has-text('1 of 2')")
    assert len(Store(tmp_path).votes()) == 1


@in_chromium
def test_two_tabs_of_one_person_never_double_a_vote(tmp_path: Path, browser: Browser) -> None:
    folder = make_folder(tmp_path, 8)
    with served(folder, "--annotators=ann", "--repeats=0") as server:
        page = come_in(browser, server, "ann")
        other = page.context.new_page()
        other.goto(page.url)
        for _ in range(8):
            for tab in (page, other):
                tab.wait_for_selector(READY)
            # Both tabs vote at once, differently, mostly on the same pair
            page.evaluate("document.querySelector('[data-choice=left]').click()")
            other.evaluate("document.querySelector('[data-choice=right]').click()")
        for tab in (page, other):
            tab.wait_for_selector(READY)
            tab.wait_for_selector("text=All done")
    votes = Store(folder).votes()
    assert sorted(vote.comparison for vote in votes) == names_of(8)


@in_chromium
def test_a_page_of_one_person_does_not_vote_for_another(tmp_path: Path, browser: Browser) -> None:
    folder = make_folder(tmp_path, 2)
    with served(folder, "--annotators=ann,ben", "--repeats=0") as server:
        page = come_in(browser, server, "ann")
        other = page.context.new_page()
        other.goto(server.links["ben"])
        other.wait_for_url("**/")
        page.keyboard.press("1")
        page.wait_for_selector("#status.problem")
        assert "Open the link of ann again" in page.inner_text("#status")
        assert Store(folder).votes() == []
        page.goto(server.links["ann"])
        wait_for(lambda: [vote.annotator for vote in Store(folder).votes()] == ["ann"])


@in_chromium
def test_a_page_whose_script_did_not_arrive_says_what_to_do(
    tmp_path: Path, playwright: Playwright
) -> None:
    with served(make_folder(tmp_path / "folder", 1), "--annotators=ann") as server:
        page = open_browser(playwright, tmp_path / "ann").new_page()
        page.route("**/vote.js", lambda route: route.abort())
        page.goto(server.links["ann"])
        assert "load it again" in page.inner_text("#status")
        page.unroute("**/vote.js")
        page.reload()
        page.wait_for_selector(READY)
        assert page.inner_text("#status") == ""
        page.context.close()


@in_chromium
def test_no_vote_is_lost_or_doubled_when_server_and_browser_are_killed(
    tmp_path: Path, playwright: Playwright
) -> None:
    folder = make_folder(tmp_path / "folder", 12)
    people = [Voter("ann", 0.1), Voter("ben", 0.3), Voter("eve", 0.5)]
    moments = random.Random(19)
    num_kills = 0
    done = threading.Event()
    with served(folder, "--annotators=ann,ben,eve", "--repeats=0.25") as server:

        def kill_servers() -> None:
            nonlocal num_kills
            while not done.wait(moments.uniform(0.2, 4)):
                server.kill()
                num_kills += 1
                server.start()

        killer = threading.Thread(target=kill_servers)
        killer.start()
        try:
            for voter in people:
                profile = tmp_path / voter.name
                for _ in range(3):
                    vote_in_a_browser(playwright, server, voter, profile, moments.uniform(0.5, 5))
                assert vote_in_a_browser(playwright, server, voter, profile, None)
        finally:
            done.set()
            killer.join()
    assert num_kills >= 5
    check_votes(folder, people, 3 * 15)


def vote_in_a_browser(
    playwright: Playwright, server: Server, voter: Voter, profile: Path, seconds: float | None
) -> bool:
    """Vote in a browser, which is killed after some seconds; return whether all is done."""
    context = open_browser(playwright, profile)
    # On busy cores the server is away for most of the time, and a vote waits for it
    context.set_default_timeout(120_000)
    page = context.new_page()
    knock(page, server.links[voter.name])
    timer = threading.Timer(seconds or 0, kill_browser, [profile])
    if seconds is not None:
        timer.start()
    try:
        while voter.vote(page):
            pass
        return True
    except Error:
        if seconds is None:
            raise
        return False  # the browser is gone
    finally:
        timer.cancel()
        if seconds is not None:
            timer.join()
        with contextlib.suppress(Error):
            context.close()


HAS_SCRIPT = "!document.getElementById('status').textContent.includes('load it again')"


def knock(page: Page, link: str) -> None:
    """Open a link; where the server is away, try again."""
    for _ in range(200):
        try:
            page.goto(link)
            page.wait_for_url("**/", timeout=5000)
            # Where the server went away before it had sent the script, the page asks for this
            page.wait_for_function(HAS_SCRIPT, timeout=5000)
            return
        except Error:
            time.sleep(0.1)
    raise AssertionError(link)
