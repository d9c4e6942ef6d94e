"""Rows that hypothesis thinks up: each is refused, counted or fit to be trained on."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_lab import config, data
from orpo_lab.config.dataset import KEEPABLE_FAULTS, Faults, FileDataset, PairColumns
from orpo_lab.data.rows import normalize
from orpo_lab.errors import UserError

Load = Callable[..., config.Config]

ODD_TEXTS = (
    *("add 1 and 2.", "Add  1 and 2.", "\uff41\uff44\uff44 1 and 2.", "3", "4", "3 "),
    *("", " ", "\u200b", "\0", "x\0y", "\ud800", "a\udfff", "a\u2028b", "\n\n", "\u00e9", "\ufffd"),
    *("<s>", "x</s>", "<|user|>", "<pad>", "word " * 40, "long" * 3000, "[" * 2000),
)
texts = st.sampled_from(ODD_TEXTS) | st.text(max_size=12)
roles = st.sampled_from(["user", "assistant", "assistant", "system", "tool", "human", "", "\0"])
numbers = st.integers() | st.floats() | st.booleans() | st.none()
anything = st.recursive(
    numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
messages = st.lists(
    st.fixed_dictionaries({"role": roles, "content": texts}, optional={"name": anything}),
    max_size=4,
)
turns = st.sampled_from(["add 1 and 2.", "ADD 1 and 2.", *(f"add {a} and 3." for a in range(20))])
answers = st.sampled_from(["3", "4", "it is 3.", "it is 7.", "no", "so, 5", "well, " * 20])


@st.composite
def good_rows(draw: st.DrawFn) -> dict[str, Any]:
    """Rows of every form, most of them without a fault of their own."""
    prompt, chosen, rejected = draw(turns), draw(answers), draw(answers)
    asked = [{"role": "user", "content": prompt}]
    said = [[{"role": "assistant", "content": side}] for side in (chosen, rejected)]
    first = draw(st.sampled_from([[], [{"role": "system", "content": "be brief."}]]))
    return draw(
        st.sampled_from(
            [
                {"prompt": prompt, "chosen": chosen, "rejected": rejected},
                {"prompt": prompt, "chosen": prompt + chosen, "rejected": prompt + rejected},
                {"prompt": first + asked, "chosen": said[0], "rejected": said[1]},
                {"prompt": prompt, "chosen": asked + said[0], "rejected": asked + said[1]},
                {"prompt": asked, "chosen": chosen, "rejected": rejected},
            ]
        )
    )


@st.composite
def spoilt_rows(draw: st.DrawFn) -> dict[str, Any]:
    """Good rows with one value replaced, or taken away."""
    row = draw(good_rows())
    column = draw(st.sampled_from(["prompt", "chosen", "rejected"]))
    row[column] = draw(texts | messages | anything)
    if draw(st.integers(0, 5)) == 0:
        del row[column]
    return row


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    """Lines of a file: half are good, the others spoilt, cut short or no rows at all."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.binary(max_size=20)).replace(b"\n", b"")
    if kind == 1:
        return json.dumps(draw(good_rows()))[:-7].encode()
    if kind == 2:
        return json.dumps(draw(anything)).encode()
    if kind < 5:
        # JSON's own escapes write surrogates that are UTF-8; written out they are none
        text = json.dumps(draw(spoilt_rows()), ensure_ascii=kind == 3)
        return text.encode("utf-8", "surrogatepass")
    return json.dumps(draw(good_rows())).encode()


files = st.lists(lines(), min_size=10, max_size=40)
policies = st.sampled_from(["default", "drop", "drop", "keep", "keep"])


def with_policies(settings: FileDataset, policy: str) -> FileDataset:
    if policy == "default":
        return settings
    names = [field.name for field in fields(Faults)]
    kept = KEEPABLE_FAULTS if policy == "keep" else ()
    chosen = {name: "keep" if name in kept else "drop" for name in names}
    return replace(settings, faults=Faults(**chosen))


def check(loaded: data.Data, settings: FileDataset, policy: str) -> None:
    for name, split in (("train", loaded.train), ("held_out", loaded.held_out)):
        report = loaded.report[name]
        dropped = sum(entry["num"] for entry in report["dropped"].values())
        assert report["num_rows"] == report["num_kept"] + dropped
        assert report["num_kept"] == len(split) > 0
        for row in split:
            ids = prompt, chosen, rejected = (
                row[f"{key}_ids"] for key in ("prompt", "chosen", "rejected")
            )
            assert all(ids)
            assert len(prompt) <= settings.max_prompt_length
            assert len(prompt) + max(len(chosen), len(rejected)) <= settings.max_length
            assert chosen != rejected
    if policy != "keep" or not settings.eval_path:
        train, held_out = (
            {normalize(text) for text in split["prompt_text"]}
            for split in (loaded.train, loaded.held_out)
        )
        assert not train & held_out


def run_examples(load: Load, tokenizer: Any, num_examples: int) -> dict[str, int]:
    """Load generated files; return how many rows there were and what became of them."""
    composed = load("dataset=file", "dataset.train_path=x.jsonl", "tracker=none").dataset
    assert isinstance(composed, FileDataset)
    counts = {"rows": 0, "files": 0, "refused": 0, "kept": 0, "dropped": 0}

    @settings(max_examples=num_examples, deadline=None, derandomize=True, database=None)
    @given(
        train=files,
        held_out=st.none() | files,
        policy=policies,
        overlong=st.sampled_from(["drop", "cut_prompt", "cut_completion"]),
        sizes=st.sampled_from([(64, 32), (24, 16), (12, 11)]),
        prompt=st.sampled_from(["prompt", "prompt", "prompt", None]),
    )
    def load_one(
        train: list[bytes],
        held_out: list[bytes] | None,
        policy: str,
        overlong: str,
        sizes: tuple[int, int],
        prompt: str | None,
    ) -> None:
        with tempfile.TemporaryDirectory() as folder:
            paths = []
            for name, part in (("train", train), ("held_out", held_out or [])):
                paths.append(Path(folder) / f"{name}.jsonl")
                paths[-1].write_bytes(b"\n".join(part))
            chosen = replace(
                with_policies(composed, policy),
                train_path=str(paths[0]),
                eval_path=None if held_out is None else str(paths[1]),
                num_eval=2,
                overlong=overlong,
                max_length=sizes[0],
                max_prompt_length=sizes[1],
                columns=PairColumns(prompt=prompt, chosen="chosen", rejected="rejected"),
            )
            num_rows = sum(bool(line.strip()) for line in [*train, *(held_out or [])])
            counts["files"] += 1
            counts["rows"] += num_rows
            try:
                loaded: data.Data | None = data.load(chosen, tokenizer)
            except UserError as error:
                refusal = str(error)
                loaded = None
        if loaded is None:
            assert "\n" not in refusal
            refusal.encode()
            counts["refused"] += num_rows
            return
        check(loaded, chosen, policy)
        reports = loaded.report.values()
        assert num_rows == sum(report["num_rows"] + report["num_not_drawn"] for report in reports)
        counts["kept"] += sum(report["num_kept"] for report in reports)
        counts["dropped"] += sum(
            entry["num"] for report in reports for entry in report["dropped"].values()
        )

    load_one()
    print(f"of generated rows: {counts}")
    return counts


def test_generated_rows_never_train_on_garbage(load: Load, tokenizer: Any) -> None:
    counts = run_examples(load, tokenizer, num_examples=20)
    assert counts["kept"] > 20
    assert counts["dropped"] > 100


@pytest.mark.slow
@pytest.mark.long
def test_thousands_of_generated_rows_never_train_on_garbage(load: Load, tokenizer: Any) -> None:
    counts = run_examples(load, tokenizer, num_examples=600)
    assert counts["rows"] - counts["refused"] >= 2000
    assert counts["kept"] > 300
