"""Mixtures: shares worked out by hand, held out and reported per source, one run after a kill."""

import json
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orpo_lab import config, data
from orpo_lab.compare import evidence, page
from orpo_lab.compare.read import find_runs
from orpo_lab.config import identity
from orpo_lab.config.command_line import as_typed
from orpo_lab.data.mixture import interleave, largest_total, share_out
from orpo_lab.errors import UserError
from orpo_lab.metrics import HELD_OUT
from tests.conftest import compose_anew, compose_config, ours
from tests.test_checkpoint import Launch, assert_same, signal_after

MATH, CHAT = "dataset.sources.math", "dataset.sources.chat"


def questions(kind: str, num: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"{kind} {number}?", "chosen": f"{number}", "rejected": "no"}
        for number in range(num)
    ]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def mix(tmp_path: Path, tokenizer: Any) -> Callable[..., data.Data]:
    """Load 40 questions about maths and 20 in a chat, of each of which 4 are held out."""
    write(tmp_path / "math.jsonl", questions("add", 40))
    chat = [
        {"q": row["prompt"], "good": row["chosen"], "bad": row["rejected"]}
        for row in questions("say", 20)
    ]
    write(tmp_path / "chat.jsonl", chat)
    return lambda *overrides: data.load(compose(tmp_path, *overrides).dataset, tokenizer)


def compose(folder: Path, *overrides: str) -> config.Config:
    given = [
        "dataset=mixture",
        "dataset.num_eval=4",
        f"{MATH}.train_path={folder}/math.jsonl",
        f"{CHAT}.train_path={folder}/chat.jsonl",
        f"{CHAT}.columns.prompt=q",
        f"{CHAT}.columns.chosen=good",
        f"{CHAT}.columns.rejected=bad",
        *overrides,
    ]
    # Only Hydra itself chooses an option of a group inside a group
    if any(".columns=" in override for override in overrides):
        return config.load(ours(compose_anew(*as_typed(given))))
    return config.load(compose_config(*given))


@pytest.mark.parametrize(
    ("weights", "total", "nums"),
    [
        ({"a": 0.7, "b": 0.3}, 10, {"a": 7, "b": 3}),
        ({"a": 7, "b": 3}, 11, {"a": 8, "b": 3}),  # 7.7 and 3.3
        ({"a": 1, "b": 1, "c": 1}, 11, {"a": 4, "b": 4, "c": 3}),  # 3.67 each
        ({"a": 1, "b": 1}, 3, {"a": 2, "b": 1}),
        ({"a": 0.1, "b": 0.2, "c": 0.7}, 7, {"a": 1, "b": 1, "c": 5}),  # 0.7, 1.4 and 4.9
    ],
)
def test_a_total_is_shared_out_by_weights(
    weights: dict[str, float], total: int, nums: dict[str, int]
) -> None:
    assert share_out(weights, total) == nums


def test_the_largest_total_takes_all_of_the_scarcest_source() -> None:
    # 0.3 of 10 are 3; a total of 11 would take 3.3 or, rounded, at least 3, and 7.7 of 7
    assert largest_total({"a": 0.7, "b": 0.3}, {"a": 7, "b": 3}) == 10
    assert largest_total({"a": 1, "b": 3}, {"a": 36, "b": 16}) == 21
    assert share_out({"a": 1, "b": 3}, 21) == {"a": 5, "b": 16}


def test_sources_are_spread_evenly_and_keep_their_own_order() -> None:
    # Places 0 to 3 stand at 1/8, 3/8, 5/8 and 7/8 of the way, 4 and 5 at 1/4 and 3/4
    assert interleave([4, 2]).tolist() == [0, 4, 1, 2, 5, 3]
    assert interleave([1, 0, 1]).tolist() == [0, 1]
    mixed = interleave([700, 300])
    assert (np.bincount(mixed[:100] >= 700) == [70, 30]).all()


def test_without_weights_a_mixture_takes_every_pair(mix: Callable[..., data.Data]) -> None:
    loaded = mix()
    assert Counter(loaded.train["source"]) == {"math": 36, "chat": 16}
    assert Counter(loaded.held_out["source"]) == {"math": 4, "chat": 4}
    for name, num in (("math", 36), ("chat", 16)):
        assert loaded.report["train"]["sources"][name]["num_kept"] == num
    assert loaded.report["train"]["num_kept"] == 52
    assert loaded.train.to_list() == mix().train.to_list()


@pytest.mark.parametrize(
    ("overrides", "math", "chat"),
    [
        # A quarter for maths: of the 16 chat pairs all, and a third of that
        ((f"{MATH}.weight=1", f"{CHAT}.weight=3"), 5, 16),
        ((f"{MATH}.weight=1", f"{CHAT}.weight=3", "dataset.num_train=10"), 2, 8),  # 2.5, 7.5
        ((f"{MATH}.weight=1", f"{CHAT}.weight=1", f"{CHAT}.max_repeats=2"), 32, 32),
        ((f"{MATH}.num_train=9",), 9, 16),
        ((f"{CHAT}.num_train=40", f"{CHAT}.max_repeats=3"), 36, 40),
    ],
)
def test_weights_and_counts_say_how_much_each_source_gives(
    mix: Callable[..., data.Data], overrides: tuple[str, ...], math: int, chat: int
) -> None:
    loaded = mix(*overrides)
    assert Counter(loaded.train["source"]) == {"math": math, "chat": chat}
    of_train = loaded.report["train"]["sources"]
    for name, num, most in (("math", math, 36), ("chat", chat, 16)):
        report = of_train[name]
        assert report["num_kept"] + report["num_repeats"] == num
        assert report["num_kept"] + report["num_not_drawn"] == most
    texts = Counter(loaded.train["prompt_text"])
    assert max(texts.values()) == -(-chat // 16)
    if not of_train["chat"]["num_repeats"]:
        assert set(mix(*overrides, "seed=5").train["prompt_text"]) == set(texts)


def test_a_source_that_is_too_small_is_said_and_not_repeated(
    mix: Callable[..., data.Data], caplog: pytest.LogCaptureFixture
) -> None:
    loaded = mix(f"{MATH}.weight=1", f"{CHAT}.weight=3", "dataset.num_train=40")
    assert Counter(loaded.train["source"]) == {"math": 10, "chat": 16}
    assert "chat: it has 16 good pairs, which is 14 too few for the 30" in caplog.text
    assert f"{CHAT}.max_repeats=2 would repeat pairs" in caplog.text


def test_the_log_says_of_which_source_held_out_pairs_are(
    mix: Callable[..., data.Data], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    mix()
    assert {"math held_out: 4 pairs", "chat held_out: 4 pairs"} <= set(caplog.messages)


@pytest.mark.parametrize("policy", ["drop", "keep"])
def test_pairs_made_of_single_completions_repeat_no_other_source(
    mix: Callable[..., data.Data], tmp_path: Path, policy: str
) -> None:
    completions = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in questions("add", 40) + questions("tell", 9)
        for side in ("chosen", "rejected")
    ]
    write(tmp_path / "labelled.jsonl", completions)
    write(tmp_path / "math.jsonl", questions("add", 40) + questions("add", 1))
    loaded = mix(
        f"dataset.sources.thumbs.train_path={tmp_path}/labelled.jsonl",
        "dataset.sources.thumbs.columns=labelled",
        "dataset.sources.thumbs.num_eval=4",
        f"dataset.faults.duplicate={policy}",
    )
    reports = loaded.report["train"]["sources"]
    prompts = Counter(loaded.train["prompt_text"])
    if policy == "keep":
        assert reports["math"]["kept"]["duplicate"]["num"] == 1
        assert reports["thumbs"]["kept"]["duplicate"]["num"] == prompts.total() - len(prompts) - 1
    else:
        assert reports["thumbs"]["dropped"]["duplicate"]["num"] > 0
        assert max(prompts.values()) == 1


@pytest.mark.parametrize("total", [(), ("dataset.num_train=10",)], ids=["largest", "given"])
def test_a_weight_that_gives_no_pair_is_refused(
    mix: Callable[..., data.Data], total: tuple[str, ...]
) -> None:
    with pytest.raises(UserError, match=rf"{MATH}\.weight=0\.001 gives math no pair of the 1\d?"):
        mix(f"{MATH}.weight=0.001", f"{CHAT}.weight=1", *total)


def test_fewer_pairs_of_a_source_are_the_first_of_more(mix: Callable[..., data.Data]) -> None:
    few, more = (
        [
            row["prompt_text"]
            for row in mix(f"{MATH}.weight=1", f"{CHAT}.weight=3", *given).train
            if row["source"] == "math"
        ]
        for given in (["dataset.num_train=8"], [])
    )
    assert len(few) == 2
    assert few == more[:2]


def test_no_source_trains_on_what_another_one_holds_out_or_holds(
    mix: Callable[..., data.Data], tmp_path: Path
) -> None:
    held = questions("Add", 3)
    write(tmp_path / "held.jsonl", [{"q": r["prompt"], "good": "1", "bad": "2"} for r in held])
    loaded = mix(f"{CHAT}.eval_path={tmp_path}/held.jsonl")
    dropped = loaded.report["train"]["sources"]["math"]["dropped"]
    num_held_out = sum(text.endswith(("add 0?", "add 1?", "add 2?")) for text in prompts(loaded))
    assert num_held_out + dropped["leaked_prompt_normalized"]["num"] == 3
    assert not set(prompts(loaded)) & set(loaded.train["prompt_text"])

    write(tmp_path / "zoo.jsonl", [*questions("add", 2), *questions("run", 9)])
    loaded = mix(f"dataset.sources.zoo.train_path={tmp_path}/zoo.jsonl")
    assert loaded.report["train"]["sources"]["zoo"]["dropped"]["duplicate"]["num"] == 2


def prompts(loaded: data.Data) -> list[str]:
    return [row["prompt_text"] for row in loaded.held_out if row["source"] == "math"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((f"{MATH}.weight=1",), f"{CHAT} has no weight, and math has one"),
        (("dataset.num_train=9",), "dataset.num_train=9 is shared out by weights"),
        ((f"{MATH}.path=org/x",), f"give either {MATH}.train_path"),
        ((f"{MATH}.eval_split=test",), f"{MATH}.eval_split and {MATH}.revision belong"),
        ((f"{MATH}.weight=0", f"{CHAT}.weight=1"), f"{MATH}.weight=0"),
        ((f"{MATH}.weight=1e-7", f"{CHAT}.weight=1"), "must be at least 1e-06"),
        ((f"{MATH}.max_repeats=2",), f"{MATH}.max_repeats=2 fills up"),
        ((f"+{MATH}.wieght=2",), f"unknown key: {MATH}.wieght"),
        ((f"{MATH}.transcripts=true",), f"set {MATH}.columns.prompt=null"),
    ],
)
def test_what_cannot_be_mixed_is_said_by_its_key(
    tmp_path: Path, overrides: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UserError) as refusal:
        compose(tmp_path, *overrides)
    assert said in str(refusal.value)


def test_an_error_of_a_source_names_its_keys(
    mix: Callable[..., data.Data],
) -> None:
    with pytest.raises(UserError, match=rf"^chat: .*lacks column 'x'.*{CHAT}.columns.prompt="):
        mix(f"{CHAT}.columns.prompt=x", "dataset.faults.missing_column=refuse")


def test_a_source_has_its_own_kind_of_rows(mix: Callable[..., data.Data], tmp_path: Path) -> None:
    rows = [
        {"question": f"which {n}?", "a": "yes", "b": "no", "winner": "ab"[n % 2]} for n in range(9)
    ]
    write(tmp_path / "arena.jsonl", rows)
    zoo = "dataset.sources.zoo"
    loaded = mix(
        *(f"{zoo}.train_path={tmp_path}/arena.jsonl", f"{zoo}.columns=arena"),
        *(f"{zoo}.columns.prompt=question", f"{zoo}.columns.first=a", f"{zoo}.columns.second=b"),
        *(f"{zoo}.columns.first_wins=[a]", f"{zoo}.columns.second_wins=[b]", f"{zoo}.num_eval=1"),
    )
    assert Counter(loaded.train["source"])["zoo"] == 8


def test_what_identifies_a_mixture_is_its_content_and_its_shares(tmp_path: Path) -> None:
    weights = (f"{MATH}.weight=1", f"{CHAT}.weight=3")
    for name in ("math", "chat", "copy"):
        write(tmp_path / f"{name}.jsonl", questions(name.replace("copy", "math"), 9))
    same = identity.identity(compose(tmp_path, *weights))
    assert same == identity.identity(compose(tmp_path, *reversed(weights)))
    moved = f"{MATH}.train_path={tmp_path}/copy.jsonl"
    assert same == identity.identity(compose(tmp_path, *weights, moved))
    assert same != identity.identity(compose(tmp_path, *weights, f"{MATH}.weight=2"))
    write(tmp_path / "math.jsonl", questions("math", 8))
    assert same != identity.identity(compose(tmp_path, *weights))


@pytest.mark.slow
def test_a_killed_mixture_goes_on_as_the_same_run_and_reports_each_source(
    launch: Launch, tmp_path: Path
) -> None:
    for name, size in (("math", 40), ("chat", 30)):
        write(tmp_path / f"{name}.jsonl", questions(name, size))
    common = [
        "tracker=none",
        "optimizer=lora",
        "dataset=mixture",
        f"{MATH}.train_path={tmp_path}/math.jsonl",
        f"{CHAT}.train_path={tmp_path}/chat.jsonl",
        f"{MATH}.weight=2",
        f"{CHAT}.weight=1",
        "dataset.num_eval=4",
        "dataset.num_generations=3",
        "dataset.max_new_tokens=4",
        "dataset.max_length=128",
        "train.batch_size=8",
        "train.max_steps=6",
        "train.save_steps=2",
        "train.logging_steps=1",
    ]
    launch(*common, "hydra.run.dir=whole")
    signal_after(3, [signal.SIGKILL], tmp_path / "half", *common)
    # The sources may be named in any order, and their files may have moved
    (tmp_path / "math.jsonl").rename(tmp_path / "moved.jsonl")
    moved = f"{MATH}.train_path={tmp_path}/moved.jsonl"
    done = launch(*common[:3], *reversed(common[3:]), moved, "resume=half")
    assert "resuming from step" in done.stdout
    assert_same(tmp_path / "whole", tmp_path / "half")

    summary = json.loads((tmp_path / "half" / "summary.json").read_text())
    for when in ("before", "after"):
        of_sources = summary[when]["by_source"]
        assert [of_sources[name]["num_pairs"] for name in ("chat", "math")] == [4, 4]
        for key in ("preference_accuracy", "logp_margin"):
            mean = np.mean([figures[key] for figures in of_sources.values()])
            assert summary[when][key] == pytest.approx(mean, abs=1e-5)
    # The three answers are to prompts of both sources
    assert {name: of_sources[name]["num_generations"] for name in of_sources} == {
        "chat": 2,
        "math": 1,
    }
    runs = find_runs([tmp_path / "whole"])
    rows = page.source_rows(evidence.compare(runs, {metric.name: 0.1 for metric in HELD_OUT}))
    assert [(row["setting"], row["source"]) for row in rows] == [
        ("untrained", "chat"),
        ("untrained", "math"),
        ("all runs", "chat"),
        ("all runs", "math"),
    ]
