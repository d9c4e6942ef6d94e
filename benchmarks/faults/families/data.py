"""Preference data that is not what it should be.

Rows that teach nothing are dropped: the run is to come to the weights of the same file without
them. What is no preference data at all is refused.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.faults.bench import UNTRACKED, Bench, Fault
from benchmarks.faults.judge import Outcome, refused, silent, survived

JSONL = (
    "dataset=jsonl",
    "dataset.train_path=train.jsonl",
    "dataset.eval_path=eval.jsonl",
    "dataset.max_length=96",
    "dataset.max_prompt_length=64",
)
SETTINGS = tuple(one for one in UNTRACKED if not one.startswith("dataset.num_train")) + JSONL

Row = dict[str, Any]


def pairs(first: int, num: int) -> list[Row]:
    """Return good rows, no two with the same prompt."""
    return [
        {"prompt": f"add {i} and 2.", "chosen": f"{i + 2}", "rejected": f"{i + 3}"}
        for i in range(first, first + num)
    ]


GOOD = pairs(10, 16)
ONE = GOOD[0]

# Rows among good ones, and what the report calls them
DROPPED: dict[str, tuple[list[Row], str]] = {
    "empty chosen": ([{**ONE, "chosen": ""}], "empty_completion"),
    "empty rejected": ([{**ONE, "rejected": ""}], "empty_completion"),
    "blank chosen": ([{**ONE, "chosen": " \n\t "}], "empty_completion"),
    "chosen equals rejected": ([{**ONE, "rejected": ONE["chosen"]}], "chosen_equals_rejected"),
    "empty prompt": ([{**ONE, "prompt": ""}], "empty_prompt"),
    "prompt too long": ([{**ONE, "prompt": "count " * 300}], "prompt_too_long"),
    "answer too long": ([{**ONE, "chosen": "word " * 300}], "pair_too_long"),
    "a row of 100 MB": ([{**ONE, "chosen": "word " * 20_000_000}], "pair_too_long"),
    "a third of all rows": (
        [{**row, "rejected": row["chosen"]} for row in pairs(50, 8)],
        "chosen_equals_rejected",
    ),
}

# The file's bytes, and what the refusal is to say
AS_LINES = "".join(json.dumps(row) + "\n" for row in GOOD).encode()
REFUSED: dict[str, tuple[bytes | None, str]] = {
    "no file": (None, "train.jsonl cannot be read"),
    "an empty file": (b"", "train.jsonl holds no rows"),
    "blank lines only": (b"\n\n  \n", "train.jsonl holds no rows"),
    "a line cut short": (AS_LINES[:-9], "line 16 is not JSON"),
    "a line of text": (AS_LINES + b"hello\n", "line 17 is not JSON"),
    "one JSON array instead of lines": (json.dumps(GOOD).encode(), "line 1 holds .*not an object"),
    "null": (AS_LINES + b"null\n", "line 17 holds null"),
    "a number": (AS_LINES + b"7\n", "line 17 holds 7"),
    "invalid UTF-8": (AS_LINES.replace(b"add 12", b"add \xff\xfe"), "train.jsonl cannot be read"),
    "UTF-16": (AS_LINES.decode().encode("utf-16"), "train.jsonl cannot be read"),
    "binary": (bytes(range(256)) * 100, "train.jsonl"),
    "a null chosen": (AS_LINES + b'{"prompt": "a", "chosen": null, "rejected": "c"}\n', "null"),
    "a number as chosen": (
        AS_LINES + b'{"prompt": "a", "chosen": 7, "rejected": "c"}\n',
        "line 17: chosen is of type int",
    ),
    "an object as chosen": (
        AS_LINES + b'{"prompt": "a", "chosen": {"text": "b"}, "rejected": "c"}\n',
        "line 17: chosen is of type dict",
    ),
    "messages without a role": (
        b'{"prompt": "a", "chosen": [{"content": "b"}], "rejected": [{"content": "c"}]}\n',
        "without a role and a content",
    ),
    "messages with a null content": (
        b'{"prompt": "a", "chosen": [{"role": "assistant", "content": null}], "rejected": []}\n',
        "without a role and a content",
    ),
    "strings here and messages there": (
        AS_LINES
        + b'{"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"}\n',
        "line 17|row",
    ),
    "no column rejected": (b'{"prompt": "a", "chosen": "b"}\n', "lacks column 'rejected'"),
    "no column prompt": (b'{"question": "a", "chosen": "b", "rejected": "c"}\n', "lacks column"),
    "a later row without rejected": (
        AS_LINES + b'{"prompt": "a", "chosen": "b"}\n',
        "line 17 lacks column 'rejected'",
    ),
    "no row left": (
        b'{"prompt": "a", "chosen": "b", "rejected": "b"}\n' * 5,
        "no train pair is left of 5",
    ),
    "fewer rows than a batch": (AS_LINES.splitlines(keepends=True)[0], "train.batch_size=4"),
}


def faults(bench: Bench) -> Iterator[Fault]:
    """Return a fault for each kind of bad row and bad file."""
    for name, (rows, reason) in DROPPED.items():
        yield Fault(name, _drops(rows, reason))
    for name, (content, says) in REFUSED.items():
        yield Fault(name, _refuses(content, says))


def write(file: Path, rows: list[Row]) -> None:
    """Write JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _drops(rows: list[Row], reason: str) -> Callable[[Bench], Outcome]:
    def happen(bench: Bench) -> Outcome:
        write(bench.path("eval.jsonl"), pairs(90, 4))
        write(bench.path("train.jsonl"), GOOD)
        reference = bench.unharmed(*SETTINGS, into="reference")
        write(bench.path("train.jsonl"), GOOD[:7] + rows + GOOD[7:])
        done = bench.run(*SETTINGS, "hydra.run.dir=run")
        outcome = survived(done, bench.path("run"), reference)
        report = json.loads(bench.path("run/data_report.json").read_text())
        counted = report["train"]["dropped"].get(reason, {}).get("num")
        if counted != len(rows):
            return silent(
                f"data_report.json does not count {len(rows)} {reason}: {report['train']}"
            )
        return outcome

    return happen


def _refuses(content: bytes | None, says: str) -> Callable[[Bench], Outcome]:
    def happen(bench: Bench) -> Outcome:
        write(bench.path("eval.jsonl"), pairs(90, 4))
        if content is not None:
            bench.path("train.jsonl").write_bytes(content)
        return refused(bench.run(*SETTINGS, "hydra.run.dir=run"), bench.path("run"), says)

    return happen
