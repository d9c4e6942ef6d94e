"""What the model is trained on of a row in every form: `python benchmarks/forms.py MODEL [ASSETS]`.

MODEL is a folder with a tokenizer, such as SmolLM2's. Prints of one row in each form and each kind
of file that docs/data.md names: the end of the prompt, and of each answer the text that the loss
covers, in double brackets. Every row goes the whole way of a run's data: from a file through
`orpo_lab.data.load` to token ids, and from these back to text. ASSETS is a folder with real pairs;
with it real rows follow, as they are and written in other forms. The last line is one JSON object.
"""

import argparse
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets

from orpo_lab import compose, data
from orpo_lab.model.source import load_config
from orpo_lab.model.tokenizer import load_tokenizer
from orpo_lab.preview.rows import Part, Reader
from orpo_lab.upstream import silence
from tests import test_forms as forms

Row = dict[str, Any]
Case = tuple[tuple[str, ...], list[Row]]

# How much of the prompt's end, and of a supervised text, is printed
SHOWN = 90
LENGTHS = ("dataset.max_length=2048", "dataset.max_prompt_length=1536")
CALLS: Row = {
    "prompt": [forms.user(forms.ASKED)],
    "chosen": [
        {
            "role": "assistant",
            "content": "I add.",
            "tool_calls": [{"type": "function", "function": forms.CALL}],
        },
        {"role": "tool", "content": "4"},
        forms.assistant(forms.GOOD),
    ],
    "rejected": [forms.assistant(forms.BAD)],
    "tools": [{"name": "add", "parameters": {}}],
}
THOUGHT: Row = {
    "prompt": [forms.user(forms.ASKED)],
    "chosen": [{**forms.assistant(forms.GOOD), "reasoning_content": "2 and 2 are 4."}],
    "rejected": [{**forms.assistant(forms.BAD), "reasoning_content": "2 and 2 are 5."}],
}
GOOD: Row = {"prompt": forms.ASKED, "completion": forms.GOOD, "label": True}
BAD: Row = {"prompt": forms.ASKED, "completion": forms.BAD, "label": False}
HUMAN = f"\n\nHuman: {forms.ASKED}\n\nAssistant: "
TRANSCRIPT = {"chosen": HUMAN + forms.GOOD, "rejected": HUMAN + forms.BAD}
TEMPLATES = Path(__file__).parents[1] / "tests" / "templates"


def others(row: Row) -> list[Row]:
    """Return the row and the same row of another question, which is held out."""
    return [row, json.loads(json.dumps(row).replace("2?", "3?"))]


def written_forms() -> dict[str, Case]:
    """Return rows of the published forms, with the overrides that read such rows."""
    found = {name: (overrides, others(row)) for name, (overrides, row, _) in forms.FORMS.items()}
    calls = f"model.chat_template={TEMPLATES / 'tool_calls.jinja'}"
    thinks = f"model.chat_template={TEMPLATES / 'qwen3.jinja'}"
    return found | {
        "tool calls": (("dataset=file", calls), others(CALLS)),
        "tool calls, the assistant's turns": (
            ("dataset=file", calls, "dataset.supervised=assistant"),
            others(CALLS),
        ),
        "tool calls, the last turn": (
            ("dataset=file", calls, "dataset.supervised=last"),
            others(CALLS),
        ),
        "reasoning": (("dataset=file", thinks), others(THOUGHT)),
        "template_kwargs": (
            ("dataset=file", thinks, "+dataset.template_kwargs.enable_thinking=false"),
            others(forms.PAIR),
        ),
        "strings as they are": (("dataset=file", "dataset.as_messages=false"), others(forms.PAIR)),
        "transcripts": (
            ("dataset=file", "dataset.transcripts=true", "dataset.columns.prompt=null"),
            others(TRANSCRIPT),
        ),
        "single completions": (
            ("dataset=unpaired", "method=kto"),
            [*others(GOOD), *others(BAD)],
        ),
    }


def real(assets: Path) -> dict[str, Case]:
    """Return rows of the assets, as they are and in other forms."""
    folder = assets / "data"

    def rows(name: str) -> list[Row]:
        return [json.loads(line) for line in (folder / name).open()][:8]

    chat, math = rows("chat_pairs/train_prefs.jsonl"), rows("math_pairs/train.jsonl")
    return {
        "real: strings": (("dataset=file",), math),
        "real: strings as alpaca": (("dataset=alpaca",), [*map(forms.alpaca, math)]),
        "real: strings as UltraFeedback": (("dataset=scored",), [*map(forms.scored, math)]),
        "real: messages": (("dataset=file",), chat),
        "real: messages as ShareGPT": (("dataset=sharegpt",), [*map(forms.sharegpt, chat)]),
        "real: messages as Arena": (("dataset=arena",), [*map(forms.battle, chat)]),
        "real: several turns": (("dataset=file",), rows("chat_pairs/multiturn.jsonl")),
        "real: trees": (("dataset=oasst",), rows("oasst_trees.jsonl")),
    }


def files(folder: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Write the same rows in every kind of source; yield the overrides that read each source."""
    rows = others(forms.PAIR)
    table = datasets.Dataset.from_list(rows)
    folder.mkdir()
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "data.json").write_text(json.dumps({"data": rows}))
    table.to_csv(folder / "rows.csv")
    table.to_csv(folder / "rows.tsv", sep="\t")
    table.to_parquet(folder / "rows.parquet")
    table.save_to_disk(folder / "saved")
    (arrow,) = (folder / "saved").glob("*.arrow")
    for number, row in enumerate(rows):
        (folder / f"part-{number}.jsonl").write_text(json.dumps(row) + "\n")
    names = ("rows.json", "data.json", "rows.csv", "rows.tsv", "rows.parquet", "saved")
    for name in (*names, f"saved/{arrow.name}", "part-*.jsonl"):
        yield name.removeprefix("saved/"), ("dataset=file", f"dataset.train_path={folder / name}")
    parts = ",".join(str(folder / f"part-{number}.jsonl") for number in range(len(rows)))
    yield "a list of files", ("dataset=file", f"dataset.train_path=[{parts}]")
    talks = others({**forms.TALK, "system": "Be brief."})
    (folder / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    yield (
        "a mixture of two forms",
        (
            "dataset=mixture",
            f"dataset.sources.pairs.train_path={folder / 'rows.json'}",
            f"dataset.sources.talks.train_path={folder / 'talks.jsonl'}",
            "dataset.sources.talks.columns=sharegpt",
        ),
    )


def read(model: Path, overrides: Sequence[str]) -> list[Part]:
    """Return the parts of the first training row."""
    chosen = compose(
        *("model=local", f"model.path={model}", "dataset.num_eval=1", "train.batch_size=1"),
        *(*LENGTHS, *overrides),
    ).config
    tokenizer = load_tokenizer(chosen.model, load_config(chosen.model))
    found = data.load(chosen.dataset, tokenizer).train
    reader = Reader(tokenizer, scores_prompt=False, reads_rejected=True)
    return reader.read(found[0])


def line(parts: Sequence[Part]) -> str:
    """Return the prompt's end, and each answer with its supervised text in double brackets."""
    prompt, *answers = parts
    asked = "".join(piece.text for piece in prompt.pieces)
    return f"...{asked[-SHOWN:]!r} -> {' against '.join(map(_marked, answers))}"


def _marked(answer: Part) -> str:
    text = ""
    for is_supervised, pieces in groupby(answer.pieces, lambda piece: piece.is_supervised):
        said = "".join(piece.text for piece in pieces)
        said = said if len(said) <= SHOWN else f"{said[: SHOWN // 2]} ... {said[-SHOWN // 2 :]}"
        text += f"[[{said!r}]]" if is_supervised else repr(said)
    return text


def main() -> None:
    """Print the row of every form."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("model", type=Path)
    parser.add_argument("assets", type=Path, nargs="?")
    args = parser.parse_args()
    silence()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as temporary:
        cases: list[tuple[str, tuple[str, ...]]] = []
        written = written_forms() | (real(args.assets) if args.assets else {})
        for number, (name, (overrides, rows)) in enumerate(written.items()):
            folder = Path(temporary, str(number))
            folder.mkdir()
            file = folder / "train.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            is_of_hub = "dataset=nectar" in overrides
            source = f"dataset.path={folder}" if is_of_hub else f"dataset.train_path={file}"
            cases.append((name, (*overrides, source)))
        cases += files(Path(temporary) / "files")
        for name, overrides in cases:
            print(f"{name:36} {line(read(args.model, overrides))}", flush=True)
    print(json.dumps({"forms": len(cases)}))


if __name__ == "__main__":
    main()
