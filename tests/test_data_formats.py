"""Every form rows come in: file kinds, transcripts, trees, real data."""

import copy
import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orpo_lab import config, data
from orpo_lab.config.dataset import OasstDataset
from orpo_lab.data.faults import Fault
from orpo_lab.data.files import ROWS_PER_BATCH
from orpo_lab.data.pairs import Pair
from orpo_lab.data.trees import Trees
from tests.conftest import ROOT

Load = Callable[..., config.Config]

PLAIN: list[dict[str, Any]] = [
    {"prompt": f"add {a} and 2.", "chosen": str(a + 2), "rejected": str(a + 3)} for a in range(12)
]
MESSAGES: list[dict[str, Any]] = [
    {
        "prompt": [
            {"role": "system", "content": "be brief."},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "hi."},
            {"role": "user", "content": row["prompt"]},
        ],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }
    for row in PLAIN
]
# The fourth row has an empty answer; per kind, the number that a person finds it by
FAULTY = [*PLAIN[:3], {**PLAIN[3], "chosen": ""}, *PLAIN[4:]]
FOUND_AT = {".jsonl": 4, ".json": 3, ".csv": 5, ".parquet": 3}


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as the file's suffix says."""
    kind = file.name.removesuffix(".gz").rsplit(".", 1)[1]
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(file)
        return file
    if kind == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        text = out.getvalue()
    elif kind == "json":
        text = json.dumps(rows, indent=1)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return file


@pytest.fixture
def read(load: Load, tokenizer: Any) -> Callable[..., data.Data]:
    """Load a file of pairs."""
    return lambda file, *overrides: data.load(
        load(
            *("dataset=file", f"dataset.train_path={file}", "dataset.num_eval=2", *overrides)
        ).dataset,
        tokenizer,
    )


def adds_up(report: dict[str, Any]) -> bool:
    dropped = sum(entry["num"] for entry in report["dropped"].values())
    return bool(report["num_rows"] == report["num_kept"] + dropped)


KINDS = [".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet"]


def test_every_kind_of_file_holds_the_same_pairs(
    read: Callable[..., data.Data], tmp_path: Path
) -> None:
    for rows, kinds in ((PLAIN, KINDS), (MESSAGES, [kind for kind in KINDS if "csv" not in kind])):
        loaded = [read(write(tmp_path / f"rows{kind}", rows)) for kind in kinds]
        assert len(loaded[0].train) == 10
        for pairs in loaded:
            for split in ("train", "held_out"):
                expected = loaded[0].report[split]["fingerprint"]
                assert pairs.report[split]["fingerprint"] == expected


@pytest.mark.parametrize("kind", [".jsonl.gz", ".json", ".csv", ".parquet"])
def test_a_faulty_row_has_the_number_a_person_finds_it_by(
    read: Callable[..., data.Data], tmp_path: Path, kind: str
) -> None:
    report = read(write(tmp_path / f"rows{kind}", FAULTY)).report["train"]
    assert report["dropped"]["empty_completion"]["rows"] == [FOUND_AT[kind.removesuffix(".gz")]]
    is_by_line = FOUND_AT[kind.removesuffix(".gz")] > 3
    assert report["numbered"] == ("lines from 1" if is_by_line else "rows from 0")


def test_a_row_of_a_table_is_counted_from_the_files_beginning(
    read: Callable[..., data.Data], tmp_path: Path
) -> None:
    good = {"prompt": "Say ", "chosen": "yes", "rejected": "no"}
    rows = [{**good, "prompt": f"Say {number}: "} for number in range(ROWS_PER_BATCH + 10)]
    rows[ROWS_PER_BATCH + 3]["chosen"] = ""
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    report = read(tmp_path / "rows.parquet").report["train"]
    assert report["dropped"]["empty_completion"]["rows"] == [ROWS_PER_BATCH + 3]


def test_a_csv_row_over_several_lines_is_found_at_its_first(
    read: Callable[..., data.Data], tmp_path: Path
) -> None:
    rows = [{**PLAIN[0], "prompt": "one\r\ntwo\nthree"}, *FAULTY[1:]]
    file = write(tmp_path / "rows.csv", rows)
    loaded = read(file, "dataset.num_eval=1", "dataset.as_messages=false")
    assert loaded.report["train"]["dropped"]["empty_completion"]["rows"] == [7]
    texts = [*loaded.train["prompt_text"], *loaded.held_out["prompt_text"]]
    assert "one\r\ntwo\nthree" in texts


def test_lines_end_where_editors_end_them(read: Callable[..., data.Data], tmp_path: Path) -> None:
    # A byte-order mark, Windows' line ends, blank lines, and what only Unicode calls a line's end
    file = tmp_path / "rows.jsonl"
    rows = [{**PLAIN[0], "prompt": "a\u2028b\u0085c"}, *FAULTY[1:]]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_bytes(("\ufeff" + "\r\n\r\n".join(lines)).encode())
    loaded = read(file, "dataset.num_eval=1", "dataset.as_messages=false")
    assert loaded.report["train"]["dropped"]["empty_completion"]["rows"] == [7]
    texts = [*loaded.train["prompt_text"], *loaded.held_out["prompt_text"]]
    assert "a\u2028b\u0085c" in texts


def called(**arguments: Any) -> list[dict[str, Any]]:
    function = {"name": "lookup", "arguments": arguments}
    return [{"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}]


PLACE = {"type": "object", "properties": {"place": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "lookup", "parameters": PLACE}}
CALLS: list[dict[str, Any]] = [
    {
        "prompt": [{"role": "user", "content": f"weather in {number}?"}],
        "chosen": called(place=f"town {number}") if number else called(place="x", unit="C"),
        "rejected": called(place="elsewhere"),
        "tools": [TOOL] if number % 2 else json.dumps([TOOL]),
    }
    for number in range(6)
]


@pytest.mark.parametrize("kind", [".jsonl", ".parquet", "hub"])
def test_tool_calls_and_tools_reach_the_template_from_every_kind_of_source(
    load: Load, tokenizer: Any, tmp_path: Path, kind: str
) -> None:
    # A table fills in what only some messages and calls have, and has one type a column
    rows = CALLS if kind == ".jsonl" else [{**row, "tools": json.dumps([TOOL])} for row in CALLS]
    file = write(tmp_path / f"train{kind if kind != 'hub' else '.parquet'}", rows)
    source = ("dataset=hub", f"dataset.path={tmp_path}")
    if kind != "hub":
        source = ("dataset=file", f"dataset.train_path={file}")
    asked = copy.copy(tokenizer)
    asked.chat_template = (ROOT / "tests" / "templates" / "tool_calls.jinja").read_text()
    overrides = ("dataset.num_eval=1", "dataset.max_length=900", "dataset.max_prompt_length=600")
    loaded = data.load(load(*source, *overrides).dataset, asked)
    texts = [*loaded.train["chosen_text"], *loaded.held_out["chosen_text"]]
    calls = [row["chosen"][0]["tool_calls"][0]["function"] for row in CALLS]
    expected = [f"<tool_call>\n{json.dumps(call)}\n</tool_call><|im_end|>\n" for call in calls]
    assert sorted(texts) == sorted(expected)
    assert all(json.dumps(TOOL) in text for text in loaded.train["prompt_text"])
    assert not loaded.report["train"]["dropped"]
    assert loaded.report["train"]["unread_columns"] == []


def test_rows_that_differ_in_a_call_or_in_their_tools_only_are_no_repeats(
    load: Load, tokenizer: Any, tmp_path: Path
) -> None:
    row, other = CALLS[2], {**CALLS[2], "chosen": called(place="third")}
    third = {**CALLS[2], "tools": [TOOL, TOOL]}
    rows = [row, other, third, row, CALLS[3]]
    asked = copy.copy(tokenizer)
    asked.chat_template = (ROOT / "tests" / "templates" / "tool_calls.jinja").read_text()
    file = write(tmp_path / "rows.jsonl", rows)
    overrides = ("dataset.num_eval=1", "dataset.max_length=900", "dataset.max_prompt_length=600")
    report = data.load(
        load("dataset=file", f"dataset.train_path={file}", *overrides).dataset, asked
    ).report
    assert report["train"]["dropped"]["duplicate"]["rows"] == [4]
    assert list(report["train"]["dropped"]) == ["duplicate"]


@pytest.mark.parametrize("tools", [5, "[", [5], {"name": "x"}, ["{"]])
def test_tools_that_are_no_list_of_objects_are_a_fault(
    read: Callable[..., data.Data], tmp_path: Path, tools: Any
) -> None:
    rows = [{**MESSAGES[0], "tools": tools}, *MESSAGES[1:]]
    file = write(tmp_path / "rows.jsonl", rows)
    report = read(file, "dataset.faults.wrong_type=drop").report["train"]
    assert report["dropped"]["wrong_type"]["rows"] == [1]
    assert "tools is no list of objects" in report["dropped"]["wrong_type"]["example"]


def test_a_value_nested_without_end_is_a_fault(
    read: Callable[..., data.Data], tmp_path: Path
) -> None:
    deep: Any = "x"
    for _ in range(200):
        deep = [deep]
    message = {**MESSAGES[0]["chosen"][0], "tool_calls": deep}
    file = write(tmp_path / "rows.jsonl", [{**MESSAGES[0], "chosen": [message]}, *MESSAGES[1:]])
    report = read(file, "dataset.faults.wrong_type=drop").report["train"]
    assert report["dropped"]["wrong_type"]["rows"] == [1]


def test_forms_may_be_mixed_in_one_file(read: Callable[..., data.Data], tmp_path: Path) -> None:
    loaded = read(write(tmp_path / "rows.jsonl", [*PLAIN[:6], *MESSAGES[6:]]))
    assert len(loaded.train) == 10


def test_a_file_of_the_hub_is_read_from_its_cache(
    read: Callable[..., data.Data], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "datasets--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    folder = repository / "snapshots" / ("0" * 40) / "data"
    folder.mkdir(parents=True)
    write(folder / "rows.jsonl.gz", PLAIN)
    assert len(read("hf://datasets/org/name/data/rows.jsonl.gz").train) == 10


ASKED = "\n\nHuman: what is 2 plus 2?"
TALK = f"{ASKED}\n\nAssistant: let me see.\n\nHuman: well?"


def test_transcripts_become_messages_up_to_the_last_answer(
    load: Load, tokenizer: Any, tmp_path: Path
) -> None:
    # Laid out as Anthropic's repository is: folders of gzipped JSON lines named by split
    rows = [
        {
            "chosen": f"{TALK} {a}\n\nAssistant: it is 4.",
            "rejected": f"{TALK} {a}\n\nAssistant: no.",
        }
        for a in range(6)
    ]
    # Copies of the data lack the empty line before the first turn
    rows[0] = {key: text.lstrip() for key, text in rows[0].items()}
    for part, some in (("helpful-base", rows[:3]), ("harmless-base", rows[3:])):
        (tmp_path / "hh" / part).mkdir(parents=True)
        write(tmp_path / "hh" / part / "train.jsonl.gz", some)
        held_out = {key: text.replace("2 plus 2", part) for key, text in some[0].items()}
        write(tmp_path / "hh" / part / "test.jsonl.gz", [held_out])
    loaded = data.load(load("dataset=hh_rlhf", f"dataset.path={tmp_path}/hh").dataset, tokenizer)
    assert (len(loaded.train), len(loaded.held_out)) == (6, 2)
    said = [
        {"role": "user", "content": "what is 2 plus 2?"},
        {"role": "assistant", "content": "let me see."},
        {"role": "user", "content": "well? 0"},
    ]
    prompt = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    row = next(row for row in loaded.train if row["prompt_text"] == prompt)
    assert tokenizer.decode(row["chosen_ids"], skip_special_tokens=True) == "it is 4."
    assert tokenizer.decode(row["rejected_ids"], skip_special_tokens=True) == "no."


def reply(text: str, rank: int | None, *replies: dict[str, Any], **about: Any) -> dict[str, Any]:
    return {
        "text": text,
        "role": "assistant",
        "lang": "en",
        "review_result": True,
        "deleted": False,
        "rank": rank,
        "replies": list(replies),
        **about,
    }


def ask(text: str, *replies: dict[str, Any], **about: Any) -> dict[str, Any]:
    return {**reply(text, None, *replies), "role": "prompter", **about}


TREE = {
    "message_tree_id": "1",
    "prompt": ask(
        "why?",
        reply("worst", 3),
        reply("best", 0, ask("and?", reply("deep best", 0), reply("deep worst", 1))),
        reply("middle", 1),
        reply("tied", 1),
        reply("gone", 2, ask("hm?", reply("a", 0), reply("b", 1)), deleted=True),
        reply("unseen", 4, review_result=None),
        reply("spam", 5, review_result=False),
        reply("warum", 6, lang="de"),
        reply("alone", None),
    ),
}
LEFT_OUT = {
    "deleted": 1,
    "unreviewed": 1,
    "failed_review": 1,
    "other_language": 1,
    "unranked": 1,
    "below_left_out": 2,
}


def asked(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def pair(prompt: tuple[str, ...], chosen: str, rejected: str) -> Pair:
    better, worse = ([{"role": "assistant", "content": side}] for side in (chosen, rejected))
    return Pair(asked(*prompt), better, worse)


DEEP = pair(("why?", "best", "and?"), "deep best", "deep worst")


@pytest.mark.parametrize(
    ("overrides", "expected", "left_out"),
    [
        ([], [(("why?",), "best", "worst"), DEEP], {"not_compared": 2}),
        (
            ["dataset.pairing=adjacent"],
            [(("why?",), "best", "middle"), (("why?",), "tied", "worst"), DEEP],
            {},
        ),
        (
            ["dataset.pairing=all"],
            [
                *((("why?",), "best", other) for other in ("middle", "tied", "worst")),
                *((("why?",), other, "worst") for other in ("middle", "tied")),
                DEEP,
            ],
            {},
        ),
        (
            ["dataset.max_depth=1"],
            [(("why?",), "best", "worst")],
            {"not_compared": 2, "too_deep": 2},
        ),
        (
            ["dataset.languages=null"],
            [(("why?",), "best", "warum"), DEEP],
            {"not_compared": 3, "other_language": 0},
        ),
    ],
    ids=["best_worst", "adjacent", "all", "max_depth", "languages"],
)
def test_ranked_replies_become_pairs_and_the_others_are_counted(
    load: Load, overrides: list[str], expected: list[Any], left_out: dict[str, int]
) -> None:
    settings = load("dataset=oasst", *overrides).dataset
    assert isinstance(settings, OasstDataset)
    trees = Trees(settings)
    pairs = trees.pairs(TREE, 7)
    assert pairs == [item if isinstance(item, Pair) else pair(*item) for item in expected]
    report = trees.report()
    counts = {reason: entry["num"] for reason, entry in report["left_out"].items()}
    assert counts == {reason: num for reason, num in (LEFT_OUT | left_out).items() if num}
    assert all(entry["rows"] == [7] for entry in report["left_out"].values())
    assert report["num_replies"] == 13
    assert report["num_paired"] == 13 - sum(counts.values())


@pytest.mark.parametrize(
    ("tree", "fault"),
    [
        (5, "wrong_type"),
        ({"message_tree_id": "1"}, "wrong_type"),
        ({"prompt": {**ask("why?"), "text": None}}, "wrong_type"),
        ({"prompt": ask("why?", reply("best", 0), {"text": "no role"})}, "wrong_type"),
        ({"prompt": ask("why?", reply("best", True))}, "wrong_type"),
        ({"prompt": ask("why?", ask("why?"))}, "turns_not_alternating"),
        ({"prompt": reply("best", 0)}, "turns_not_alternating"),
    ],
)
def test_what_is_no_tree_is_a_fault_and_none_of_it_is_counted(
    load: Load, tree: Any, fault: str
) -> None:
    settings = load("dataset=oasst").dataset
    assert isinstance(settings, OasstDataset)
    trees = Trees(settings)
    with pytest.raises(Fault) as raised:
        trees.pairs(tree, 1)
    assert raised.value.name == fault
    assert trees.report() == {"num_replies": 0, "num_paired": 0, "left_out": {}}


@pytest.mark.parametrize(
    ("train", "held_out", "num_rows"),
    [
        ("chat_pairs/train_prefs", "chat_pairs/test_prefs", 89 + 23),
        ("math_pairs/train", "math_pairs/test", 581 + 150),
        ("chat_pairs/multiturn", None, 183),
    ],
)
def test_real_rows_load_and_the_report_adds_up(
    load: Load, tokenizer: Any, assets: Path, train: str, held_out: str | None, num_rows: int
) -> None:
    overrides = [f"dataset.train_path={assets}/data/{train}.jsonl", "dataset.num_eval=150"]
    if held_out:
        overrides.append(f"dataset.eval_path={assets}/data/{held_out}.jsonl")
    else:
        overrides[1] = "dataset.num_eval=20"
    lengths = ("dataset.max_length=4096", "dataset.max_prompt_length=2048")
    settings = load("dataset=jsonl", *overrides, *lengths, "dataset.overlong=cut_prompt").dataset
    report = data.load(settings, tokenizer).report
    assert all(map(adds_up, report.values()))
    assert sum(split["num_rows"] + split["num_not_drawn"] for split in report.values()) == num_rows
    assert sum(split["num_kept"] for split in report.values()) >= 0.95 * num_rows


@pytest.mark.parametrize(
    "pairing",
    ["best_worst", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adjacent", "all"))],
)
def test_real_trees_load_and_the_report_adds_up(
    load: Load, tokenizer: Any, assets: Path, tmp_path: Path, pairing: str
) -> None:
    trees = (assets / "data" / "oasst_trees.jsonl").read_bytes()
    (tmp_path / "trees.jsonl.gz").write_bytes(gzip.compress(trees))
    settings = load(
        "dataset=oasst",
        f"dataset.train_path={tmp_path}/trees.jsonl.gz",
        f"dataset.pairing={pairing}",
        "dataset.num_eval=20",
        "dataset.max_length=4096",
        "dataset.max_prompt_length=2048",
    ).dataset
    loaded = data.load(settings, tokenizer)
    assert all(map(adds_up, loaded.report.values()))
    replies = loaded.report["train"]["replies"]
    # As many as lines of the file say `"role": "assistant"`
    assert replies["num_replies"] == trees.count(b'"role": "assistant"') == 687
    left_out = sum(entry["num"] for entry in replies["left_out"].values())
    assert replies["num_paired"] == 687 - left_out
    num_pairs = sum(split["num_rows"] + split["num_not_drawn"] for split in loaded.report.values())
    if pairing == "best_worst":
        assert 2 * num_pairs == replies["num_paired"]
    assert len(loaded.train) > 100
    # No prompt goes on from one of the other side, whose answers it would quote
    sides = [list(split["prompt_text"]) for split in (loaded.train, loaded.held_out)]
    for prompts, others in (sides, sides[::-1]):
        assert not [text for text in prompts if text.startswith(tuple(others))]
