"""Preference data that is not what it should be.

Rows with a fault are dropped by default, or where `dataset.faults.*=drop` says so: the run is to
come to the weights of the same file without them. Other faults of rows, and files that hold no
preference data, are refused.
"""

import gzip
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults.bench import UNTRACKED, Bench, Injection
from faults.judge import Ending, Outcome, refused, silent, state, survived

Row = dict[str, Any]


def settings(name: str = "train.jsonl") -> tuple[str, ...]:
    """Return the command line of a run on a file."""
    others = (override for override in UNTRACKED if not override.startswith("dataset.num_train"))
    return (
        *others,
        "dataset=file",
        f"dataset.train_path={name}",
        "dataset.eval_path=eval.jsonl",
        "dataset.max_length=96",
        "dataset.max_prompt_length=64",
    )


def pairs(first: int, num: int) -> list[Row]:
    """Return good rows, no two with the same prompt."""
    return [
        {"prompt": f"add {i} and 2.", "chosen": f"{i + 2}", "rejected": f"{i + 3}"}
        for i in range(first, first + num)
    ]


def lines(rows: list[Row]) -> bytes:
    """Return rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


GOOD, HELD_OUT = pairs(10, 16), pairs(90, 4)
(ONE,) = pairs(60, 1)
ASKED = {"role": "user", "content": ONE["prompt"]}
SWAPPED = {**ONE, "chosen": ONE["rejected"], "rejected": ONE["chosen"]}

# Bytes among good lines, how many rows that is, what the report calls them, and the policy
DROPPED: dict[str, tuple[bytes, int, str, str]] = {
    "an empty chosen": (lines([{**ONE, "chosen": ""}]), 1, "empty_completion", ""),
    "an empty rejected": (lines([{**ONE, "rejected": ""}]), 1, "empty_completion", ""),
    "a blank chosen": (lines([{**ONE, "chosen": " \n\t "}]), 1, "empty_completion", ""),
    "chosen equals rejected": (
        lines([{**ONE, "rejected": ONE["chosen"]}]),
        1,
        "chosen_equals_rejected",
        "",
    ),
    "chosen equals rejected in a third of the rows": (
        lines([{**row, "rejected": row["chosen"]} for row in pairs(40, 8)]),
        8,
        "chosen_equals_rejected",
        "",
    ),
    "an empty prompt": (lines([{**ONE, "prompt": ""}]), 1, "empty_prompt", ""),
    "a prompt too long": (lines([{**ONE, "prompt": "count " * 300}]), 1, "prompt_too_long", ""),
    "an answer too long": (lines([{**ONE, "chosen": "word " * 99}]), 1, "pair_too_long", ""),
    "a row of 3 MB": (lines([{**ONE, "chosen": "word " * 600_000}]), 1, "oversized_row", ""),
    "a row of 100 MB": (lines([{**ONE, "chosen": "word " * 20_000_000}]), 1, "oversized_row", ""),
    "a NUL": (lines([{**ONE, "chosen": "9\0"}]), 1, "nul_character", ""),
    "half a surrogate pair": (lines([{**ONE, "chosen": "9\ud83d"}]), 1, "lone_surrogate", ""),
    "a control token": (lines([{**ONE, "rejected": "8</s>"}]), 1, "special_token_text", ""),
    "a turn that is faked": (
        lines([{**ONE, "chosen": "62</s><|user|>thanks"}]),
        1,
        "special_token_text",
        "",
    ),
    "a repeated row": (lines(GOOD[:1]), 1, "duplicate", ""),
    "the whole file again": (lines(GOOD), 16, "duplicate", ""),
    "a pair, and the same swapped": (lines([ONE, SWAPPED]), 2, "conflicting_duplicate", ""),
    "a held-out prompt": (
        lines([{**ONE, "prompt": HELD_OUT[0]["prompt"]}]),
        1,
        "leaked_prompt",
        "",
    ),
    "a held-out prompt in other case": (
        lines([{**ONE, "prompt": HELD_OUT[0]["prompt"].upper()}]),
        1,
        "leaked_prompt_normalized",
        "",
    ),
    "a conversation that quotes a held-out answer": (
        lines(
            [
                {
                    "prompt": [
                        {"role": "user", "content": HELD_OUT[0]["prompt"]},
                        {"role": "assistant", "content": HELD_OUT[0]["chosen"]},
                        ASKED,
                    ],
                    "chosen": [{"role": "assistant", "content": "62"}],
                    "rejected": [{"role": "assistant", "content": "63"}],
                }
            ]
        ),
        1,
        "leaked_prompt",
        "",
    ),
    "a role that nobody has": (
        lines(
            [
                {
                    "prompt": [{**ASKED, "role": "prompter"}],
                    "chosen": [{"role": "assistant", "content": "62"}],
                    "rejected": [{"role": "assistant", "content": "63"}],
                }
            ]
        ),
        1,
        "unknown_role",
        "",
    ),
    "a line of text, dropped": (b"hello\n", 1, "invalid_json", "drop"),
    "a line cut short, dropped": (lines([ONE])[:-9] + b"\n", 1, "invalid_json", "drop"),
    "Latin-1, dropped": (
        lines([ONE]).replace(b"add", b"\xe9"),
        1,
        "invalid_utf8",
        "drop",
    ),
    "a row without rejected, dropped": (
        b'{"prompt": "a", "chosen": "b"}\n',
        1,
        "missing_column",
        "drop",
    ),
    "a null and a number as chosen, dropped": (
        lines([{**ONE, "chosen": None}, {**ONE, "chosen": 7}]),
        2,
        "wrong_type",
        "drop",
    ),
}

# The file's name, its bytes, and what the refusal is to say
TEXT = lines(GOOD)
REFUSED: dict[str, tuple[str, bytes | None, str]] = {
    "no file": ("train.jsonl", None, "train.jsonl cannot be read"),
    "an empty file": ("train.jsonl", b"", "train.jsonl holds no rows"),
    "blank lines only": ("train.jsonl", b"\n\n  \n", "train.jsonl holds no rows"),
    "a line cut short": ("train.jsonl", TEXT[:-9], "line 16: is not JSON"),
    "a line of text": ("train.jsonl", TEXT + b"hello\n", "line 17: is not JSON"),
    "one JSON array in .jsonl": ("train.jsonl", json.dumps(GOOD).encode(), "line 1: "),
    "JSON lines in .json": ("train.json", TEXT, "train.json cannot be read"),
    "null": ("train.jsonl", TEXT + b"null\n", "line 17: .*null"),
    "a number": ("train.jsonl", TEXT + b"7\n", "line 17: "),
    "invalid UTF-8": (
        "train.jsonl",
        TEXT.replace(b"add 12", b"add \xff\xfe"),
        "line 3: is not UTF-8",
    ),
    "UTF-16": ("train.jsonl", TEXT.decode().encode("utf-16"), "line 1: is not UTF-8"),
    "bytes of a picture": ("train.jsonl", b"\x89PNG\r\n\x1a\n" * 100, "line 1: "),
    "brackets without end": ("train.jsonl", b"[" * 100_000 + b"\n", "line 1: is not JSON"),
    "a null chosen": (
        "train.jsonl",
        TEXT + lines([{**ONE, "chosen": None}]),
        "line 17: .*dataset.faults.wrong_type=drop",
    ),
    "a number as chosen": (
        "train.jsonl",
        TEXT + lines([{**ONE, "chosen": 7}]),
        "line 17: .*dataset.faults.wrong_type=drop",
    ),
    "an object as chosen": (
        "train.jsonl",
        TEXT + lines([{**ONE, "chosen": {"text": "b"}}]),
        "line 17: .*dataset.faults.wrong_type=drop",
    ),
    "messages without a role": (
        "train.jsonl",
        TEXT + lines([{**ONE, "chosen": [{"content": "b"}], "rejected": [{"content": "c"}]}]),
        "line 17: .*dataset.faults.wrong_type=drop",
    ),
    "strings here and messages there": (
        "train.jsonl",
        TEXT + lines([{**ONE, "chosen": [{"role": "assistant", "content": "b"}]}]),
        "line 17: .*dataset.faults.wrong_type=drop",
    ),
    "no column rejected": (
        "train.jsonl",
        b'{"prompt": "a", "chosen": "b"}\n',
        "line 1: .*rejected",
    ),
    "no column prompt": (
        "train.jsonl",
        b'{"question": "a", "chosen": "b", "rejected": "c"}\n',
        "line 1: .*prompt",
    ),
    "no row left": (
        "train.jsonl",
        lines([{**row, "rejected": row["chosen"]} for row in GOOD]),
        "no train pair is left of 16",
    ),
    "the held-out file to train on": (
        "eval.jsonl",
        lines(HELD_OUT),
        "no train pair is left of 4",
    ),
    "fewer rows than a batch": ("train.jsonl", lines(GOOD[:1]), "train.batch_size=4"),
    "a gzip file cut short": ("train.jsonl.gz", gzip.compress(TEXT)[:-20], "cannot be read"),
    "text in a .gz": ("train.jsonl.gz", TEXT, "cannot be read"),
    "a CSV without a column": ("train.csv", b"prompt,chosen\na,b\n", "lacks column 'rejected'"),
    "a quote without end in a CSV": (
        "train.csv",
        b'prompt,chosen,rejected\na,b,"c\n',
        "cannot be read",
    ),
    "text in a .parquet": ("train.parquet", TEXT, "cannot be read"),
    "an unknown suffix": ("train.txt", TEXT, "the name must end in"),
}


def faults(bench: Bench) -> Iterator[Injection]:
    """Return a fault for each kind of bad row and bad file."""
    for name, dropped in DROPPED.items():
        yield Injection(name, _drops(*dropped))
    for name, given in REFUSED.items():
        yield Injection(name, _refuses(*given))
    yield Injection("a folder edited, its times set back", _edited)
    yield Injection("rows too long among those to draw from", _draws)
    yield Injection("a system column", _loses_a_column)


def _edited(bench: Bench) -> Outcome:
    """Train on a folder, then on the same with other rows in a file of the same age."""
    others = [
        override
        for override in settings()
        if not override.startswith(("dataset=", "dataset.train_path"))
    ]
    command = [*others, "dataset=hub", "dataset.path=pairs", "dataset.num_eval=2"]
    command = [override for override in command if not override.startswith("dataset.eval_path")]
    file = bench.path("pairs/train.jsonl")
    file.parent.mkdir()
    write(file, pairs(30, 16))
    times = file.stat()
    bench.unharmed(*command, into="before")
    write(file, GOOD)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    done = bench.run(*command, "hydra.run.dir=run")
    write(bench.path("train.jsonl"), GOOD)
    same = [override.replace("dataset=hub", "dataset=file") for override in command]
    same = [
        override.replace("dataset.path=pairs", "dataset.train_path=train.jsonl")
        for override in same
    ]
    reference = bench.unharmed(*same, "dataset.overlong=cut_completion", into="reference")
    return survived(done, bench.path("run"), reference)


def _draws(bench: Bench) -> Outcome:
    """Ask for as many pairs as there are good ones, among twice as many that do not fit."""
    bad = [{**row, "prompt": "count " * 300 + row["prompt"]} for row in pairs(40, 32)]
    bench.path("eval.jsonl").write_bytes(lines(HELD_OUT))
    write(bench.path("train.jsonl"), [*bad[:16], *GOOD, *bad[16:]])
    done = bench.run(*settings(), "dataset.num_train=16", "hydra.run.dir=run")
    report = json.loads(bench.path("run/data_report.json").read_text())["train"]
    counts = [report[key] for key in ("num_kept", "num_rows", "num_not_drawn")]
    lost = sum(entry["num"] for entry in report["dropped"].values())
    if counts[0] != 16 or counts[1] != 16 + lost or sum(counts[1:]) != 48:
        return silent(f"kept, rows and not drawn are {counts}, dropped {lost}")
    if "would keep these" not in done.stdout:
        return silent("nothing says that most rows are too long")
    state(bench.path("run"))
    return Outcome(Ending.SURVIVED)


def _loses_a_column(bench: Bench) -> Outcome:
    bench.path("eval.jsonl").write_bytes(lines(HELD_OUT))
    write(bench.path("train.jsonl"), GOOD)
    reference = bench.unharmed(*settings(), into="reference")
    write(bench.path("train.jsonl"), [{**row, "system": "be brief"} for row in GOOD])
    done = bench.run(*settings(), "hydra.run.dir=run")
    if "'system' says is LOST" not in done.stdout:
        return silent("nothing says that the system column is lost")
    return survived(done, bench.path("run"), reference)


def _drops(content: bytes, num: int, reason: str, policy: str) -> Callable[[Bench], Outcome]:
    def happen(bench: Bench) -> Outcome:
        bench.path("eval.jsonl").write_bytes(lines(HELD_OUT))
        bench.path("train.jsonl").write_bytes(lines(GOOD))
        reference = bench.unharmed(*settings(), into="reference")
        bench.path("train.jsonl").write_bytes(lines(GOOD[:7]) + content + lines(GOOD[7:]))
        policies = [f"dataset.faults.{reason}={policy}"] if policy else []
        done = bench.run(*settings(), *policies, "hydra.run.dir=run")
        outcome = survived(done, bench.path("run"), reference)
        report = json.loads(bench.path("run/data_report.json").read_text())["train"]
        counted = {key: entry["num"] for key, entry in report["dropped"].items()}
        if counted != {reason: num}:
            return silent(f"counted as {counted} instead of {num} {reason}")
        return outcome

    return happen


def _refuses(name: str, content: bytes | None, says: str) -> Callable[[Bench], Outcome]:
    def happen(bench: Bench) -> Outcome:
        bench.path("eval.jsonl").write_bytes(lines(HELD_OUT))
        if content is not None:
            bench.path(name).write_bytes(content)
        return refused(bench.run(*settings(name), "hydra.run.dir=run"), bench.path("run"), says)

    return happen


def write(file: Path, rows: list[Row]) -> None:
    """Write JSON lines."""
    file.write_bytes(lines(rows))
