"""Pairs and their card: what a row holds, what trains on it, and what neither file says."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from orpo_lab import config, run
from orpo_lab.config.dataset import PairColumns
from orpo_lab.curate import card, pairs
from orpo_lab.curate.pairs import Curation, make
from orpo_lab.curate.rules import Rule
from orpo_lab.curate.store import Vote
from orpo_lab.data.forms import to_pair
from orpo_lab.data.pairs import Pair, find_faults
from orpo_lab.errors import UserError
from tests import curation
from tests.curation import alternating, candidates, comparisons, erring, prompts, vote, votes_of

SECRET = "hf_" + "a1B2" * 8


def curated(votes: list[Vote], num: int, **changes: Any) -> Curation:
    given: dict[str, Any] = {"prompts": prompts(num), "candidates": candidates(num)} | changes
    return Curation("sums", comparisons=comparisons(num), votes=votes, **given)


def provenance(**changes: Any) -> dict[str, Any]:
    """A row with nothing but what a card reads of it."""
    told = {"source": "a.jsonl", "licence": "mit"} | changes
    answers = {side: [{"content": side}] for side in ("chosen", "rejected")}
    return {**answers, "provenance": told}


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the head and the text of a card."""
    _, head, text = (folder / "card.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_the_winner_is_chosen_whichever_name_it_has() -> None:
    votes = votes_of({"ann": "fst", "bob": "fst", "cid": "sst"})
    made = make(curated(votes, 3), Rule())
    assert [row["chosen"][0]["content"] for row in made.rows] == ["it is 0.", "3."]
    assert [row["rejected"][0]["content"] for row in made.rows] == ["1.", "it is 2."]
    assert [row["prompt"] for row in made.rows] == [one.messages for one in prompts(2)]
    assert made.dropped == {"even": 1}


def test_a_row_says_where_it_comes_from_and_how_many_chose() -> None:
    votes = votes_of({"ann": "s", "bob": "s", "cid": "f", "dee": "t", "eve": "b", "fay": "k"})
    (row,) = make(curated(votes, 1), Rule(majority=0.4)).rows
    told = row["provenance"]
    assert (told["chosen_id"], told["rejected_id"], told["prompt_id"]) == ("b0", "a0", "p0")
    assert told["votes"] == {"chosen": 2, "rejected": 1, "tie": 1, "both_bad": 1}
    assert (told["num_annotators"], told["agreement"]) == (5, 0.4)
    assert (told["source"], told["row"], told["licence"]) == ("sums.jsonl", 0, "mit")
    assert told["chosen_made_by"] == candidates(1)[1].made_by


def test_answers_that_are_the_same_or_empty_make_no_pair() -> None:
    same = [candidates(1)[0], candidates(1)[0]]
    for texts in (("4", " 4\n"), ("", "4")):
        changed = [
            type(one)(**{**vars(one), "id": f"{side}0", "text": text})
            for one, side, text in zip(same, "ab", texts, strict=True)
        ]
        made = make(curated(votes_of({"x": "f", "y": "f"}), 1, candidates=changed), Rule())
        assert (made.rows, made.dropped) == ([], {"same_text": 1})


def test_a_judge_counts_only_where_the_rule_says_so() -> None:
    votes = votes_of({"ann": "f"})
    votes += [vote("0", "llm", "first", kind="judge", round_=number) for number in (0, 1)]
    assert not make(curated(votes, 1), Rule()).rows
    (row,) = make(curated(votes, 1), Rule(judges=True)).rows
    assert row["provenance"]["num_annotators"] == 2


def test_votes_on_answers_that_are_gone_are_refused() -> None:
    with pytest.raises(UserError, match="comparison 0 names b0, which the folder does not hold"):
        make(curated(votes_of({"x": "f", "y": "f"}), 1, candidates=candidates(1)[:1]), Rule())


def test_neither_file_names_an_annotator_a_secret_or_a_folder(tmp_path: Path) -> None:
    made_by = {"model": str(tmp_path / "private" / "small"), "note": SECRET}
    votes = erring(alternating(6), (0.1, 0.1), seed=0)
    votes = [type(one)(**{**vars(one), "annotator": f"ann-{one.annotator}"}) for one in votes]
    folder = curation.write(tmp_path, votes, 6, of_candidates=candidates(6, **made_by))
    curation.step(pairs, str(folder))
    for name in ("pairs.jsonl", "card.md"):
        text = (folder / name).read_text()
        assert "ann-" not in text
        assert SECRET not in text
        assert "private" not in text
        assert "small" in text
    assert "| person 1 | 6 |" in card_of(folder)[1]


def test_the_step_says_what_it_keeps_and_why_not_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = curation.write(tmp_path, votes_of({"ann": "fst", "bob": "fft"}), 4)
    curation.step(pairs, str(folder), "--min-votes", "1", "--majority", "1")
    said = capsys.readouterr().out
    assert said.startswith("1 pairs of 4 comparisons\n")
    assert "  1 are left out: fewer votes than --min-votes\n" in said
    assert "  2 are left out: the lead of an answer is smaller than --margin\n" in said
    assert f"dataset=file dataset.train_path={folder / 'pairs.jsonl'}" in said
    assert len((folder / "pairs.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("votes", "said"),
    [
        ({"ann": "fs"}, "(2 too_few_votes); --min-votes 1 --majority 0.5 alone would keep 2"),
        ({"ann": "ft", "bob": "tf"}, "(2 no_majority); --min-votes 1 --majority 0.5 alone would"),
        (
            {"ann": "f", "bob": "f", "cat": "t", "dan": "t", "eve": "b"},
            "(1 no_majority, 1 too_few_votes); --tie ignore --both-bad ignore alone would keep 1",
        ),
        ({"ann": "tt", "bob": "bt"}, "(2 even); no rule would keep any: take more votes"),
    ],
)
def test_no_pair_is_refused_with_what_to_change(
    tmp_path: Path, votes: dict[str, str], said: str
) -> None:
    folder = curation.write(tmp_path, votes_of(votes), 2)
    with pytest.raises(UserError) as error:
        curation.step(pairs, str(folder))
    assert said in str(error.value)
    assert not (folder / "pairs.jsonl").exists()


def test_what_to_change_names_judges_and_the_default_rule(tmp_path: Path) -> None:
    both = [vote("0", name, "first", kind="judge", round_=n) for name in "jk" for n in (0, 1)]
    folder = curation.write(tmp_path / "judges", both, 1)
    with pytest.raises(UserError, match="; --judges alone would keep 1"):
        curation.step(pairs, str(folder))
    folder = curation.write(tmp_path / "people", votes_of({"ann": "f", "bob": "f"}), 1)
    with pytest.raises(UserError, match=r"; --min-votes 1 --majority 0\.5 alone would keep 1"):
        curation.step(pairs, str(folder), "--margin", "3")


def test_the_card_has_the_hubs_head(tmp_path: Path) -> None:
    folder = curation.write(tmp_path, votes_of({"ann": "ff", "bob": "ff"}), 2)
    curation.step(pairs, str(folder), "--language", "en")
    head, text = card_of(folder)
    assert head["license"] == "mit"
    assert head["language"] == ["en"]
    assert head["size_categories"] == ["n<1K"]
    assert {"preference", "dpo", "orpo"} <= set(head["tags"])
    assert "| **pairs** | 2 |" in text
    assert "alpha" in text
    assert "WARNING" not in text
    curation.step(pairs, str(folder))
    assert "language" not in card_of(folder)[0]


@pytest.mark.parametrize(
    ("licences", "expected", "num_warnings"),
    [(["mit", "mit"], "mit", 0), (["mit", None], "unknown", 1), (["mit", "cc0-1.0"], "other", 1)],
)
def test_licences_that_lack_or_differ_are_warned_of(
    licences: list[str | None], expected: str, num_warnings: int
) -> None:
    rows = [provenance(licence=licence) for licence in licences]
    assert card.licence_of(rows) == expected
    assert len(card.licence_warnings(rows)) == num_warnings


def test_the_length_bias_is_that_of_pairs_that_differ_in_length() -> None:
    texts = [("long", "x"), ("long", "y"), ("z", "long"), ("same", "size")]
    rows = [{"chosen": [{"content": a}], "rejected": [{"content": b}]} for a, b in texts]
    assert "chosen one in 67 % of the 3 pairs" in card.length_bias(rows)


def test_a_name_cannot_break_a_cards_tables(tmp_path: Path) -> None:
    odd = prompts(2, source="a | b\n# c")
    folder = curation.write(tmp_path, votes_of({"x": "ff", "y": "ff"}), 2, of_prompts=odd)
    curation.step(pairs, str(folder))
    assert r"| a \| b # c | mit | 2 |" in card_of(folder)[1]


def test_a_row_is_a_pair_without_a_fault_to_training() -> None:
    columns = PairColumns(prompt="prompt", chosen="chosen", rejected="rejected")
    rows = make(curated(votes_of({"x": "fs", "y": "fs"}), 2), Rule()).rows
    for row in json.loads(json.dumps(rows)):
        pair = to_pair(row, columns)
        assert pair == Pair(row["prompt"], row["chosen"], row["rejected"])
        assert not list(find_faults(pair, re.compile("(?!)")))


@pytest.mark.slow
def test_the_pairs_train_as_they_are(
    tmp_path: Path, load: Callable[..., config.Config], capsys: pytest.CaptureFixture[str]
) -> None:
    votes = erring(alternating(24), (0.1, 0.1, 0.1), seed=4)
    folder = curation.write(tmp_path / "sums", votes, 24)
    curation.step(pairs, str(folder))
    (command,) = re.findall(r"train  python launch.py (.*)\n", capsys.readouterr().out)
    given = [part for part in shlex.split(command) if not part.startswith("model=")]
    sizes = ("dataset.num_generations=0", "dataset.max_length=96", "train.max_steps=2")
    loaded = load(*given, *sizes, "train.batch_size=4", "optimizer=adamw", "tracker=none")
    run.train(loaded, tmp_path / "run", choices={}, overrides=[])
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert report["train"]["unread_columns"] == ["provenance"]
    assert report["train"]["dropped"] == report["held_out"]["dropped"] == {}
    num = len((folder / "pairs.jsonl").read_text().splitlines())
    assert report["train"]["num_kept"] + report["held_out"]["num_kept"] == num > 20
    assert capsys.readouterr().out.count("the columns provenance are not read") == 1
