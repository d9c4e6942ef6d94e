"""What reading, checking and tokenizing rows costs: `python benchmarks/data.py`.

Loads made-up conversations with the embedded model's tokenizer, from 5,000 rows to 200,000, and
fifty rows of which one has 100 million characters, in every kind of file. Each case has a process
of its own. Prints a line a case: seconds of CPU time, and the peak of memory above what imports
take, in MiB. About four minutes on one CPU core.

`python benchmarks/data.py rendering [FOLDER ...]` prints instead what the chat template, the check
of its rendering and the tokenizer take of 2,000 conversations, in seconds of CPU time; folders hold
other tokenizers.
"""

import gzip
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import datasets
from transformers import AutoTokenizer

from orpo_lab import compose, data
from orpo_lab.config.dataset import PairColumns
from orpo_lab.data.encode import tokenize
from orpo_lab.data.forms import to_pair
from orpo_lab.data.render import find_unrendered, render
from orpo_lab.errors import UserError
from orpo_lab.model.source import load_config
from orpo_lab.model.tokenizer import load_tokenizer
from orpo_lab.upstream import silence

ROOT = Path(__file__).parents[1]
WORDS = ("so", "well", "now", "right", "okay", "sure", "yes", "look", "see", "fine", "add", "minus")
CASES = (
    ("5000.jsonl",),
    ("10000.jsonl",),
    ("20000.jsonl",),
    ("20000.jsonl", "dataset.num_train=1000"),
    ("200000.jsonl", "dataset.num_train=1000"),
    *((f"large{kind}",) for kind in (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")),
)
SHARED = ("dataset.num_eval=5", "dataset.max_length=2048", "dataset.max_prompt_length=1024")


def conversations(num: int) -> Iterator[dict[str, object]]:
    """Yield rows in UltraFeedback's schema, of 20 to 150 words a prompt and 20 to 250 an answer."""
    rng = random.Random(0)
    for number in range(num):
        asked = f"{number} " + " ".join(rng.choices(WORDS, k=rng.randint(20, 150)))
        sides = (" ".join(rng.choices(WORDS, k=rng.randint(20, 250))) for _ in range(2))
        chosen, rejected = (
            [{"role": "user", "content": asked}, {"role": "assistant", "content": side}]
            for side in sides
        )
        yield {"prompt": asked, "chosen": chosen, "rejected": rejected}


def with_a_large_row() -> Iterator[dict[str, object]]:
    """Yield fifty short rows, the 26th of 100 million characters."""
    for number in range(50):
        chosen = "well " * 20_000_000 if number == 25 else str(number)
        yield {"prompt": f"add {number} and 1.", "chosen": chosen, "rejected": "no"}


def write(file: Path) -> None:
    """Write a case's file, as its name says."""
    size = file.name.split(".")[0]
    rows = with_a_large_row() if size == "large" else conversations(int(size))
    match file.suffix:
        case ".parquet":
            datasets.Dataset.from_list(list(rows)).to_parquet(file)
        case ".csv":
            datasets.Dataset.from_list(list(rows)).to_csv(file)
        case ".json":
            file.write_text(json.dumps(list(rows)))
        case ".gz":
            with gzip.open(file, "wt", compresslevel=1) as out:
                out.writelines(json.dumps(row) + "\n" for row in rows)
        case _:
            with file.open("w") as out:
                out.writelines(json.dumps(row) + "\n" for row in rows)


def measure(file: str, overrides: list[str]) -> None:
    """Load a file in this process and print what it took."""
    loaded = compose("dataset=file", f"dataset.train_path={file}", *overrides).config
    tokenizer = load_tokenizer(loaded.model, load_config(loaded.model))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    try:
        report = data.load(loaded.dataset, tokenizer).report["train"]
        outcome = {
            "num_kept": report["num_kept"],
            "dropped": {fault: entry["num"] for fault, entry in report["dropped"].items()},
        }
    except UserError as error:
        outcome = {"refused": str(error).split("/")[-1]}
    result = {
        "file": Path(file).name,
        "overrides": [override for override in overrides if override not in SHARED],
        "cpu_seconds": round(time.process_time() - start, 2),
        "peak_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024,
        **outcome,
    }
    print(json.dumps(result), flush=True)


def measure_rendering(folders: list[str]) -> None:
    """Print what rendering, checking and tokenizing take, with the tokenizer of each folder."""
    columns = PairColumns(prompt="prompt", chosen="chosen", rejected="rejected")
    pairs = [to_pair(row, columns) for row in conversations(2000)]
    for folder in folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        render(pairs[0], tokenizer, date.today())  # which compiles the template
        seconds = {}
        start = time.process_time()
        rendered = [render(pair, tokenizer, date.today()) for pair in pairs]
        seconds["render"] = time.process_time() - start
        start = time.process_time()
        for pair, texts in zip(pairs, rendered, strict=True):
            if list(find_unrendered(pair, texts, tokenizer)):
                raise ValueError(f"{folder}: its template leaves text out")
        seconds["check"] = time.process_time() - start
        start = time.process_time()
        for texts in rendered:
            tokenize(texts.prompt, texts.chosen, texts.rejected, tokenizer)
        seconds["tokenize"] = time.process_time() - start
        rounded = {name: round(value, 3) for name, value in seconds.items()}
        print(json.dumps({"tokenizer": Path(folder).name, "rows": len(pairs), **rounded}))


def main() -> None:
    """Measure every case in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        for name, *overrides in CASES:
            file = Path(folder) / name
            # In processes of their own: what was held once would hide what is held later
            subprocess.run([sys.executable, __file__, "write", str(file)], check=True)
            command = [sys.executable, __file__, "measure", str(file), *SHARED, *overrides]
            subprocess.run(command, check=True)
            file.unlink()


if __name__ == "__main__":
    silence()
    match sys.argv[1:]:
        case ["write", file]:
            write(Path(file))
        case ["measure", file, *overrides]:
            measure(file, overrides)
        case ["rendering", *folders]:
            measure_rendering([str(ROOT / "orpo_lab" / "tiny"), *folders])
        case _:
            main()
