"""Chat templates that do not say what a row says.

Each run is on a copy of the embedded model with another template (`tests/templates`). A row that it
cannot render is dropped: the run is to come to the weights of the same file without that row. Where
a prompt only moves, the run is to come to the weights of the same texts, rendered by hand.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults.bench import Bench, Injection
from faults.families.data import GOOD, HELD_OUT, ONE, settings, write
from faults.judge import Outcome, refused, silent, survived

ROOT = Path(__file__).parents[2]
Row = dict[str, Any]


def said(row: Row, **others: Any) -> Row:
    """Return a row of texts as messages; others are more keys of the chosen answer's."""
    answers = {key: [{"role": "assistant", "content": row[key]}] for key in ("chosen", "rejected")}
    answers["chosen"][0].update(others)
    return {"prompt": [{"role": "user", "content": row["prompt"]}], **answers}


def begun(row: Row, *before: Row) -> Row:
    """Return a row of messages with others before its own prompt."""
    return {**row, "prompt": [*before, *row["prompt"]]}


def ended(row: Row, *after: Row) -> Row:
    """Return a row of messages with others behind its own prompt."""
    return {**row, "prompt": [*row["prompt"], *after]}


TALK = said(ONE)
SYSTEM = {"role": "system", "content": "be very brief"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"left": 60}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds"}}
THOUGHT = said({**ONE, "chosen": "<think>add</think>62", "rejected": "<think>add</think>63"})

# The template, None for the model's own; the row; and what the report calls it
DROPPED: dict[str, tuple[str | None, Row, str]] = {
    "a system message that is left out": (
        "mistral_drops_system",
        begun(TALK, SYSTEM),
        "unrendered_text",
    ),
    "reasoning that is cut off": ("r1", THOUGHT, "unrendered_text"),
    "reasoning beside the answer": (None, said(ONE, reasoning_content="add"), "unrendered_text"),
    "a tool call": (None, said(ONE, tool_calls=[CALL]), "unrendered_text"),
    "answers that differ in their call only": (
        "gemma",
        said({**ONE, "rejected": ONE["chosen"]}, tool_calls=[CALL]),
        "unrendered_text",
    ),
    "tools": ("mistral", {**TALK, "tools": [TOOL]}, "unrendered_text"),
    "a name": (
        None,
        ended(TALK, {"role": "user", "content": "?", "name": "Ada"}),
        "unrendered_text",
    ),
    "a weight": (None, said(ONE, weight=0), "unrendered_text"),
    "a system message that is refused": (
        "tools_last",
        begun(TALK, {"role": "system"}),
        "wrong_type",
    ),
    "a prefilled answer": (
        None,
        ended(TALK, {"role": "assistant", "content": "it is"}),
        "prefilled_answer",
    ),
    "an answer of two turns behind tools that move": (
        "tools_last",
        {
            **TALK,
            "tools": [TOOL],
            "chosen": [*TALK["chosen"], {"role": "user", "content": "sure?"}, *TALK["chosen"]],
        },
        "misrendered",
    ),
}


def faults(bench: Bench) -> Iterator[Injection]:
    """Return a fault for each kind of template."""
    for name, given in DROPPED.items():
        yield Injection(name, _drops(*given))
    yield Injection("a system message that moves", _moved)
    yield Injection(
        "a generation prompt behind every answer", _refuses("always_asks", "misrendered")
    )


def _with_template(bench: Bench, template: str | None) -> tuple[str, ...]:
    """Put a model with a template beside the runs; return what chooses it."""
    shutil.copytree(ROOT / "orpo_lab" / "tiny", bench.path("model"))
    if template:
        file = ROOT / "tests" / "templates" / f"{template}.jinja"
        shutil.copy(file, bench.path("model/chat_template.jinja"))
    write(bench.path("eval.jsonl"), [said(row) for row in HELD_OUT])
    return (*settings(), "model=local", "model.path=model")


def _drops(template: str | None, row: Row, reason: str) -> Callable[[Bench], Outcome]:
    def happen(bench: Bench) -> Outcome:
        command = (*_with_template(bench, template), "dataset.faults.wrong_type=drop")
        good = [said(pair) for pair in GOOD]
        write(bench.path("train.jsonl"), good)
        reference = bench.unharmed(*command, into="reference")
        write(bench.path("train.jsonl"), [*good[:7], row, *good[7:]])
        done = bench.run(*command, "hydra.run.dir=run")
        outcome = survived(done, bench.path("run"), reference)
        report = json.loads(bench.path("run/data_report.json").read_text())["train"]
        counted = {key: entry["num"] for key, entry in report["dropped"].items()}
        if counted != {reason: 1}:
            return silent(f"counted as {counted} instead of 1 {reason}")
        return outcome

    return happen


def _moved(bench: Bench) -> Outcome:
    """Train on messages, and on the texts that they are to become."""
    # The texts are rendered already
    command = (*_with_template(bench, "mistral"), "dataset.as_messages=false")
    rows = [begun(said(row), SYSTEM) for row in [*GOOD, *HELD_OUT]]
    texts = [
        {
            "prompt": f"[INST] {SYSTEM['content']}\n\n{row['prompt']}[/INST]",
            **{key: f" {row[key]}" for key in ("chosen", "rejected")},
        }
        for row in [*GOOD, *HELD_OUT]
    ]
    for written in (texts, rows):
        write(bench.path("train.jsonl"), written[: len(GOOD)])
        write(bench.path("eval.jsonl"), written[len(GOOD) :])
        if written is texts:
            reference = bench.unharmed(*command, into="reference")
    done = bench.run(*command, "hydra.run.dir=run")
    return survived(done, bench.path("run"), reference)


def _refuses(template: str, says: str) -> Callable[[Bench], Outcome]:
    def happen(bench: Bench) -> Outcome:
        command = _with_template(bench, template)
        write(bench.path("train.jsonl"), [said(row) for row in GOOD])
        return refused(bench.run(*command, "hydra.run.dir=run"), bench.path("run"), says)

    return happen
