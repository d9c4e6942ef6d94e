"""The preview: what is shown are the ids of training, and figures are those of its arithmetic."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orpo_lab import config, data
from orpo_lab.__main__ import main
from orpo_lab.compare.guess import share_right
from orpo_lab.compare.verdict import CONFIDENCE
from orpo_lab.data.encode import fit
from orpo_lab.data.faults import Fault
from orpo_lab.data.length_bias import LengthBias
from orpo_lab.preview import figures, page
from orpo_lab.preview.figures import Lengths, candidates, fates, share_of, without_shared
from orpo_lab.preview.rows import Part, Piece, Reader, visible

Load = Callable[..., config.Config]

PAIRS = [
    {"prompt": f"add {n} and {n}.", "chosen": f"it is {2 * n}, sure.", "rejected": f"{n}"}
    for n in range(40)
]
EVIL = {
    "prompt": "show <b>this</b>\x1b[31m.",
    "chosen": "<script>alert(1)</script>",
    "rejected": "no",
}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file of 36 pairs, one of them hostile, and three faults; five held-out pairs beside it."""
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS[35:]))
    file = tmp_path / "pairs.jsonl"
    faults = [
        PAIRS[0],
        {**PAIRS[1], "chosen": ""},
        {"prompt": "long " * 200, "chosen": "a", "rejected": "b"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*PAIRS[:35], EVIL, *faults]))
    return file


@pytest.fixture
def reader(tokenizer: Any) -> Reader:
    return Reader(tokenizer, scores_prompt=True, reads_rejected=True)


def text_of(part: Part) -> str:
    return "".join(piece.text for piece in part.pieces)


def test_what_is_shown_are_the_ids_of_training_decoded(
    load: Load, tokenizer: Any, reader: Reader
) -> None:
    pairs = data.load(load("dataset.num_train=8", "dataset.num_eval=4").dataset, tokenizer)
    for row in pairs.train:
        parts = reader.read(row)
        assert [part.name for part in parts] == ["prompt", "chosen", "rejected"]
        for part in parts:
            ids = row[f"{part.name}_ids"]
            assert text_of(part) == tokenizer.decode(ids)
            assert part.num_tokens == len(ids)
            assert part.last[-1].endswith(f" {ids[-1]}")
        assert parts[1].first[0].endswith(f" {row['chosen_ids'][0]}")


def test_what_the_loss_covers_is_marked_and_special_tokens_stand_apart(tokenizer: Any) -> None:
    eos, (a, b, c) = tokenizer.eos_token_id, tokenizer("abc")["input_ids"][:3]
    row = {"prompt_ids": [a, b], "chosen_ids": [b, c, eos], "rejected_ids": [a]}

    def covered(row: dict[str, Any], **options: bool) -> list[list[tuple[bool, bool]]]:
        settings = {"scores_prompt": False, "reads_rejected": True} | options
        read = Reader(tokenizer, **settings).read(row)
        return [[(p.is_supervised, p.is_special) for p in part.pieces] for part in read]

    answer = [(True, False), (True, True)]
    assert covered(row) == [[(False, False)], answer, [(True, False)]]
    assert covered(row, reads_rejected=False)[2] == [(False, False)]
    # Nothing predicts the first token
    assert covered(row, scores_prompt=True)[0] == [(False, False), (True, False)]
    masked = row | {"chosen_mask": [False, True, True], "rejected_mask": [True]}
    assert covered(masked)[1] == [(False, False), *answer]
    # A single completion has one side
    assert len(covered(row | {"rejected_ids": []})) == 2


def test_a_part_says_what_it_adds_to_the_text_before_it() -> None:
    class Pieces:
        """Leaves out the space at the beginning of a text, as SentencePiece does."""

        all_special_ids = (0,)

        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(("</s>", " a", " b")[token] for token in ids).removeprefix(" ")

    parts = Reader(Pieces(), True, True).read(
        {"prompt_ids": [1, 2], "chosen_ids": [2, 1, 0], "rejected_ids": [1]}
    )
    assert [text_of(part) for part in parts] == ["a b", " b a</s>", " a"]


def test_characters_that_cannot_be_seen_are_escapes() -> None:
    assert visible("a\x1b[31m\x00\u202e\u200b") == r"a\x1b[31m\x00\u202e\u200b"
    kept = "line\n\ttab \u3000 \u05d0 \U0001f468\u200d\U0001f469 \u00e9"
    assert visible(kept) == kept


def test_without_colours_marks_stand_around_what_the_loss_covers() -> None:
    pieces = [Piece("ask", False, False), Piece("ans", False, True), Piece("<e>", True, True)]
    part = Part("chosen", 3, pieces, ["'ans' 1"], ["'<e>' 2"])
    preview = page.Preview(FIGURES, [[part]])
    assert "ask\u27e6ans<e>\u27e7" in page.text(preview, has_colour=False)
    assert "ask\x1b[32mans\x1b[0m\x1b[32m\x1b[7m<e>\x1b[0m" in page.text(preview, has_colour=True)


FIGURES: dict[str, Any] = {
    "overrides": [],
    "max_length": 8,
    "overlong": "drop",
    "splits": {
        "train": {
            "report": {"num_kept": 1, "num_cut": 0, "dropped": {}, "kept": {}},
            "lengths": {"prompt": {"p5": 1}},
        }
    },
    "candidates": [{"max_length": 8, "kept": 1}],
    "near_duplicates": {"missing": "no datasketch"},
    "length_bias": None,
}


@pytest.mark.parametrize("overlong", ["drop", "cut_prompt", "cut_completion"])
def test_what_a_length_keeps_cuts_and_drops_is_what_fit_does(load: Load, overlong: str) -> None:
    rng = np.random.default_rng(0)
    lengths = Lengths(*rng.integers(1, 40, (3, 400)))
    settings = load(
        f"dataset.overlong={overlong}", "dataset.max_length=32", "dataset.max_prompt_length=20"
    ).dataset
    counted = {"kept": 0, "cut": 0, "dropped": 0}
    for sizes in zip(lengths.prompt, lengths.chosen, lengths.rejected, strict=True):
        # Answers that differ in their first token: no cut makes them equal
        prompt, *sides = ([side, *range(10, 9 + size)] for side, size in enumerate(sizes))
        try:
            _, cut = fit(prompt, sides[0], sides[1], settings)
            counted["cut" if cut else "kept"] += 1
        except Fault:
            counted["dropped"] += 1
    assert fates(lengths, settings) == counted
    assert min(counted.values()) > 0 or (overlong == "drop" and not counted["cut"])


def test_lengths_are_looked_at_up_to_one_that_keeps_all_rows(load: Load) -> None:
    lengths = Lengths(np.array([100, 200]), np.array([50, 300]), np.array([60, 10]))
    configured = load("dataset.max_length=300").dataset

    def of_length(max_length: int) -> Any:
        if max_length > limit:
            return None
        return replace(configured, max_length=max_length, max_prompt_length=max_length // 2)

    limit = 4096
    found = candidates(lengths, configured, of_length)
    assert [row["max_length"] for row in found] == [128, 256, 300, 512]
    assert [row["kept"] for row in found] == [0, 1, 0, 2]
    limit = 256
    assert [row["max_length"] for row in candidates(lengths, configured, of_length)] == [
        128,
        256,
        300,
    ]


def test_percentiles_are_lengths_of_rows(load: Load) -> None:
    prompt = np.arange(1, 101)
    found = Lengths(prompt, 2 * prompt, 3 * prompt).percentiles()
    assert found["chosen"]["max"] == 200
    assert found["prompt"] == {
        "p5": 6,
        "p25": 26,
        "p50": 51,
        "p75": 76,
        "p95": 96,
        "p99": 100,
        "max": 100,
    }


def test_the_share_of_longer_answers_has_wilsons_interval_and_no_ties() -> None:
    from scipy.stats import norm

    found = share_of(LengthBias(num_longer=60, num_shorter=20, num_ties=100))
    z, n, p = norm.isf((1 - CONFIDENCE) / 2), 80, 0.75
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    assert found.estimate == p
    assert (found.low, found.high) == pytest.approx((middle - reach, middle + reach))
    assert share_of(LengthBias(0, 0, 5)).estimate == 0.5


def test_what_all_prompts_share_does_not_make_them_alike() -> None:
    texts = [
        "<s>system: a\nask one</s>go",
        "<s>system: a\nsay two</s>go",
        "<s>system: a\nask</s>go",
    ]
    assert without_shared(texts) == ["ask one", "say two", "ask"]
    assert without_shared(["same", "same"]) == ["same", "same"]


def test_near_duplicates_are_counted_once_each_and_across_the_splits() -> None:
    import datasets

    long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen {} end"
    split = lambda *texts: datasets.Dataset.from_dict({"prompt_text": texts})  # noqa: E731
    train = split("a b c", "a b c", *(long.format(n) for n in ("", "x y z fifteen")), "k l m n")
    held_out = split("p q r s t", "A  B c")
    found = figures.duplicates(data.Data(train, held_out, {}))
    assert found["num_prompts"] == 4
    assert found["num_held_out_near_train"] == 1
    assert found["examples"][0] == ["a b c", "A  B c"]
    assert found["num_near_duplicates"] == len(found["examples"]) - 1


def test_the_command_prints_figures_as_json_and_writes_a_page_without_the_datas_own_markup(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["dataset=file", f"dataset.train_path={rows}", "dataset.max_length=64"]
    arguments.append(f"dataset.eval_path={rows.with_name('eval.jsonl')}")
    main(["preview", *arguments, "--rows", "60", "--out", str(out), "--json"])
    found = json.loads(capsys.readouterr().out)
    train = found["splits"]["train"]["report"]
    faults = {fault: entry["num"] for fault, entry in train["dropped"].items()}
    assert faults == {"duplicate": 1, "empty_completion": 1, "prompt_too_long": 1}
    assert found["splits"]["train"]["lengths"]["prompt"]["max"] > 200
    row = next(row for row in found["candidates"] if row["max_length"] == 64)
    assert row["dropped"] == 1
    assert row["kept"] == train["num_kept"]
    assert found["length_bias"]["rule"] == "longer"
    assert found["length_bias"]["length_guess_accuracy"]["estimate"] == 1
    html = (out / "preview.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert r"show &lt;b&gt;this&lt;/b&gt;\x1b[31m." in html
    assert not {"<script", "<b>", "\x1b"} & {*re.findall("<script|<b>|\x1b", html)}


def test_fewer_pairs_than_a_batch_are_shown_with_a_warning_and_nothing_that_trains_is_imported(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # They import what puts adapters on weights, which takes a second
    for name in ("orpo_lab.training.trainer", "orpo_lab.model.start"):
        monkeypatch.setitem(sys.modules, name, None)
    arguments = [f"dataset.eval_path={rows.with_name('eval.jsonl')}", "dataset.max_length=64"]
    arguments += ["dataset=file", f"dataset.train_path={rows}", "train.batch_size=64"]
    main(["preview", *arguments, "--out", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert "WARNING: training refuses this: train.batch_size=64 is above the 36" in said.err
    assert "Lengths in tokens" in said.out


def test_the_interval_of_a_guess_is_one_of_a_share() -> None:
    found = share_right(np.array([1, 1, 1, 0.5, 0.5, 1, 1, 0]))
    assert 0 < found.low < found.estimate == 0.75
    assert found.high == 1
    assert np.isnan(share_right(np.array([1.0])).high)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["dataset=none_such"], "error: Could not find 'dataset/none_such'"),
        (["dataset=file"], "error: dataset.train_path has no value here"),
        (["--rows", "-1"], "error: --rows -1 must be 0 or more"),
        (["beta=x"], "error: "),
    ],
)
def test_what_launch_refuses_is_refused_in_one_line(arguments: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["preview", *arguments])
    assert str(stopped.value).startswith(said)
    assert len(str(stopped.value).splitlines()) == 1


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
def test_the_page_fits_a_narrow_window_in_both_schemes_and_asks_for_nothing(
    reader: Reader, tokenizer: Any, tmp_path: Path
) -> None:
    from playwright.sync_api import sync_playwright

    ids = tokenizer("word" * 200)["input_ids"]
    parts = reader.read({"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids})
    file = page.write(page.Preview(FIGURES, [parts]), tmp_path)
    asked, backgrounds = [], set()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for width in (400, 1280):
            for scheme in ("light", "dark"):
                size: Any = {"width": width, "height": 900}
                opened = browser.new_page(viewport=size, color_scheme=scheme)
                opened.on("request", lambda request: asked.append(request.url))
                opened.goto(file.as_uri())
                assert opened.evaluate("document.documentElement.scrollWidth") == width
                backgrounds.add(opened.evaluate("getComputedStyle(document.body).backgroundColor"))
                opened.close()
        browser.close()
    assert {url.split(":")[0] for url in asked} <= {"file", "data"}
    assert len(backgrounds) == 2
