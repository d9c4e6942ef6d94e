"""What a preview costs beside training's tokenizing: `python benchmarks/preview.py PAIRS [MODEL]`.

Makes 50,000 rows out of the rows of PAIRS (such as math_pairs/train.jsonl): every row again and
again, each time with another number before its prompt. Previews them, and does what a run does
before its weights are loaded, in turns, each time in a process of its own: both read the same
overrides, load the tokenizer, and make token ids of the rows. A preview tokenizes on all cores; a
run on as many as `dataset.num_proc` says, by default one. MODEL is a folder with the tokenizer;
without it, the embedded model's. The last line is one JSON object: medians of wall time and of CPU
time in seconds (of all processes), the wall time of the imports, which come on top, the highest
peak of memory of one process in MiB, and the shares that a preview takes more or less than a run:
of wall time without imports and with them, and of CPU time.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

# What a run and a preview import once their configuration is checked
IMPORTS = {
    "run": (
        "data engine methods tracker evaluate model.quantization model.start model.tokenizer "
        "records.results training.trainer"
    ),
    "preview": "data methods model.tokenizer preview.figures preview.page preview.rows",
}


def write(pairs: Path, num: int, file: Path) -> None:
    """Write `num` rows, made of the rows of a file."""
    rows = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
    with file.open("w", encoding="utf-8") as out:
        for number in range(num):
            row = rows[number % len(rows)]
            out.write(json.dumps(row | {"prompt": f"Problem {number}. {row['prompt']}"}) + "\n")


def measure(kind: str, overrides: list[str], folder: str) -> None:
    """Preview, or begin as a run, in this process; print what that took."""
    begun = time.perf_counter()
    for name in IMPORTS[kind].split():
        importlib.import_module(f"orpo_lab.{name}")
    start, before = time.perf_counter(), cpu_seconds()
    with contextlib.redirect_stdout(io.StringIO()):
        preview(overrides, folder) if kind == "preview" else begin(overrides)
    processes = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    took = {
        "wall_seconds": time.perf_counter() - start,
        "cpu_seconds": cpu_seconds() - before,
        "import_seconds": start - begun,
        "peak_mib": max(resource.getrusage(each).ru_maxrss for each in processes) // 1024,
    }
    print(json.dumps(took))


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def preview(overrides: list[str], folder: str) -> None:
    """Run the command."""
    from orpo_lab.preview import command

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([*overrides, "--out", folder]))


def begin(overrides: list[str]) -> None:
    """Do what `run.train` does before the weights are loaded."""
    from orpo_lab import compose, data
    from orpo_lab.model.source import load_config
    from orpo_lab.model.tokenizer import check_ids, load_tokenizer
    from orpo_lab.training import steps
    from orpo_lab.upstream import silence

    silence()
    loaded = compose(*overrides).config
    model_config = load_config(loaded.model)
    tokenizer = load_tokenizer(loaded.model, model_config)
    pairs = data.load(loaded.dataset, tokenizer)
    check_ids(tokenizer, model_config, pairs)
    steps.say_length(loaded, len(pairs.train))


def main() -> None:
    """Measure both kinds in turns, each time in a process of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("pairs", type=Path)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--num-rows", type=int, default=50_000)
    parser.add_argument("--num-rounds", type=int, default=3)
    asked = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in IMPORTS}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "train.jsonl")
        write(asked.pairs, asked.num_rows, file)
        overrides = ["dataset=file", f"dataset.train_path={file}", "dataset.max_length=512"]
        if asked.model:
            overrides += ["model=local", f"model.path={asked.model}"]
        for _ in range(asked.num_rounds):
            for kind in IMPORTS:
                arguments = [sys.executable, __file__, "measure", kind, folder, *overrides]
                done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True)
                found[kind].append(json.loads(done.stdout))
                print(kind, done.stdout.strip(), flush=True)
    result: dict[str, object] = {"rows": asked.num_rows, "rounds": asked.num_rounds}
    for kind, took in found.items():
        result[kind] = {
            **{
                name: round(statistics.median(one[name] for one in took), 2)
                for name in ("wall_seconds", "cpu_seconds", "import_seconds")
            },
            "peak_mib": max(one["peak_mib"] for one in took),
        }
    for name, keys in (
        ("added_share", ["wall_seconds"]),
        ("added_share_with_imports", ["wall_seconds", "import_seconds"]),
        ("added_cpu_share", ["cpu_seconds"]),
    ):
        run, preview = (
            np.array([sum(one[key] for key in keys) for one in found[kind]]) for kind in IMPORTS
        )
        result[name] = round(float(np.median(preview / run)) - 1, 3)
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2], sys.argv[4:], sys.argv[3])
    else:
        main()
